#include "host.h"

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>

namespace gls_fused {

namespace py = pybind11;

void let_through(const c10::intrusive_ptr<LinearCapture>& capture, const py::object& weight,
                 const py::object& bias) {
  capture->weight = weight.is_none() ? nullptr : weight.ptr();
  capture->bias = bias.ptr();
  if (!weight.is_none()) capture->dtype = py::cast<at::Tensor>(weight).scalar_type();
}

py::object call_captured(const c10::intrusive_ptr<LinearCapture>& capture, const py::dict& params,
                         const py::object& inputs) {
  static PyObject* const names[] = {PyUnicode_InternFromString("weight"),
                                    PyUnicode_InternFromString("bias")};
  PyObject* weight = PyDict_GetItem(params.ptr(), names[0]);
  PyObject* bias = PyDict_GetItem(params.ptr(), names[1]);
  const bool own = weight != nullptr && weight == capture->weight && bias == capture->bias;
  // Inputs of no subclass, whose ops may be others.
  if (!own || !THPVariable_CheckExact(inputs.ptr())) return py::none();
  const at::Tensor rows = THPVariable_Unpack(inputs.ptr()), matrix = THPVariable_Unpack(weight);
  std::optional<at::Tensor> added;
  if (bias != Py_None) added = THPVariable_Unpack(bias);
  if (!capture->lets_through(rows, matrix, added)) return py::none();
  at::Tensor outputs;
  {
    const py::gil_scoped_release unlocked;
    outputs = captured_linear(rows, matrix, added, capture);
  }
  return py::cast(outputs);
}

bool holds(const py::dict& states, const py::list& known) {
  const Py_ssize_t count = PyList_GET_SIZE(known.ptr());
  Py_ssize_t next = 0, place = 0;
  PyObject *key = nullptr, *value = nullptr;
  const auto is_next = [&](PyObject* object) {
    return next < count && PyList_GET_ITEM(known.ptr(), next++) == object;
  };
  while (PyDict_Next(states.ptr(), &place, &key, &value)) {
    if (!is_next(value) || !PyDict_Check(value)) return false;
  }
  place = 0;
  while (PyDict_Next(states.ptr(), &place, &key, &value)) {
    PyObject *name = nullptr, *held = nullptr;
    Py_ssize_t inner = 0;
    while (PyDict_Next(value, &inner, &name, &held)) {
      if (!is_next(held)) return false;
    }
  }
  return next == count;
}

bool has_sparse_gradient(const std::vector<at::Tensor>& params) {
  for (const at::Tensor& param : params) {
    const at::Tensor& gradient = param.grad();
    if (gradient.defined() && gradient.is_sparse()) return true;
  }
  return false;
}

bool has_frozen_gradient(const std::vector<at::Tensor>& params) {
  for (const at::Tensor& param : params) {
    if (!param.requires_grad() && param.grad().defined()) return true;
  }
  return false;
}

bool match_all(const std::vector<c10::intrusive_ptr<LinearCapture>>& captures,
               const std::vector<at::Tensor>& weights,
               const std::vector<std::optional<at::Tensor>>& biases) {
  for (size_t i = 0; i < captures.size(); ++i) {
    const at::Tensor& gradient = weights.at(i).grad();
    std::optional<at::Tensor> bias_gradient;
    if (biases.at(i)) bias_gradient = biases[i]->grad();
    if (!gradient.defined() || !captures[i]->has_marks() ||
        !captures[i]->match(gradient, bias_gradient)) {
      return false;
    }
  }
  return true;
}

}  // namespace gls_fused
