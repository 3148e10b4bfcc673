// What a captured nn.Linear at the backward site and an optimizer exchange; see capture.cpp.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <functional>
#include <optional>
#include <string>

namespace gls_fused {

struct LinearCapture : torch::CustomClassHolder {
  std::string name;
  bool ones = false;      // the layer has a bias, so a one belongs to every row
  bool promised = false;  // the user asked for D in .grad, which then is not checked
  at::Tensor places;      // of the entries of D that are remembered, int64
  std::function<void()> leave;  // makes D in .grad the gradient again, and forgets P here

  at::Tensor basis;         // U; undefined where P does not apply
  at::Tensor core_inverse;
  at::Tensor shift;
  at::Tensor marks;         // sums over the parts of D in .grad: of their entries, of absolute ones
  int64_t parts = 0;        // how many
  int64_t task = -1;        // the backward pass that was here last

  // P as it applies from here on, or nothing.
  void expect(const std::optional<at::Tensor>& basis, const std::optional<at::Tensor>& core_inverse,
              const std::optional<at::Tensor>& shift);
  // Marks and parts, which are then forgotten.
  std::pair<std::optional<at::Tensor>, int64_t> take_marks();

  bool at_backward() const { return basis.defined(); }
  // Forget what an earlier backward pass left in the weight's gradient, if it was cleared since.
  void forget_dropped(const at::Tensor& gradient);
  void deposit(const at::Tensor& direction);
};

at::Tensor captured_linear(const at::Tensor& inputs, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias,
                           const c10::intrusive_ptr<LinearCapture>& capture);

}  // namespace gls_fused
