// precondition_rows and precondition_gradient on CUDA devices.

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "../check.h"
#include "projection.h"

namespace gls_fused::cuda {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor> precondition_rows(const Tensor& rows, const Tensor& basis,
                                             const Tensor& core_inverse, const Tensor& shift,
                                             bool ones) {
  check_matrix("precondition_rows", "rows [n, k]", rows);
  check_inverse("precondition_rows", rows, rows.size(1) + ones, basis, core_inverse, shift);
  const c10::cuda::CUDAGuard guard(rows.device());
  return multiply_inverse(rows, std::nullopt, basis, core_inverse, shift);
}

std::tuple<Tensor, Tensor> precondition_gradient(const Tensor& weight_gradient,
                                                 const std::optional<Tensor>& bias_gradient,
                                                 const Tensor& basis, const Tensor& core_inverse,
                                                 const Tensor& shift) {
  check_gradient(weight_gradient, bias_gradient, basis, core_inverse, shift);
  const c10::cuda::CUDAGuard guard(weight_gradient.device());
  return multiply_inverse(weight_gradient, bias_gradient, basis, core_inverse, shift);
}

}  // namespace

TORCH_LIBRARY_IMPL(gls_fused, CUDA, m) {
  m.impl("precondition_rows", &precondition_rows);
  m.impl("precondition_gradient", &precondition_gradient);
}

}  // namespace gls_fused::cuda
