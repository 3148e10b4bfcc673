// nn.Linear whose backward shows the layer its rows: Linear of gls_fused/rows.py in C++, where a
// call costs a few microseconds instead of tens.

#include "capture.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include <tuple>
#include <utility>

namespace gls_fused {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

std::tuple<Tensor, Tensor> precondition_rows(const Tensor& rows, const Tensor& basis,
                                             const Tensor& core_inverse, const Tensor& shift,
                                             bool ones) {
  static const auto op = find_op<std::tuple<Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, bool)>(
      "gls_fused::precondition_rows");
  return op.call(rows, basis, core_inverse, shift, ones);
}

std::tuple<Tensor, Tensor> precondition_gradient(const Tensor& weight_gradient,
                                                 const std::optional<Tensor>& bias_gradient,
                                                 const Tensor& basis, const Tensor& core_inverse,
                                                 const Tensor& shift) {
  static const auto op = find_op<std::tuple<Tensor, Tensor>(
      const Tensor&, const std::optional<Tensor>&, const Tensor&, const Tensor&, const Tensor&)>(
      "gls_fused::precondition_gradient");
  return op.call(weight_gradient, bias_gradient, basis, core_inverse, shift);
}

}  // namespace

void LinearCapture::expect(const std::optional<Tensor>& new_basis,
                           const std::optional<Tensor>& new_core_inverse,
                           const std::optional<Tensor>& new_shift, bool new_gathers,
                           bool new_at_backward) {
  basis = new_basis.value_or(Tensor());
  core_inverse = new_core_inverse.value_or(Tensor());
  shift = new_shift.value_or(Tensor());
  gathers = new_gathers;
  at_backward = new_at_backward;
}

std::optional<Tensor> LinearCapture::take_sums() {
  if (!sums.defined()) return std::nullopt;
  return std::exchange(sums, Tensor());
}

void LinearCapture::gather(const Tensor& rows) {
  if (rows.numel() == 0) return;
  const at::NoGradGuard no_grad;
  static const auto op =
      find_op<void(const Tensor&, const Tensor&, bool, Tensor&)>("gls_fused::add_sketch_");
  if (!sums.defined()) {
    sums = at::zeros({2 + basis.size(1) * basis.size(1) + basis.numel()}, basis.options());
  }
  const int64_t n = rows.size(0), every = (n + most_rows - 1) / most_rows;
  if (every == 1) {
    op.call(rows, basis, ones, sums);
    return;
  }
  Tensor part = at::zeros_like(sums);
  op.call(rows.slice(0, 0, n, every), basis, ones, part);
  sums.add_(part, every);
}

namespace {

struct CapturedLinear : torch::autograd::Function<CapturedLinear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& inputs, const Tensor& weight,
                        const std::optional<Tensor>& bias,
                        const c10::intrusive_ptr<LinearCapture>& capture) {
    ctx->save_for_backward({inputs, weight});
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["capture"] = c10::IValue::make_capsule(capture);
    const Tensor outputs = at::linear(inputs, weight, bias);
    // A view made in here could not be modified in place, as ReLU(inplace=True) does.
    return outputs.is_view() ? at::_unsafe_view(outputs, outputs.sizes()) : outputs;
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const Tensor& output_gradient = gradients[0];
    const auto saved = ctx->get_saved_variables();
    const Tensor &inputs = saved[0], &weight = saved[1];
    const auto capture = c10::static_intrusive_pointer_cast<LinearCapture>(
        ctx->saved_data["capture"].toCapsule());
    const Tensor gradient = output_gradient.reshape({-1, weight.size(0)});
    // Without a bias autograd has no third edge to ask about.
    const bool needs_bias =
        ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2);

    Tensor input_gradient, weight_gradient, bias_gradient;
    if (ctx->needs_input_grad(0)) input_gradient = at::matmul(output_gradient, weight);
    if (!ctx->needs_input_grad(1)) {
      if (needs_bias) bias_gradient = gradient.sum(0);
      return {input_gradient, Tensor(), bias_gradient, Tensor()};
    }
    const Tensor rows = inputs.reshape({-1, weight.size(1)});
    TORCH_CHECK(!(capture->at_backward && at::GradMode::is_enabled()), "layer '", capture->name,
                "': a backward with create_graph=True would differentiate through the "
                "preconditioned gradient; use site=\"step\"");
    if (capture->gathers) capture->gather(rows);

    if (!capture->at_backward) {
      weight_gradient = at::mm(gradient.t(), rows);
      if (needs_bias) bias_gradient = gradient.sum(0);
      return {input_gradient, weight_gradient, bias_gradient, Tensor()};
    }
    // A frozen bias has no gradient: its column of A P, and with it its row of U, is left out.
    const bool ones = capture->ones && needs_bias;
    const Tensor basis =
        ones ? capture->basis : capture->basis.narrow(0, 0, weight.size(1));
    Tensor core_inverse = capture->core_inverse, shift = capture->shift, factor = gradient.t();
    if (rows.scalar_type() == at::kHalf) {
      // As LinearRows.weight_gradient does, and why.
      shift = shift.sqrt();
      core_inverse = core_inverse * shift;
      factor = (factor / shift.unsqueeze(0)).to(at::kHalf);
    }
    if (rows.size(0) <= weight.size(0)) {
      const auto [product, last] = precondition_rows(rows, basis, core_inverse, shift, ones);
      weight_gradient = at::mm(factor, product);
      if (ones) bias_gradient = at::mv(factor, last);
    } else {
      // Fewer outputs than rows: by linearity, P is cheaper on this call's gradient.
      std::optional<Tensor> plain;
      if (ones) plain = factor.sum(1);
      std::tie(weight_gradient, bias_gradient) =
          precondition_gradient(at::mm(factor, rows), plain, basis, core_inverse, shift);
    }
    if (!ones) bias_gradient = needs_bias ? gradient.sum(0) : Tensor();
    return {input_gradient, weight_gradient, bias_gradient, Tensor()};
  }
};

}  // namespace

Tensor captured_linear(const Tensor& inputs, const Tensor& weight,
                       const std::optional<Tensor>& bias,
                       const c10::intrusive_ptr<LinearCapture>& capture) {
  return CapturedLinear::apply(inputs, weight, bias, capture);
}

}  // namespace gls_fused
