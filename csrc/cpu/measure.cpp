// Root mean squares of weights, of all layers in one call, on the CPU.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
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

}  // namespace
}  // namespace CPU_CAPABILITY

TORCH_LIBRARY_IMPL(gls_fused, CPU, m) { m.impl("measure_weights_", &measure_weights_); }

}  // namespace gls_fused
