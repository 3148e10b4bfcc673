// Values rounded into parameters of 16 bits, up or down, in one launch per table;
// gls_fused.reference.round_params_ says by which draws. Bytes per parameter: 6.
#pragma once

#include <cmath>
#include <cstring>

#include "../draws.h"
#include "round.h"
#include "step.cuh"

namespace gls_fused::cuda {

template <typename T>
__device__ inline T from_bits(uint16_t bits) {
  T found;
  std::memcpy(&found, &bits, sizeof(bits));
  return found;
}

template <typename T>
__device__ inline T round_by(float value, float draw) {
  T nearest;
  narrow(value, nearest);
  const float size = std::fabs(value), found = std::fabs(widen(nearest));
  if (!(found < INFINITY)) return nearest;
  uint16_t bits;
  std::memcpy(&bits, &nearest, sizeof(bits));
  // Sign and magnitude: one less in the bits is the next number towards zero.
  const uint16_t inner = bits - (found > size), outer = inner + 1;
  const T low = from_bits<T>(inner), high = from_bits<T>(outer);
  const float from = std::fabs(widen(low)), to = std::fabs(widen(high));
  return draw * (to - from) < size - from ? high : low;
}

template <typename T>
__global__ void __launch_bounds__(kRoundThreads)
    round_kernel(const __grid_constant__ RoundTable table) {
  const Rounded& x = table.entries[find_entry(table, blockIdx.x)];
  const uint32_t step = uint32_t(int64_t(load_number(x.step, x.double_step)));
  T* param = static_cast<T*>(x.param);
  const int64_t first = int64_t(blockIdx.x - x.first) * kRoundElements;
  constexpr int kEach = kWidth<T>;
  static_assert(kEach * kRoundThreads == kRoundElements);
  const int64_t own = first + threadIdx.x * kEach;
  if (own + kEach <= x.numel && is_aligned(param) && is_aligned(x.values)) {
    float values[kEach];
    load_elements(x.values + own, values);
    T rounded[kEach];
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      rounded[k] = round_by<T>(values[k], draw_uniform(x.seed, step, own + k));
    }
    uint4 bits;
    std::memcpy(&bits, rounded, sizeof(bits));
    store_16(param + own, bits);
    return;
  }
  for (int64_t i = own; i < own + kEach && i < x.numel; ++i) {
    param[i] = round_by<T>(x.values[i], draw_uniform(x.seed, step, i));
  }
}

}  // namespace gls_fused::cuda
