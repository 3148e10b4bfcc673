// One element's step, shared by the updates that are given D and those that form it.
#pragma once

#include <cmath>

#include "elements.cuh"
#include "update.h"

namespace gls_fused::cuda {

// A layer's numbers in the dtype of the arithmetic.
template <typename W>
struct Rates {
  W decayed, rate, correction, scale, average, square, eps;
};

template <typename W>
__device__ inline Rates<W> make_rates(const LayerStep& step, const Decays& decays) {
  return {W(step.decayed),        W(step.rate),        W(step.correction), W(step.scale),
          W(1 - decays.momentum), W(1 - decays.beta2), W(decays.eps)};
}

// The parameter after its step along `direction`; the averages are updated in place.
template <bool kMomentum, bool kElementwise, typename W>
__device__ inline W step_element(W param, W direction, W& exp_avg, W& exp_avg_sq,
                                 const Rates<W>& rates) {
  direction *= rates.scale;
  W average = direction;
  if constexpr (kMomentum) {
    exp_avg += (direction - exp_avg) * rates.average;
    average = exp_avg;
  }
  if constexpr (kElementwise) {
    exp_avg_sq += (direction * direction - exp_avg_sq) * rates.square;
    average *= 1 / (std::sqrt(exp_avg_sq * rates.correction) + rates.eps);
  }
  return param * rates.decayed - rates.rate * average;
}

}  // namespace gls_fused::cuda
