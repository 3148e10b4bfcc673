// What the update that forms D itself is told; see tile_update.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"
#include "update.h"

namespace gls_fused::cuda {

constexpr int kMaxTiled = 28;

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
  const float* turned;  // T [n, rank]
  const float* shift;
  int64_t n;
  int64_t size;
  int64_t basis_row;
  int32_t rank;
  uint32_t across;  // tiles in a row of them
  uint32_t layer;
  uint32_t first;  // its first block in this launch
};

struct TileTable {
  TileLayer entries[kMaxTiled];
  int32_t count;
  uint32_t blocks;
  bool wide;  // whether every row of every weight's arrays begins at 16 bytes and ends there
};

// Rows and columns of a tile of elements of this many bytes: 32 elements to a thread.
constexpr int64_t tile_rows(int bytes) { return 16 * bytes; }
constexpr int64_t tile_columns(int bytes) { return 512 / bytes; }

void launch_square_tiles(const TileTable& table, Dtype dtype, double2* squares,
                         cudaStream_t stream);
void launch_update_tiles(const TileTable& table, Dtype dtype, const LayerStep* steps,
                         const Decays& decays, cudaStream_t stream);

}  // namespace gls_fused::cuda
