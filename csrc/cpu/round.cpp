// Values rounded into parameters of 16 bits, up or down, on the CPU; gls_fused.reference.round_params_
// says by which draws. Bytes per parameter: 6.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "../check.h"
#include "../draws.h"
#include "steps.h"
#include "threads.h"

namespace gls_fused {
inline namespace CPU_CAPABILITY {
namespace {

template <typename T>
T round_by(float value, float draw) {
  const T nearest = static_cast<T>(value);
  const float size = std::abs(value), found = std::abs(static_cast<float>(nearest));
  if (!std::isfinite(found)) return nearest;
  // Sign and magnitude: one less in the bits is the next number towards zero.
  const uint16_t inner = nearest.x - (found > size), outer = inner + 1;
  const T low(inner, T::from_bits()), high(outer, T::from_bits());
  const float from = std::abs(static_cast<float>(low)), to = std::abs(static_cast<float>(high));
  return draw * (to - from) < size - from ? high : low;
}

template <typename T>
void round_all(const float* values, T* params, int64_t count, uint32_t seed, uint32_t step) {
  const int64_t chunks = (count + kChunk - 1) / kChunk;
  share(0, chunks, grain(chunks), [&](int64_t first, int64_t last) {
    for (int64_t i = first * kChunk; i < std::min(count, last * kChunk); ++i) {
      params[i] = round_by<T>(values[i], draw_uniform(seed, step, i));
    }
  });
}

void round_params_(at::TensorList params, at::TensorList values, at::IntArrayRef seeds,
                   at::TensorList steps) {
  check_rounded(params, values, seeds, steps);
  for (size_t i = 0; i < params.size(); ++i) {
    // As the parameter lies in memory, whose elements the draws are numbered by.
    const bool dense = params[i].is_non_overlapping_and_dense();
    const at::Tensor rounded = dense ? params[i] : at::empty_like(params[i]);
    const at::Tensor laid = in_layout_of(values[i], rounded, at::kFloat);
    const uint32_t seed = static_cast<uint32_t>(seeds[i]);
    const uint32_t step = static_cast<uint32_t>(static_cast<int64_t>(count_of(steps[i])));
    const float* from = laid.const_data_ptr<float>();
    if (rounded.scalar_type() == at::kBFloat16) {
      round_all(from, rounded.data_ptr<at::BFloat16>(), laid.numel(), seed, step);
    } else {
      round_all(from, rounded.data_ptr<at::Half>(), laid.numel(), seed, step);
    }
    if (!dense) params[i].copy_(rounded);
  }
}

}  // namespace
}  // namespace CPU_CAPABILITY

TORCH_LIBRARY_IMPL(gls_fused, CPU, m) { m.impl("round_params_", &round_params_); }

}  // namespace gls_fused
