// Root mean squares of weights, and growths of mean squares, of all layers in one call, on the CPU.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "../check.h"
#include "../versions.h"
#include "products.h"
#include "steps.h"
#include "threads.h"

namespace gls_fused {
inline namespace CPU_CAPABILITY {

using at::Tensor;

namespace {

double squares_of(const Tensor& x, int64_t begin, int64_t end) {
  double found = 0;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "measure", [&] {
    found = sum_squares_as<at::opmath_type<scalar_t>>(x.const_data_ptr<scalar_t>() + begin,
                                                      end - begin);
  });
  return found;
}

// results[i] = max(rms(weights[i]), least[i])
void measure_weights_(at::TensorList weights, at::TensorList results, at::ArrayRef<double> least) {
  check_measured(weights, results, least);
  advance_versions({results});
  // In the order of memory, whatever the axes.
  std::vector<Tensor> flat;
  std::vector<std::pair<size_t, int64_t>> chunks;  // a weight, and where in it
  for (size_t i = 0; i < weights.size(); ++i) {
    flat.push_back(weights[i].is_non_overlapping_and_dense() ? weights[i] : weights[i].contiguous());
    for (int64_t begin = 0; begin < weights[i].numel(); begin += kChunk) {
      chunks.emplace_back(i, begin);
    }
  }
  // Added up in the order of the chunks, so that the result does not depend on the number of threads.
  std::vector<double> partial(chunks.size()), totals(weights.size(), 0);
  share(0, chunks.size(), grain(chunks.size()), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const auto [weight, begin] = chunks[i];
      partial[i] = squares_of(flat[weight], begin, std::min(flat[weight].numel(), begin + kChunk));
    }
  });
  for (size_t i = 0; i < chunks.size(); ++i) totals[chunks[i].first] += partial[i];
  for (size_t i = 0; i < weights.size(); ++i) {
    const double rms = std::sqrt(totals[i] / std::max<int64_t>(1, weights[i].numel()));
    // Not std::max: what is not a number must be seen.
    const double found = rms < least[i] ? least[i] : rms;
    if (results[i].scalar_type() == at::kFloat) {
      *results[i].data_ptr<float>() = static_cast<float>(found);
    } else {
      *results[i].data_ptr<double>() = found;
    }
  }
}

// Decay of the averages that are compared with; SLOW_BETA of the reference.
constexpr double kSlowBeta = 0.999;

// The mean of mean squares: of one number, of one for each output or, for "adam", for each element.
template <typename T>
double mean_of(const Tensor& squares) {
  const Tensor flat = squares.is_non_overlapping_and_dense() ? squares : squares.contiguous();
  const T* from = flat.const_data_ptr<T>();
  const int64_t count = flat.numel();
  // Lanes that one instruction adds to.
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int lane = 0; lane < 8; ++lane) lanes[lane] += from[i + lane];
  }
  for (; i < count; ++i) lanes[0] += from[i];
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return sum / std::max<int64_t>(1, count);
}

template <typename T>
void measure_growth(const Tensor& squares, const Tensor& growth, const Tensor& slow, double step,
                    double beta2, int64_t every, double most) {
  // 1 - decay^steps, without the rounding of that difference.
  const auto share = [](double decay, double steps) {
    return decay == 0 ? 1 : -std::expm1(steps * std::log(decay));
  };
  constexpr double tiny = std::numeric_limits<T>::min();
  const double recent = mean_of<T>(squares) / share(beta2, step);
  const double weight = share(kSlowBeta, double(every)) / share(kSlowBeta, step);
  T& kept = *slow.data_ptr<T>();
  const bool known = weight < 1 && kept > 0;
  kept = static_cast<T>(known ? kept + weight * (recent - kept) : recent);
  const double found = std::sqrt(static_cast<T>(recent) / std::max<double>(kept, tiny));
  // Of mean squares beyond the dtype nothing is known.
  *growth.data_ptr<T>() =
      static_cast<T>(std::isnan(found) ? 1 : std::min(std::max(found, 1.0), most));
}

void measure_growths_(at::TensorList squares, at::TensorList growths, at::TensorList slows,
                      at::TensorList steps, double beta2, int64_t every, double most) {
  check_growths(squares, growths, slows, steps);
  advance_versions({growths, slows});
  for (size_t i = 0; i < squares.size(); ++i) {
    const double step = count_of(steps[i]);
    if (step <= 1) continue;
    AT_DISPATCH_FLOATING_TYPES(squares[i].scalar_type(), "measure_growths_", [&] {
      measure_growth<scalar_t>(squares[i], growths[i], slows[i], step, beta2, every, most);
    });
  }
}

}  // namespace
}  // namespace CPU_CAPABILITY

TORCH_LIBRARY_IMPL(gls_fused, CPU, m) {
  m.impl("measure_weights_", &measure_weights_);
  m.impl("measure_growths_", &measure_growths_);
}

}  // namespace gls_fused
