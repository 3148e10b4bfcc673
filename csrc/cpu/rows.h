// X P for the rows of a matrix, on the CPU; see rows.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace gls_fused {
inline namespace CPU_CAPABILITY {

// X [n, k] times P = I / shift + U C U', into `product` [n, k] and `last` [n], all of the basis'
// dtype and the first two contiguous. X has one more column where U has one more row than X
// columns: `extra` [n], or ones where that is not given.
void multiply_inverse(const at::Tensor& x, const std::optional<at::Tensor>& extra,
                      const at::Tensor& basis, const at::Tensor& core_inverse,
                      const at::Tensor& shift, at::Tensor& product, at::Tensor& last);

}  // namespace CPU_CAPABILITY
}  // namespace gls_fused
