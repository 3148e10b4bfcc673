// The end of a gathering step for all layers at once, on the CPU: the sums are blended in, the bases move
// and P is made anew, in place. Threads share the layers, the largest first; a single one's they share.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/count_nonzero.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "../check.h"
#include "../versions.h"
#include "subspace.h"

namespace gls_fused {
inline namespace CPU_CAPABILITY {

using at::Tensor;

namespace {

// Whether any element is not zero, which the first ones tell most often.
bool is_nonzero(const Tensor& x) {
  if (!x.is_non_overlapping_and_dense()) return x.count_nonzero().item<int64_t>() != 0;
  bool found = false;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, x.scalar_type(), "is_nonzero", [&] {
        const scalar_t* data = x.const_data_ptr<scalar_t>();
        found = std::any_of(data, data + x.numel(), [](scalar_t value) { return value != 0; });
      });
  return found;
}

// Where a layer's state lies; U as [r, d].
template <typename T>
struct State {
  int64_t d, r;
  T *basis, *core, *trace, *samples, *core_inverse, *shift;
  const T* sums;
  bool counts;

  void commit(double beta, double damping, double power) const {
    // Over no row the basis would move by rounding, which adds up.
    if (counts && sums[0] > 0) move(beta);
    damp(core, *trace, *samples, r, d, damping, power, core_inverse, shift);
  }

  void move(double beta) const {
    std::vector<T> sketch(r * d), blended(r * r);
    blend<T>({d, r, basis, core, *trace, *samples, sums}, beta, sketch.data(), blended.data(), trace,
             samples);
    refresh(sketch.data(), blended.data(), r, d, basis, core);
    // Where the basis was completed by directions of no sketch there is no mu.
    const T added = *trace / (kShift * std::max<int64_t>(1, d));
    for (int64_t i = 0; i < r; ++i) core[i * r + i] -= std::min(core[i * r + i], added);
  }
};

void commit_subspaces_(at::TensorList bases, at::TensorList cores, at::TensorList traces,
                       at::TensorList samples, at::TensorList core_inverses,
                       at::TensorList shifts, at::TensorList sums, at::TensorList gradients,
                       at::IntArrayRef gradient_counts, double beta, double damping,
                       double power) {
  if (bases.empty()) return;
  check_commit(bases, cores, traces, samples, core_inverses, shifts, sums, gradients,
               gradient_counts);
  check_power(power);
  advance_versions({bases, cores, traces, samples, core_inverses, shifts});
  const int64_t layers = bases.size();
  std::vector<char> counts(layers);
  for (int64_t layer = 0, first = 0; layer < layers; first += gradient_counts[layer++]) {
    const at::TensorList mine = gradients.slice(first, gradient_counts[layer]);
    counts[layer] = mine.empty() || std::any_of(mine.begin(), mine.end(), is_nonzero);
  }
  std::vector<int64_t> order(layers);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t left, int64_t right) {
    return bases[left].numel() * bases[left].size(1) > bases[right].numel() * bases[right].size(1);
  });
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), layers), 1, [&](int64_t, int64_t) {
    for (int64_t place = next++; place < layers; place = next++) {
      const int64_t i = order[place];
      const Tensor own = sums[i].contiguous();
      AT_DISPATCH_FLOATING_TYPES(own.scalar_type(), "commit_subspaces_", [&] {
        State<scalar_t>{bases[i].size(0),
                        bases[i].size(1),
                        bases[i].data_ptr<scalar_t>(),
                        cores[i].data_ptr<scalar_t>(),
                        traces[i].data_ptr<scalar_t>(),
                        samples[i].data_ptr<scalar_t>(),
                        core_inverses[i].data_ptr<scalar_t>(),
                        shifts[i].data_ptr<scalar_t>(),
                        own.const_data_ptr<scalar_t>(),
                        counts[i] != 0}
            .commit(beta, damping, power);
      });
    }
  });
}

}  // namespace
}  // namespace CPU_CAPABILITY

TORCH_LIBRARY_IMPL(gls_fused, CPU, m) { m.impl("commit_subspaces_", &commit_subspaces_); }

}  // namespace gls_fused
