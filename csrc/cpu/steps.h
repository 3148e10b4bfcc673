// What the updates of all layers at once share.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

namespace gls_fused {
inline namespace CPU_CAPABILITY {

// 128 KiB of float32: short enough to share, and whatever is no longer is not worth a thread.
constexpr int64_t kChunk = 32768;

// Another thread is woken for a second chunk that is whole, not for a handful of biases.
inline int64_t grain(int64_t chunks) { return chunks < 8 ? std::max<int64_t>(chunks, 1) : 1; }

// Steps are counted in float32 in every state of ours: read and written without a call of torch's,
// which takes longer than the update of a small layer.
inline double count_of(const at::Tensor& step) {
  const bool usual = step.scalar_type() == at::kFloat;
  return usual ? *step.const_data_ptr<float>() : step.item<double>();
}

inline void advance(const at::Tensor& step) {
  if (step.scalar_type() == at::kFloat) {
    *step.data_ptr<float>() += 1;
  } else {
    step.add_(1);
  }
}

// v <- beta2 v + (1 - beta2) mean(D^2), held in the dtype of the state, as the other backends do. Not by
// their difference, in which a mean that has fallen far below v is lost.
template <typename T>
T blend_square(T square, double mean, double beta2) {
  return square * static_cast<T>(beta2) + static_cast<T>(mean) * static_cast<T>(1 - beta2);
}

// Not std::min: a bound that is not a number must reach the parameters.
inline double at_most(double rate, double bound) { return rate < bound ? rate : bound; }

// min(lr, bound) of each layer.
inline std::vector<double> bounded(double lr, const std::optional<at::Tensor>& bounds,
                                   size_t layers) {
  std::vector<double> lrs(layers, lr);
  if (!bounds) return lrs;
  const at::Tensor wide = bounds->to(at::kDouble).contiguous();
  const double* bound = wide.const_data_ptr<double>();
  for (double& rate : lrs) rate = at_most(lr, *bound++);
  return lrs;
}

// min(growth lr, bound) of each layer, from bound and growth of each.
inline std::vector<double> rates_within(double lr, const std::optional<at::Tensor>& rates,
                                        size_t layers) {
  std::vector<double> lrs(layers, lr);
  if (!rates) return lrs;
  const at::Tensor wide = rates->to(at::kDouble).contiguous();
  const double* own = wide.const_data_ptr<double>();
  for (double& rate : lrs) {
    rate = at_most(lr * own[1], own[0]);
    own += 2;
  }
  return lrs;
}

}  // namespace CPU_CAPABILITY
}  // namespace gls_fused
