// The step of layers whose D is scaled by row ("row"), or by row and column ("factored"):
//
//   v_i <- beta2 v_i + (1 - beta2) mean_j(D_ij^2),   c_j the same with the mean over i
//   W <- W (1 - lr weight_decay) - rate m^ / (sqrt(v^_i) + eps)
//   W <- W (1 - lr weight_decay) - rate m^ / (sqrt(v^_i c_j / mean(v)) + eps)
//
//   square_axes_kernel   sums of D^2 over the rows and the columns of a tile, a tile to a block
//   blend_axes_kernel    v and c take in the sums of their tiles, in the order of the tiles; the
//                        layer counts its step
//   update_axes_kernel   the step, a tile to a block; mean(v) from the sums of the blocks before
//
// Bytes per float32 parameter: with D given 16 without momentum, 24 with it; with D formed (as in
// tile_update.cuh, and twice) 20 and 28. A tile of 64 rows and 128 columns writes as many sums, which
// are read once, and reads as many averages: 0.3 bytes more, 4 (1 / 128 + 1 / 64) three times.
// Blending is a launch of its own: one block to a layer would read the sums of 4096 rows and 4096
// columns, 1.6 MB, alone, and a tile of the step that adds up its own would read 10240 numbers beside
// its 8192 elements.
#pragma once

#include <cfloat>

#include "axis_update.h"
#include "tile_update.cuh"

namespace gls_fused::cuda {

// What forming D takes, and nothing where it is given.
template <typename T, bool kFormed>
struct AxisMemory {
  TileMemory<T> tile;
};
template <typename T>
struct AxisMemory<T, false> {};

// The thread's part of D; zeros beyond the edge. All threads of the block must come here.
template <typename T, bool kWide, bool kFormed>
__device__ inline void load_directions(const AxisLayer& x, const Place<T, kWide>& place,
                                       AxisMemory<T, kFormed>& memory,
                                       Wide<T> (&d)[kTileThreadRows<T>][kWidth<T>]) {
#pragma unroll
  for (int r = 0; r < kTileThreadRows<T>; ++r) {
    load_row(place, static_cast<const T*>(x.weight.gradient), place.row + r, x.size, d[r]);
  }
  if constexpr (kFormed) {
    const float scale = 1.0f / *x.shift;
#pragma unroll
    for (int r = 0; r < kTileThreadRows<T>; ++r) {
#pragma unroll
      for (int k = 0; k < kWidth<T>; ++k) d[r][k] *= scale;
    }
    form_tile(place, x.turned, x.basis, x.basis_row, memory.tile, d);
  }
}

template <typename T, bool kFormed>
__device__ inline Wide<T> load_bias_direction(const AxisLayer& x, int64_t i) {
  if constexpr (kFormed) {
    float gradient;
    return bias_direction<T>(x, i, 1.0f / *x.shift, gradient);
  } else {
    return widen(static_cast<const T*>(x.bias.gradient)[i]);
  }
}

// The sums of a tile on their way from the warps.
template <typename T, bool kFormed>
struct SquareMemory {
  AxisMemory<T, kFormed> axis;
  Wide<T> by_row[kTileRows<T>];
  Wide<T> by_column[kProductThreads / 32][kTileColumns<T>];
};

template <typename T, bool kWide, bool kFormed>
__device__ inline void square_axes(const AxisLayer& x, uint32_t block, Wide<T>* sums,
                                   SquareMemory<T, kFormed>& memory) {
  using W = Wide<T>;
  constexpr int kWarps = kProductThreads / 32, kRows = kTileThreadRows<T>;
  auto& by_row = memory.by_row;
  auto& by_column = memory.by_column;
  const auto place = find_place<T, kWide>(block, x.across, x.n, x.size);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  W d[kRows][kWidth<T>];
  load_directions<T, kWide, kFormed>(x, place, memory.axis, d);
  W columns[kWidth<T>] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    W sum = 0;
#pragma unroll
    for (int k = 0; k < kWidth<T>; ++k) {
      const W square = d[r][k] * d[r][k];
      columns[k] += square;
      sum += square;
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      sum += __shfl_down_sync(0xffffffffu, sum, offset);
    }
    if (lane == 0) by_row[warp * kRows + r] = sum;
  }
#pragma unroll
  for (int k = 0; k < kWidth<T>; ++k) {
    by_column[warp][place.column_of(k) - place.column] = columns[k];
  }
  W bias = 0;
  const int64_t i = bias_row(x, place);
  if (i >= 0) {
    const W direction = load_bias_direction<T, kFormed>(x, i);
    bias = direction * direction;
  }
  __syncthreads();
  // Each thread has the bias of the row that it writes.
  const int64_t row = place.row - warp * kRows + threadIdx.x;
  if (threadIdx.x < kTileRows<T> && row < x.n) {
    sums[x.row_sums + int64_t(block % x.across) * x.n + row] = by_row[threadIdx.x] + bias;
  }
  if (!x.columns) return;
  W* to = sums + x.column_sums + int64_t(block / x.across) * (x.size + (x.bias.param ? 1 : 0));
  const int64_t column = place.column + threadIdx.x;
  if (threadIdx.x < kTileColumns<T> && column < x.size) {
    W sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += by_column[w][threadIdx.x];
    to[column] = sum;
  }
  if (!x.bias.param || place.column != 0) return;
  const double sum = sum_block<kProductThreads>(double(bias));
  if (threadIdx.x == 0) to[x.size] = W(sum);
}

template <typename T, bool kFormed>
__global__ void __launch_bounds__(kProductThreads, 2)
    square_axes_kernel(const __grid_constant__ AxisTable table, Wide<T>* sums) {
  __shared__ __align__(16) SquareMemory<T, kFormed> memory;
  const AxisLayer& x = table.entries[find_entry(table, blockIdx.x)];
  const uint32_t block = blockIdx.x - x.first;
  if (x.wide) {
    square_axes<T, true, kFormed>(x, block, sums, memory);
  } else {
    square_axes<T, false, kFormed>(x, block, sums, memory);
  }
}

// An element of v or c to a thread; a layer's blocks are those of v, those of c, and one that counts
// its step.
template <typename W>
__global__ void __launch_bounds__(kBlendThreads)
    blend_axes_kernel(const __grid_constant__ BlendTable table, const FinishOptions options,
                      W* sums, LayerStep* steps) {
  const AxisBlend& x = table.entries[find_entry(table, blockIdx.x)];
  const uint32_t block = blockIdx.x - x.first;
  const uint32_t row_blocks = uint32_t((x.n + kBlendThreads - 1) / kBlendThreads);
  const uint32_t column_blocks =
      x.columns ? uint32_t((x.dim + kBlendThreads - 1) / kBlendThreads) : 0;
  if (block == row_blocks + column_blocks) {
    if (threadIdx.x == 0) start_step(x.step, x.rates, options, steps[x.layer]);
    return;
  }
  if (!is_taken(options)) return;
  const bool is_row = block < row_blocks;
  const int64_t count = is_row ? x.n : x.dim, terms = is_row ? x.dim : x.n;
  const int64_t first = int64_t(is_row ? block : block - row_blocks) * kBlendThreads;
  const int64_t i = first + threadIdx.x;
  W blended = 0;
  if (i < count) {
    const W* from = sums + (is_row ? x.row_sums : x.column_sums) + i;
    const uint32_t parts = is_row ? x.across : x.down;
    double sum = 0;
    for (uint32_t part = 0; part < parts; ++part) sum += from[part * count];
    const double scale = gradient_scale(options);
    const double mean = terms > 0 ? sum * scale * scale / terms : 0;
    W& average = static_cast<W*>(is_row ? x.rows : x.columns)[i];
    blended = W(average + (mean - average) * (1 - options.decays.beta2));
    average = blended;
  }
  if (!is_row || !x.columns) return;
  // Its barriers stand between the reading of the first sum and the writing in its place.
  const double total = sum_block<kBlendThreads>(double(blended));
  if (threadIdx.x == 0) sums[x.row_sums + first] = W(total);
}

// mean(v), at least the smallest normal number: of the sums that blend_axes_kernel has left, by each
// warp for itself.
template <typename W>
__device__ inline W mean_of_rows(const AxisLayer& x, const W* sums) {
  double sum = 0;
  for (int64_t first = int64_t(threadIdx.x % 32) * kBlendThreads; first < x.n;
       first += 32 * kBlendThreads) {
    sum += sums[x.row_sums + first];
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  const double mean = sum / x.n, tiny = sizeof(W) == 8 ? DBL_MIN : double(FLT_MIN);
  // As clamp does, a NaN stays one.
  return W(mean < tiny ? tiny : mean);
}

template <typename T, bool kWide, bool kFormed, bool kMomentum>
__device__ inline void update_axes(const AxisLayer& x, uint32_t block, const Wide<T>* sums,
                                   const LayerStep& step, const Decays& decays,
                                   AxisMemory<T, kFormed>& memory) {
  using W = Wide<T>;
  const auto place = find_place<T, kWide>(block, x.across, x.n, x.size);
  W formed[kTileThreadRows<T>][kWidth<T>];
  if constexpr (kFormed) load_directions<T, kWide, true>(x, place, memory, formed);

  const Rates<W> rates = make_rates<W>(step, decays);
  const W mean = x.columns ? mean_of_rows(x, sums) : W(1);
  const W* rows = static_cast<const W*>(x.rows);
  const W* c = static_cast<const W*>(x.columns);
  W columns[kWidth<T>];
  if (c) load_row(place, c, 0, 0, columns);
#pragma unroll
  for (int k = 0; k < kWidth<T>; ++k) columns[k] = (c ? columns[k] : W(1)) * rates.correction;
  const T* gradient = static_cast<const T*>(x.weight.gradient);
  T* param = static_cast<T*>(x.weight.param);
  W* exp_avg = static_cast<W*>(x.weight.exp_avg);
  const int64_t first = forget(place.row);
  // Some rows at a time, as in update_tiles_kernel; of float64, whose square roots and quotients
  // are calls, one, and not unrolled.
  constexpr int kRows = sizeof(T) == 4 ? 2 : 1;
  constexpr int kUnroll = sizeof(T) == 8 ? 1 : kTileThreadRows<T>;
#pragma unroll kUnroll
  for (int r = 0; r < kTileThreadRows<T>; r += kRows) {
    W d[kRows][kWidth<T>], w[kRows][kWidth<T>], m[kRows][kWidth<T>], shares[kRows];
#pragma unroll
    for (int q = 0; q < kRows; ++q) {
      const int64_t row = first + r + q;
      if constexpr (kFormed) {
#pragma unroll
        for (int k = 0; k < kWidth<T>; ++k) d[q][k] = formed[r + q][k];
      } else {
        load_row(place, gradient, row, x.size, d[q]);
      }
      load_row(place, param, row, x.size, w[q]);
      if constexpr (kMomentum) load_row(place, exp_avg, row, x.size, m[q]);
      shares[q] = row < x.n ? rows[row] / mean : W(0);
    }
#pragma unroll
    for (int q = 0; q < kRows; ++q) {
      const int64_t row = first + r + q;
#pragma unroll
      for (int k = 0; k < kWidth<T>; ++k) {
        w[q][k] =
            step_scaled<kMomentum>(w[q][k], d[q][k], m[q][k], shares[q] * columns[k], rates);
      }
      store_row(place, w[q], param, row, x.size);
      if constexpr (kMomentum) store_row(place, m[q], exp_avg, row, x.size);
    }
  }

  const int64_t i = bias_row(x, place);
  if (i < 0) return;
  const W square = rows[i] / mean * ((c ? c[x.size] : W(1)) * rates.correction);
  T& bias = static_cast<T*>(x.bias.param)[i];
  W m = 0;
  if constexpr (kMomentum) m = static_cast<W*>(x.bias.exp_avg)[i];
  narrow(step_scaled<kMomentum>(widen(bias), load_bias_direction<T, kFormed>(x, i), m, square,
                                rates),
         bias);
  if constexpr (kMomentum) static_cast<W*>(x.bias.exp_avg)[i] = m;
}

template <typename T, bool kFormed, bool kMomentum>
__global__ void __launch_bounds__(kProductThreads, 2)
    update_axes_kernel(const __grid_constant__ AxisTable table, const Wide<T>* sums,
                       const LayerStep* steps, const Decays decays) {
  __shared__ __align__(16) AxisMemory<T, kFormed> memory;
  const AxisLayer& x = table.entries[find_entry(table, blockIdx.x)];
  const LayerStep& step = steps[x.layer];
  if (step.taken == 0) return;
  const uint32_t block = blockIdx.x - x.first;
  if (x.wide) {
    update_axes<T, true, kFormed, kMomentum>(x, block, sums, step, decays, memory);
  } else {
    update_axes<T, false, kFormed, kMomentum>(x, block, sums, step, decays, memory);
  }
}

}  // namespace gls_fused::cuda
