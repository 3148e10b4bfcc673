// X P for the rows of a matrix, on the CPU; see rows.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "../check.h"

namespace gls_fused {
inline namespace CPU_CAPABILITY {

// X [n, k] times P = I / shift + U C U', into `product` [n, k] and `last` [n], all of the basis'
// dtype and the last two contiguous. X has one more column where U has one more row than X
// columns: `extra` [n], or ones where that is not given.
struct InverseProduct {
  at::Tensor x;
  std::optional<at::Tensor> extra;
  at::Tensor basis, core_inverse, shift;
  at::Tensor product, last;
};

// All of one dtype.
void multiply_inverses(const std::vector<InverseProduct>& products);

// D = D0 P of every layer that has a P, in the gradients' place and dtype: of layer_sizes[i]
// consecutive gradients, a weight's and maybe a bias's, by the i-th of bases, core_inverses, shifts.
void precondition_layers(std::vector<at::Tensor>& gradients, at::IntArrayRef layer_sizes,
                         const OptionalTensors& bases, const OptionalTensors& core_inverses,
                         const OptionalTensors& shifts);

}  // namespace CPU_CAPABILITY
}  // namespace gls_fused
