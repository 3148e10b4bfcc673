// One element's step, and the numbers of a layer's, shared by the updates that are given D and those
// that form it.
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

// The parameter after its step along `direction` over the root of `square`, which is v^; the average
// is updated in place.
template <bool kMomentum, typename W>
__device__ inline W step_scaled(W param, W direction, W& exp_avg, W square, const Rates<W>& rates) {
  direction *= rates.scale;
  W average = direction;
  if constexpr (kMomentum) {
    exp_avg += (direction - exp_avg) * rates.average;
    average = exp_avg;
  }
  average *= 1 / (std::sqrt(square) + rates.eps);
  return param * rates.decayed - rates.rate * average;
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
    // Not by their difference, in which a square far below the average is lost.
    exp_avg_sq -= exp_avg_sq * rates.square;
    exp_avg_sq += direction * direction * rates.square;
    average *= 1 / (std::sqrt(exp_avg_sq * rates.correction) + rates.eps);
  }
  return param * rates.decayed - rates.rate * average;
}

__device__ inline double load_number(const void* address, bool is_double, int at = 0) {
  return is_double ? static_cast<const double*>(address)[at]
                   : static_cast<const float*>(address)[at];
}

// `number` rounded to what memory holds, which is what the other backends go on with.
__device__ inline double store_number(void* address, bool is_double, double number) {
  if (is_double) {
    *static_cast<double*>(address) = number;
    return number;
  }
  return *static_cast<float*>(address) = float(number);
}

__device__ inline bool is_taken(const FinishOptions& options) {
  return !(options.found_inf && load_number(options.found_inf, options.double_found_inf) != 0);
}

__device__ inline double gradient_scale(const FinishOptions& options) {
  return options.grad_scale ? 1 / load_number(options.grad_scale, options.double_grad_scale) : 1;
}

// A layer counts its step and gets its numbers, `rate` before its scale. One thread comes here;
// false where the step is not taken.
__device__ inline bool start_step(void* step, const void* rates, const FinishOptions& options,
                                  LayerStep& out) {
  out.taken = is_taken(options) ? 1 : 0;
  if (out.taken == 0) return false;
  const double lr =
      options.lr_address ? load_number(options.lr_address, options.double_lr) : options.lr;
  const double count = load_number(step, options.double_steps) + 1;
  store_number(step, options.double_steps, count);
  out.decayed = 1 - lr * options.weight_decay;
  out.scale = gradient_scale(options);
  out.correction = 1 / (1 - pow(options.decays.beta2, count));
  double rate = lr;
  if (rates) {
    const double bound = load_number(rates, options.double_rates);
    rate *= load_number(rates, options.double_rates, 1);
    // A bound that is not a number must reach the parameters.
    if (!(bound >= rate)) rate = bound;
  }
  out.rate = rate / (1 - pow(options.decays.momentum, count));
  return true;
}

}  // namespace gls_fused::cuda
