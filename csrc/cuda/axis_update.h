// What the update that is scaled by row and by column is told; see axis_update.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"
#include "product.h"
#include "update.h"

namespace gls_fused::cuda {

constexpr int kBlendThreads = 256;

struct AxisArrays {
  void* param;
  const void* gradient;  // D0; D, where that is given
  void* exp_avg;         // null when momentum is 0
};

struct AxisLayer {
  AxisArrays weight;    // [n, size], contiguous
  AxisArrays bias;      // [n]; param is null where there is none
  void* rows;           // v [n], of the state's dtype
  void* columns;        // c [size (+ 1)], of the state's dtype; null for "row"
  const float* basis;   // U' [rank, size (+ 1)], a row's elements adjacent; null where D is given
  const float* shift;
  Turned turned;
  int64_t row_sums;     // where among the sums those of rows begin, [across, n]
  int64_t column_sums;  // and those of columns, [tiles in a column of them, size (+ 1)]
  int64_t n;
  int64_t size;
  int64_t basis_row;
  uint32_t across;  // tiles in a row of them
  uint32_t layer;
  uint32_t first;  // its first block in this launch
  bool wide;       // whether every row of the weight's arrays begins at 16 bytes and ends there
};

struct AxisTable : Table<AxisLayer> {
  bool formed = false;  // whether D is formed here
};

// A layer's step, and its sums of squares on their way to v and c. The sum of the v that a block
// has blended takes the place of the first sum of its rows, for the mean over all.
struct AxisBlend {
  void* step;            // float or double, 0-d
  const void* rates;     // bound and growth; null where there are none
  void* rows;
  void* columns;
  int64_t row_sums;
  int64_t column_sums;
  int64_t n;
  int64_t dim;  // columns, the bias's among them
  uint32_t across;
  uint32_t down;
  uint32_t layer;
  uint32_t first;  // its first block in this launch; the last of a layer's counts its step
};

using BlendTable = Table<AxisBlend>;

// `sums`: of the state's dtype.
void launch_square_axes(const AxisTable& table, Dtype dtype, void* sums, cudaStream_t stream);
void launch_blend_axes(const BlendTable& table, const FinishOptions& options, void* sums,
                       LayerStep* steps, cudaStream_t stream);
void launch_update_axes(const AxisTable& table, Dtype dtype, const void* sums,
                        const LayerStep* steps, const Decays& decays, cudaStream_t stream);

}  // namespace gls_fused::cuda
