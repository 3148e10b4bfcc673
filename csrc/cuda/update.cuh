// The step of all parameters whose direction D is given, in one launch per table:
//
//   m <- momentum m + (1 - momentum) D,   v <- beta2 v + (1 - beta2) D^2   (v: "adam" only)
//   W <- W (1 - lr weight_decay) - rate m^ (/ (sqrt(v^) + eps))
//
// Bytes per float32 parameter: 12 without momentum, 20 with it, 28 for "adam" with it, as torch's
// fused Adam. "rms" and "sgd" need a norm of D before the first weight is written, so there
// square_flat_kernel reads D (and D0) first: 4 (8) bytes more. Sums of squares are taken per chunk
// and added up in the order of the chunks, so the same step gives the same bits.
#pragma once

#include "step.cuh"

namespace gls_fused::cuda {

template <typename T>
constexpr int kChunk = chunk_elements(sizeof(T));

template <typename T, bool kMomentum, bool kElementwise>
__global__ void __launch_bounds__(kUpdateThreads)
    update_flat_kernel(const __grid_constant__ FlatTable table, const LayerStep* steps,
                       const Decays decays) {
  using W = Wide<T>;
  const FlatTensor& x = table.entries[find_entry(table, blockIdx.x)];
  const LayerStep& step = steps[x.layer];
  if (step.taken == 0) return;
  const Rates<W> rates = make_rates<W>(step, decays);
  T* param = static_cast<T*>(x.param);
  const T* direction = static_cast<const T*>(x.direction);
  W* exp_avg = static_cast<W*>(x.exp_avg);
  W* exp_avg_sq = static_cast<W*>(x.exp_avg_sq);
  const int64_t first = int64_t(blockIdx.x - x.first) * kChunk<T>;

  constexpr int kVectors = kChunk<T> / (kUpdateThreads * kWidth<T>);
  if (first + kChunk<T> <= x.numel && is_aligned(param) && is_aligned(direction) &&
      is_aligned(exp_avg) && is_aligned(exp_avg_sq)) {
    W d[kVectors][kWidth<T>], w[kVectors][kWidth<T>];
    W m[kVectors][kWidth<T>], v[kVectors][kWidth<T>];
    const int64_t own = first + threadIdx.x * kWidth<T>;
    // All loads before the first use.
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int64_t at = own + i * (kUpdateThreads * kWidth<T>);
      load_elements(direction + at, d[i]);
      load_elements(param + at, w[i]);
      if constexpr (kMomentum) load_elements(exp_avg + at, m[i]);
      if constexpr (kElementwise) load_elements(exp_avg_sq + at, v[i]);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int64_t at = own + i * (kUpdateThreads * kWidth<T>);
#pragma unroll
      for (int k = 0; k < kWidth<T>; ++k) {
        w[i][k] =
            step_element<kMomentum, kElementwise>(w[i][k], d[i][k], m[i][k], v[i][k], rates);
      }
      store_elements(w[i], param + at);
      if constexpr (kMomentum) store_elements(m[i], exp_avg + at);
      if constexpr (kElementwise) store_elements(v[i], exp_avg_sq + at);
    }
    return;
  }
  const int64_t end = first + kChunk<T> < x.numel ? first + kChunk<T> : x.numel;
  for (int64_t at = first + threadIdx.x; at < end; at += kUpdateThreads) {
    W m = 0, v = 0;
    if constexpr (kMomentum) m = exp_avg[at];
    if constexpr (kElementwise) v = exp_avg_sq[at];
    const W w = step_element<kMomentum, kElementwise>(widen(param[at]), widen(direction[at]), m, v,
                                                      rates);
    narrow(w, param[at]);
    if constexpr (kMomentum) exp_avg[at] = m;
    if constexpr (kElementwise) exp_avg_sq[at] = v;
  }
}

// The sum of squares of a chunk of `from`; valid in thread 0.
template <typename T>
__device__ inline double square_chunk(const T* from, int64_t first, int64_t numel) {
  using W = Wide<T>;
  W sum = 0;
  if (first + kChunk<T> <= numel && is_aligned(from)) {
    constexpr int kVectors = kChunk<T> / (kUpdateThreads * kWidth<T>);
    W x[kVectors][kWidth<T>];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      load_elements(from + first + (i * kUpdateThreads + threadIdx.x) * kWidth<T>, x[i]);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int k = 0; k < kWidth<T>; ++k) sum += x[i][k] * x[i][k];
    }
  } else {
    const int64_t end = first + kChunk<T> < numel ? first + kChunk<T> : numel;
    for (int64_t at = first + threadIdx.x; at < end; at += kUpdateThreads) {
      const W x = widen(from[at]);
      sum += x * x;
    }
  }
  return sum_block<kUpdateThreads>(double(sum));
}

// squares[block] = the sums of D^2 and, with `both`, of D0^2, of the block's chunk.
template <typename T>
__global__ void __launch_bounds__(kUpdateThreads)
    square_flat_kernel(const __grid_constant__ FlatTable table, bool both, double2* squares) {
  const FlatTensor& x = table.entries[find_entry(table, blockIdx.x)];
  const int64_t first = int64_t(blockIdx.x - x.first) * kChunk<T>;
  const double direction = square_chunk(static_cast<const T*>(x.direction), first, x.numel);
  double gradient = 0;
  if (both) gradient = square_chunk(static_cast<const T*>(x.gradient), first, x.numel);
  if (threadIdx.x == 0) squares[blockIdx.x] = make_double2(direction, gradient);
}

constexpr int kFinishThreads = 128;

// A layer, one to a block, counts its step, blends its mean square in, and gets its numbers.
__global__ void __launch_bounds__(kFinishThreads)
    finish_layers_kernel(const __grid_constant__ LayerTable table, const FinishOptions options,
                         const double2* squares, LayerStep* steps) {
  const LayerSums& layer = table.entries[blockIdx.x];
  double direction = 0, gradient = 0;
  if (options.scale != Scale::kNone) {
    for (int64_t i = threadIdx.x; i < layer.count; i += kFinishThreads) {
      direction += squares[layer.first + i].x;
      gradient += squares[layer.first + i].y;
    }
    direction = sum_block<kFinishThreads>(direction);
    gradient = sum_block<kFinishThreads>(gradient);
  }
  if (threadIdx.x != 0) return;
  LayerStep& out = steps[blockIdx.x];
  if (!start_step(layer.step, layer.rates, options, out)) return;
  if (options.scale == Scale::kRootMeanSquare) {
    const double mean = layer.numel > 0 ? direction * out.scale * out.scale / layer.numel : 0;
    double v = load_number(layer.exp_avg_sq, options.double_state);
    v = store_number(layer.exp_avg_sq, options.double_state,
                     v + (mean - v) * (1 - options.decays.beta2));
    out.rate /= sqrt(v * out.correction) + options.decays.eps;
  } else if (options.scale == Scale::kGradientNorm) {
    // Not `> 0`: a norm that is not a number must reach the parameters.
    if (direction != 0) out.rate *= sqrt(gradient / direction);
  }
}

}  // namespace gls_fused::cuda
