// What the sums of a step change of the layers' estimates, before their bases move: on the CPU, of
// all layers in one call, as the small ops of a layer took longer than their arithmetic.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../check.h"
#include "products.h"
#include "subspace.h"

namespace gls_fused {
inline namespace CPU_CAPABILITY {

using at::Tensor;

namespace {

// Columns that one thread takes at a time; a multiple of any vector.
constexpr int64_t kPanel = 512;
}  // namespace

// See gls_fused.reference.blend_subspace.
template <typename T>
void blend(const Estimate<T>& from, double beta, T* sketch, T* core, T* trace, T* samples) {
  const auto [d, r, basis, old, before, rows, sums] = from;
  const T count = sums[0], n = std::max(count, T(1));
  const T weight = count > 0 ? T(1 - beta) : T(0), kept = 1 - weight;
  *trace = before * kept + sums[1] / n * weight;
  *samples = weight > 0 ? 1 / (kept * kept / rows + weight * weight / n) : rows;
  const T shift = *trace / (kShift * std::max<int64_t>(1, d));
  const T *gram = sums + 2, *moment = gram + r * r;
  std::vector<T> weights(r * r);
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < r; ++j) {
      weights[i * r + j] = old[i * r + j] * kept;
      core[i * r + j] = weights[i * r + j] + gram[i * r + j] / n * weight + (i == j ? shift : T(0));
    }
  }
  const int64_t panels = (d + kPanel - 1) / kPanel;
  // Below four panels waking another thread takes longer than it saves.
  at::parallel_for(0, panels, panels < 4 ? 4 : 1, [&](int64_t begin, int64_t end) {
    std::vector<char> seen(kPanel);
    for (int64_t first = begin * kPanel; first < std::min(d, end * kPanel); first += kPanel) {
      const int64_t size = std::min(kPanel, d - first);
      sum_rows<T>(moment + first, d, weight / n, {weights.data(), r, 1}, r, basis + first, d, r,
                  size, sketch + first, d);
      std::fill(seen.begin(), seen.end(), 0);
      for (int64_t i = 0; i < r; ++i) {
        const T* row = sketch + i * d + first;
        for (int64_t j = 0; j < size; ++j) seen[j] |= row[j] != 0;
      }
      for (int64_t i = 0; i < r; ++i) {
        const T* unit = basis + i * d + first;
        T* row = sketch + i * d + first;
        for (int64_t j = 0; j < size; ++j) row[j] += seen[j] ? shift * unit[j] : T(0);
      }
    }
  });
}

template void blend(const Estimate<float>&, double, float*, float*, float*, float*);
template void blend(const Estimate<double>&, double, double*, double*, double*, double*);

namespace {

std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>>
blend_subspaces(at::TensorList bases, at::TensorList cores, at::TensorList traces,
                at::TensorList samples, at::TensorList sums, double beta) {
  check_blend(bases, cores, traces, samples, sums);
  std::vector<Tensor> sketches, moved, means, rows;
  for (size_t i = 0; i < bases.size(); ++i) {
    const Tensor basis = bases[i].t().contiguous(), core = cores[i].contiguous();
    const Tensor sum = sums[i].contiguous();
    const int64_t r = basis.size(0), d = basis.size(1);
    const auto options = core.options();
    Tensor sketch = at::empty({r, d}, options), next = at::empty({r, r}, options);
    Tensor mean = at::empty({}, options), row = at::empty({}, options);
    AT_DISPATCH_FLOATING_TYPES(core.scalar_type(), "blend_subspaces", [&] {
      const Estimate<scalar_t> from{d,
                                    r,
                                    basis.const_data_ptr<scalar_t>(),
                                    core.const_data_ptr<scalar_t>(),
                                    *traces[i].const_data_ptr<scalar_t>(),
                                    *samples[i].const_data_ptr<scalar_t>(),
                                    sum.const_data_ptr<scalar_t>()};
      blend(from, beta, sketch.data_ptr<scalar_t>(), next.data_ptr<scalar_t>(),
            mean.data_ptr<scalar_t>(), row.data_ptr<scalar_t>());
    });
    sketches.push_back(sketch.t());
    moved.push_back(next);
    means.push_back(mean);
    rows.push_back(row);
  }
  return {sketches, moved, means, rows};
}

}  // namespace
}  // namespace CPU_CAPABILITY

TORCH_LIBRARY_IMPL(gls_fused, CPU, m) { m.impl("blend_subspaces", &blend_subspaces); }

}  // namespace gls_fused
