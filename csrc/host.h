// What step() asks in every step of all tensors that it knows, which takes longer than the update of small
// layers when Python asks them one by one.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <vector>

#include "capture.h"

namespace gls_fused {

// Whether a dict of dicts holds these very objects: its values, then theirs, in their order. None is
// touched, so that the caches need not have them.
bool holds(const pybind11::dict& states, const pybind11::list& known);

// Whether one of the gradients is sparse.
bool has_sparse_gradient(const std::vector<at::Tensor>& params);

// Whether the gradient of each weight is what the backward has left there.
bool match_all(const std::vector<c10::intrusive_ptr<LinearCapture>>& captures,
               const std::vector<at::Tensor>& weights);

}  // namespace gls_fused
