// What a captured nn.Linear at the backward site and an optimizer exchange; see capture.cpp.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace gls_fused {

struct LinearCapture : torch::CustomClassHolder {
  std::string name;
  bool ones = false;      // the layer has a bias, so a one belongs to every row
  bool promised = false;  // the user asked for D in .grad, which then is not checked
  std::vector<int64_t> places;  // of the entries of D that are remembered
  std::vector<int64_t> bias_places;  // and of the bias's part of D
  std::function<void()> leave;  // makes D in .grad the gradient again, and forgets P here

  at::Tensor basis;         // U; undefined where P does not apply
  at::Tensor core_inverse;
  at::Tensor shift;
  // Python's objects of the parameters whose calls need not ask Python, and the weight's dtype; see
  // `call_captured`. The layer keeps them, and nobody here: torch swaps no tensor that others refer to.
  const void *weight = nullptr, *bias = nullptr;
  at::ScalarType dtype = at::kFloat;
  // Over the parts of D in .grad: sums of their entries, of absolute ones, and how many they are.
  std::vector<double> sums, sizes;
  int64_t parts = 0;
  // The largest of the parts' dtypes.
  double epsilon = 0;
  int64_t task = -1;        // the backward pass that was here last

  // P as it applies from here on, or nothing.
  void expect(const std::optional<at::Tensor>& basis, const std::optional<at::Tensor>& core_inverse,
              const std::optional<at::Tensor>& shift);
  // Whether nothing is on that Python would ask about in a call with the layer's own parameters: what
  // Layer.watches, Layer.forward and LinearLayer.precondition ask, at once.
  bool lets_through(const at::Tensor& inputs, const at::Tensor& weight,
                    const std::optional<at::Tensor>& bias) const;
  // Marks of gls_fused/capture/marks.py.
  bool has_marks() const { return parts > 0; }
  void clear_marks();
  void add_marks(const at::Tensor& part, const std::optional<at::Tensor>& bias_part);
  bool match(const at::Tensor& gradient, const std::optional<at::Tensor>& bias_gradient) const;
  bool are_gone_from(const at::Tensor& gradient) const;

  bool at_backward() const { return basis.defined(); }
  // Forget what an earlier backward pass left in the weight's gradient, if it was cleared since.
  void forget_dropped(const at::Tensor& gradient);
  void deposit(const at::Tensor& direction, const std::optional<at::Tensor>& bias_direction) {
    if (!promised) add_marks(direction, bias_direction);
  }
};

at::Tensor captured_linear(const at::Tensor& inputs, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias,
                           const c10::intrusive_ptr<LinearCapture>& capture);

}  // namespace gls_fused
