// What a captured nn.Linear and an optimizer exchange; see capture.cpp.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <optional>
#include <string>

namespace gls_fused {

struct LinearCapture : torch::CustomClassHolder {
  std::string name;
  bool ones = false;         // the layer has a bias, so a one belongs to every row
  int64_t most_rows = 1;     // of one backward pass that are sketched; each then stands for several
  bool gathers = false;      // the rows of this step enter the sums
  bool at_backward = false;  // P applies in the backward
  at::Tensor basis;          // U, or the test matrix before there is an inverse
  at::Tensor core_inverse;   // undefined before there is an inverse
  at::Tensor shift;
  at::Tensor sums;  // [n, ||A||_F^2, Y'Y, (A'Y)'] of this step; undefined before the first rows

  // What the coming step asks of the layer.
  void expect(const std::optional<at::Tensor>& basis, const std::optional<at::Tensor>& core_inverse,
              const std::optional<at::Tensor>& shift, bool gathers, bool at_backward);
  void gather(const at::Tensor& rows);
  // The sums of this step, which are then forgotten.
  std::optional<at::Tensor> take_sums();
};

at::Tensor captured_linear(const at::Tensor& inputs, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias,
                           const c10::intrusive_ptr<LinearCapture>& capture);

}  // namespace gls_fused
