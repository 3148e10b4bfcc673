// Ops that the capture calls without going through the dispatcher; see composite.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace gls_fused {

std::tuple<at::Tensor, at::Tensor> precondition_rows(const at::Tensor& rows,
                                                     const at::Tensor& basis,
                                                     const at::Tensor& core_inverse,
                                                     const at::Tensor& shift, bool ones);

std::tuple<at::Tensor, at::Tensor> precondition_gradient(
    const at::Tensor& weight_gradient, const std::optional<at::Tensor>& bias_gradient,
    const at::Tensor& basis, const at::Tensor& core_inverse, const at::Tensor& shift);

void sketch_rows_out(const at::Tensor& rows, const at::Tensor& basis, bool ones, at::Tensor& core,
                     at::Tensor& sketch, at::Tensor& trace);

}  // namespace gls_fused
