// What the update that forms D itself is told; see tile_update.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"
#include "product.h"
#include "update.h"

namespace gls_fused::cuda {

struct TileArrays {
  void* param;
  const void* gradient;  // D0
  void* exp_avg;         // null when momentum is 0
  void* exp_avg_sq;      // per element for "adam", else null
};

struct TileLayer {
  TileArrays weight;    // [n, size], contiguous
  TileArrays bias;      // [n]; param is null where there is none
  const float* basis;   // U' [rank, size (+ 1)], a row's elements adjacent
  const float* shift;
  Turned turned;
  int64_t n;
  int64_t size;
  int64_t basis_row;
  uint32_t across;  // tiles in a row of them
  uint32_t layer;
  uint32_t first;  // its first block in this launch
  bool wide;       // whether every row of the weight's arrays begins at 16 bytes and ends there
};

using TileTable = Table<TileLayer>;

// Rows and columns of a tile of elements of this many bytes: 32 elements to a thread.
constexpr int64_t tile_rows(int bytes) { return 16 * bytes; }
constexpr int64_t tile_columns(int bytes) { return 512 / bytes; }

void launch_square_tiles(const TileTable& table, Dtype dtype, double2* squares,
                         cudaStream_t stream);
void launch_update_tiles(const TileTable& table, Dtype dtype, const LayerStep* steps,
                         const Decays& decays, cudaStream_t stream);

}  // namespace gls_fused::cuda
