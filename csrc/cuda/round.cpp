// round_params_ on CUDA devices.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <deque>
#include <vector>

#include "../check.h"
#include "plan.h"
#include "projection.h"

namespace gls_fused::cuda {
namespace {

using at::Tensor;

void round_params_(at::TensorList params, at::TensorList values, at::IntArrayRef seeds,
                   at::TensorList steps) {
  if (params.empty()) return;
  check_rounded(params, values, seeds, steps);
  const c10::cuda::CUDAGuard guard(params[0].device());
  std::deque<RoundTable> tables;
  // Tables know addresses only.
  std::vector<Tensor> written, kept;
  for (size_t i = 0; i < params.size(); ++i) {
    // As the parameter lies in memory, whose elements the draws are numbered by.
    const bool dense = params[i].is_non_overlapping_and_dense();
    written.push_back(dense ? params[i] : at::empty_like(params[i]));
    kept.push_back(in_layout_of(values[i], written.back(), at::kFloat));
    Rounded entry{};
    entry.param = written.back().mutable_data_ptr();
    entry.values = kept.back().const_data_ptr<float>();
    entry.step = steps[i].const_data_ptr();
    entry.numel = params[i].numel();
    entry.seed = uint32_t(seeds[i]);
    entry.double_step = steps[i].scalar_type() == at::kDouble;
    if (entry.numel > 0) append(tables, entry, divide_up(entry.numel, kRoundElements));
  }
  const Dtype dtype = dtype_of(params[0].scalar_type());
  for (const RoundTable& table : tables) {
    launch_round(table, dtype, c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  for (size_t i = 0; i < params.size(); ++i) {
    if (!written[i].is_same(params[i])) params[i].copy_(written[i]);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(gls_fused, CUDA, m) { m.impl("round_params_", &round_params_); }

}  // namespace gls_fused::cuda
