// What step() asks in every step of all tensors that it knows, which takes longer than the update of small
// layers when Python asks them one by one.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <vector>

#include "capture.h"

namespace gls_fused {

// Calls with this weight, and this bias or None, need not ask Python from here on; with None for a
// weight all do.
void let_through(const c10::intrusive_ptr<LinearCapture>& capture,
                 const pybind11::object& weight, const pybind11::object& bias);

// The output of a captured nn.Linear with these parameters, by name; None where Python has to look
// first.
pybind11::object call_captured(const c10::intrusive_ptr<LinearCapture>& capture,
                               const pybind11::dict& params, const pybind11::object& inputs);

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
