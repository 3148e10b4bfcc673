// invert_core, refresh_subspace and the same of some layers at once, on CUDA devices.
// Ranks beyond the kernels', and float64 bases, are left to gls_fused.reference by native.py.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../check.h"
#include "plan.h"

namespace gls_fused::cuda {
namespace {

using at::Tensor;
using Lists = std::tuple<std::vector<Tensor>, std::vector<Tensor>>;

// 4 p.
int quarters_of(double power) {
  const int quarters = power >= 0 && power <= 1 ? int(4 * power) : 0;
  TORCH_CHECK(quarters > 0 && 4 * power == quarters,
              "invert_core: expected power 1, 0.75, 0.5 or 0.25, got ", power);
  return quarters;
}

int64_t most_rank(bool is_double, int quarters) {
  if (quarters == 4) return is_double ? kMaxDoubleCoreRank : kMaxCoreRank;
  return is_double ? kMaxDoubleRootRank : kMaxRootRank;
}

Lists invert_cores(at::TensorList cores, at::TensorList traces, at::IntArrayRef dims,
                   double damping, double power, at::TensorList samples) {
  check_cores(cores, traces, dims, samples);
  const at::ScalarType type = cores[0].scalar_type();
  const bool is_double = type == at::kDouble;
  const int quarters = quarters_of(power);
  const int64_t most = most_rank(is_double, quarters);
  for (size_t i = 0; i < cores.size(); ++i) {
    check_device("invert_cores", cores[0], cores[i]);
    const auto rows = samples.empty() ? std::optional<Tensor>() : samples[i];
    check_core(cores[i], traces[i], dims[i], rows);
    TORCH_CHECK(cores[i].scalar_type() == type, "invert_cores: expected cores of ", type,
                ", got ", cores[i].scalar_type());
    TORCH_CHECK(cores[i].size(0) <= most, "invert_core: expected core [r, r] with r at most ",
                most, " on CUDA for power ", power, ", got ", cores[i].sizes());
  }
  const c10::cuda::CUDAGuard guard(cores[0].device());
  Lists results;
  auto& [inverses, shifts] = results;
  std::vector<Tensor> kept;
  CorePlan plan(damping);
  for (size_t i = 0; i < cores.size(); ++i) {
    kept.push_back(cores[i].contiguous());
    inverses.push_back(at::empty(cores[i].sizes(), cores[i].options()));
    shifts.push_back(at::empty({}, cores[i].options()));
    CoreLayer layer{};
    layer.core = kept.back().const_data_ptr();
    layer.trace = traces[i].const_data_ptr();
    layer.core_inverse = inverses.back().mutable_data_ptr();
    layer.shift = shifts.back().mutable_data_ptr();
    layer.dim = dims[i];
    layer.samples = samples.empty() ? nullptr : samples[i].const_data_ptr();
    layer.rank = int32_t(cores[i].size(0));
    plan.add(layer);
  }
  C10_CUDA_CHECK(plan.launch(is_double, quarters, c10::cuda::getCurrentCUDAStream()));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return results;
}

std::tuple<Tensor, Tensor> invert_core(const Tensor& core, const Tensor& trace, int64_t dim,
                                       double damping, double power,
                                       const std::optional<Tensor>& samples) {
  const auto rows = samples ? at::TensorList(*samples) : at::TensorList();
  const auto [inverses, shifts] = invert_cores({core}, {trace}, {dim}, damping, power, rows);
  return {inverses[0], shifts[0]};
}

Lists refresh_subspaces(at::TensorList cores, at::TensorList sketches) {
  TORCH_CHECK(cores.size() == sketches.size(), "refresh_subspaces: expected ", cores.size(),
              " sketches, got ", sketches.size());
  for (size_t i = 0; i < cores.size(); ++i) {
    check_device("refresh_subspaces", cores[0], cores[i]);
    check_refresh(cores[i], sketches[i]);
    TORCH_CHECK(cores[i].scalar_type() == at::kFloat && cores[i].size(0) <= kMaxRank,
                "refresh_subspace: expected core [r, r] of Float with r at most ", kMaxRank,
                " on CUDA, got ", cores[i].sizes(), " of ", cores[i].scalar_type());
  }
  const c10::cuda::CUDAGuard guard(cores[0].device());
  Lists results;
  auto& [bases, moved] = results;
  std::vector<Tensor> kept;
  MovePlan plan;
  for (size_t i = 0; i < cores.size(); ++i) {
    const Tensor sketch = sketches[i].t().contiguous(), core = cores[i].contiguous();
    const Tensor basis = at::empty_like(sketch), rough = at::empty_like(sketch);
    bases.push_back(basis.t());
    moved.push_back(at::empty_like(core));
    // Nothing to move, and no launch of no blocks.
    if (sketch.numel() == 0) continue;
    const int64_t rank = sketch.size(0), dim = sketch.size(1);
    const auto wide = core.options().dtype(at::kDouble);
    const Tensor parts = at::empty({int64_t(move_blocks(dim)), rank, rank}, wide);
    const Tensor triangles = at::empty({3, rank, rank}, wide);
    kept.insert(kept.end(), {sketch, core, rough, parts, triangles});
    Move move{};
    move.sketch = sketch.const_data_ptr<float>();
    move.core = core.const_data_ptr<float>();
    move.rough = rough.mutable_data_ptr<float>();
    move.basis = basis.mutable_data_ptr<float>();
    move.core_out = moved.back().mutable_data_ptr<float>();
    move.parts = parts.mutable_data_ptr<double>();
    move.triangles = triangles.mutable_data_ptr<double>();
    move.dim = dim;
    move.rank = int32_t(rank);
    plan.add(move);
  }
  plan.launch(c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return results;
}

std::tuple<Tensor, Tensor> refresh_subspace(const Tensor& core, const Tensor& sketch) {
  const auto [bases, moved] = refresh_subspaces({core}, {sketch});
  return {bases[0], moved[0]};
}

}  // namespace

TORCH_LIBRARY_IMPL(gls_fused, CUDA, m) {
  m.impl("invert_core", &invert_core);
  m.impl("invert_cores", &invert_cores);
  m.impl("refresh_subspace", &refresh_subspace);
  m.impl("refresh_subspaces", &refresh_subspaces);
}

}  // namespace gls_fused::cuda
