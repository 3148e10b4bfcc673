// What step() asks in every step of all tensors that it knows, which takes longer than the update of small
// layers when Python asks them one by one.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <vector>

#include "capture.h"

namespace gls_fused {

// Whether a dict of dicts holds these very objects: its values, then theirs, in their order. None is
// touched, so that the caches need not have them.
bool holds(const pybind11::dict& states, const pybind11::list& known);

// Whether one of the gradients is sparse.
bool has_sparse_gradient(const std::vector<at::Tensor>& params);

// Whether a parameter that does not train has a gradient.
bool has_frozen_gradient(const std::vector<at::Tensor>& params);

// Whether the gradients of each weight and of its bias, if any, are what the backward has left there.
bool match_all(const std::vector<c10::intrusive_ptr<LinearCapture>>& captures,
               const std::vector<at::Tensor>& weights,
               const std::vector<std::optional<at::Tensor>>& biases);

}  // namespace gls_fused
