// The step of layers whose D = D0 P is formed here, from D0 and T = (D0 U) C, and never stored:
//
//   D = D0 / lambda' + T U',   then the step of update.cuh along it
//
// Bytes per float32 parameter, with the pass that made T: 16 without momentum, 24 with it; 8 more
// for "adam". "rms" and "sgd" need ||D|| before the first weight is written, so there
// square_tiles_kernel forms each tile once more: 4 bytes and 64 flop, where storing D and reading
// it again would take 8 bytes. ||D||^2 also follows from D0 U and T alone, but as a difference of
// nearly equal numbers where P damps most of D0. See product.cuh for why the products are plain
// float32 FMA.
#pragma once

#include "product.cuh"
#include "step.cuh"
#include "tile_update.h"

namespace gls_fused::cuda {

// The row whose bias this thread takes, or a negative number: with the first tile of its rows.
template <typename Layer, typename T, bool kWide>
__device__ inline int64_t bias_row(const Layer& x, const Place<T, kWide>& place) {
  const int64_t i = place.row - threadIdx.x / 32 * kTileThreadRows<T> + threadIdx.x;
  const bool mine = x.bias.param && place.column == 0 && threadIdx.x < kTileRows<T> && i < x.n;
  return mine ? i : -1;
}

// The direction of row i's bias, and its gradient.
template <typename T, typename Layer>
__device__ inline float bias_direction(const Layer& x, int64_t i, float scale, float& gradient) {
  gradient = widen(static_cast<const T*>(x.bias.gradient)[i]);
  return gradient * scale + turn_last(x.turned, x.basis, x.basis_row, x.size, i);
}

template <typename T, bool kWide, bool kMomentum, bool kElementwise>
__device__ inline void update_tile(const TileLayer& x, const LayerStep& step, const Decays& decays,
                                   TileMemory<T>& memory) {
  const auto place = find_place<T, kWide>(blockIdx.x - x.first, x.across, x.n, x.size);
  const float scale = 1.0f / *x.shift;
  float d[kTileThreadRows<T>][kWidth<T>];
#pragma unroll
  for (int r = 0; r < kTileThreadRows<T>; ++r) {
    load_row(place, static_cast<const T*>(x.weight.gradient), place.row + r, x.size, d[r]);
#pragma unroll
    for (int k = 0; k < kWidth<T>; ++k) d[r][k] *= scale;
  }
  form_tile(place, x.turned, x.basis, x.basis_row, memory, d);

  const Rates<float> rates = make_rates<float>(step, decays);
  T* param = static_cast<T*>(x.weight.param);
  float* exp_avg = static_cast<float*>(x.weight.exp_avg);
  float* exp_avg_sq = static_cast<float*>(x.weight.exp_avg_sq);
  const int64_t first = forget(place.row);
  // Some rows at a time, as loads cannot pass the stores of the rows before: 64 bytes of accesses
  // to a thread. More would spill.
  constexpr int kRows = kElementwise || sizeof(T) < 4 ? 1 : 2;
#pragma unroll
  for (int r = 0; r < kTileThreadRows<T>; r += kRows) {
    float w[kRows][kWidth<T>], m[kRows][kWidth<T>], v[kRows][kWidth<T>];
#pragma unroll
    for (int q = 0; q < kRows; ++q) {
      const int64_t row = first + r + q;
      load_row(place, param, row, x.size, w[q]);
      if constexpr (kMomentum) load_row(place, exp_avg, row, x.size, m[q]);
      if constexpr (kElementwise) load_row(place, exp_avg_sq, row, x.size, v[q]);
    }
#pragma unroll
    for (int q = 0; q < kRows; ++q) {
      const int64_t row = first + r + q;
#pragma unroll
      for (int k = 0; k < kWidth<T>; ++k) {
        w[q][k] =
            step_element<kMomentum, kElementwise>(w[q][k], d[r + q][k], m[q][k], v[q][k], rates);
      }
      store_row(place, w[q], param, row, x.size);
      if constexpr (kMomentum) store_row(place, m[q], exp_avg, row, x.size);
      if constexpr (kElementwise) store_row(place, v[q], exp_avg_sq, row, x.size);
    }
  }

  const int64_t i = bias_row(x, place);
  if (i < 0) return;
  float gradient, m = 0, v = 0;
  const float direction = bias_direction<T>(x, i, scale, gradient);
  T& bias = static_cast<T*>(x.bias.param)[i];
  if constexpr (kMomentum) m = static_cast<float*>(x.bias.exp_avg)[i];
  if constexpr (kElementwise) v = static_cast<float*>(x.bias.exp_avg_sq)[i];
  narrow(step_element<kMomentum, kElementwise>(widen(bias), direction, m, v, rates), bias);
  if constexpr (kMomentum) static_cast<float*>(x.bias.exp_avg)[i] = m;
  if constexpr (kElementwise) static_cast<float*>(x.bias.exp_avg_sq)[i] = v;
}

template <typename T, bool kMomentum, bool kElementwise>
__global__ void __launch_bounds__(kProductThreads, 2)
    update_tiles_kernel(const __grid_constant__ TileTable table, const LayerStep* steps,
                        const Decays decays) {
  __shared__ __align__(16) TileMemory<T> memory;
  const TileLayer& x = table.entries[find_entry(table, blockIdx.x)];
  const LayerStep& step = steps[x.layer];
  if (step.taken == 0) return;
  if (x.wide) {
    update_tile<T, true, kMomentum, kElementwise>(x, step, decays, memory);
  } else {
    update_tile<T, false, kMomentum, kElementwise>(x, step, decays, memory);
  }
}

// The sums of D^2 and of D0^2 of the block's tile; valid in thread 0.
template <typename T, bool kWide>
__device__ inline double2 square_tile(const TileLayer& x, TileMemory<T>& memory) {
  const auto place = find_place<T, kWide>(blockIdx.x - x.first, x.across, x.n, x.size);
  const float scale = 1.0f / *x.shift;
  float d[kTileThreadRows<T>][kWidth<T>];
  float gradients = 0, directions = 0;
#pragma unroll
  for (int r = 0; r < kTileThreadRows<T>; ++r) {
    load_row(place, static_cast<const T*>(x.weight.gradient), place.row + r, x.size, d[r]);
#pragma unroll
    for (int k = 0; k < kWidth<T>; ++k) {
      gradients += d[r][k] * d[r][k];
      d[r][k] *= scale;
    }
  }
  // Beyond the edge T and U' are zero, and so is D.
  form_tile(place, x.turned, x.basis, x.basis_row, memory, d);
#pragma unroll
  for (int r = 0; r < kTileThreadRows<T>; ++r) {
#pragma unroll
    for (int k = 0; k < kWidth<T>; ++k) directions += d[r][k] * d[r][k];
  }
  const int64_t i = bias_row(x, place);
  if (i >= 0) {
    float gradient;
    const float direction = bias_direction<T>(x, i, scale, gradient);
    directions += direction * direction;
    gradients += gradient * gradient;
  }
  const double direction = sum_block<kProductThreads>(double(directions));
  const double gradient = sum_block<kProductThreads>(double(gradients));
  return make_double2(direction, gradient);
}

template <typename T>
__global__ void __launch_bounds__(kProductThreads, 2)
    square_tiles_kernel(const __grid_constant__ TileTable table, double2* squares) {
  __shared__ __align__(16) TileMemory<T> memory;
  const TileLayer& x = table.entries[find_entry(table, blockIdx.x)];
  const double2 sums = x.wide ? square_tile<T, true>(x, memory) : square_tile<T, false>(x, memory);
  if (threadIdx.x == 0) squares[blockIdx.x] = sums;
}

}  // namespace gls_fused::cuda
