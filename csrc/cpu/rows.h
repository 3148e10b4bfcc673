// D = D0 P of layers, on the CPU; see rows.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../check.h"

namespace gls_fused {
inline namespace CPU_CAPABILITY {

// Whether a matrix lies in memory by columns, as a weight [k, m] does that is seen as [m, k].
inline bool is_turned(const at::Tensor& x) {
  return x.dim() == 2 && !x.is_contiguous() && x.t().is_contiguous();
}

// D = D0 P of every layer that has a P, in the gradients' place and dtype: of layer_sizes[i]
// consecutive gradients, a weight's and maybe a bias's, by the i-th of bases, core_inverses, shifts.
void precondition_layers(std::vector<at::Tensor>& gradients, at::IntArrayRef layer_sizes,
                         const OptionalTensors& bases, const OptionalTensors& core_inverses,
                         const OptionalTensors& shifts);

}  // namespace CPU_CAPABILITY
}  // namespace gls_fused
