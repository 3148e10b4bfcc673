// nn.Linear whose backward applies P to its rows: Linear of gls_fused/capture/linear.py in C++, where
// a call costs a few microseconds instead of tens.

#include "capture.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <algorithm>
#include <cmath>
#include <limits>
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
                           const std::optional<Tensor>& new_shift) {
  basis = new_basis.value_or(Tensor());
  core_inverse = new_core_inverse.value_or(Tensor());
  shift = new_shift.value_or(Tensor());
}

namespace {

bool has_hooks(const Tensor& param) {
  if (torch::autograd::impl::get_autograd_meta(param) == nullptr) return false;
  return !torch::autograd::impl::hooks(param).empty() ||
         torch::autograd::impl::post_acc_grad_hooks(param) != nullptr;
}

// Whether torch.func transforms what runs, forward-mode differentiation or a torch function mode is
// on, or torch.jit traces.
bool is_transformed() {
  using c10::DispatchKey, c10::impl::tls_is_dispatch_key_included;
  return tls_is_dispatch_key_included(DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         tls_is_dispatch_key_included(DispatchKey::FuncTorchDynamicLayerBackMode) ||
         torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr ||
         at::impl::PythonTorchFunctionTLS::stack_len() != 0 || torch::jit::tracer::isTracing();
}

}  // namespace

bool LinearCapture::lets_through(const Tensor& inputs, const Tensor& own,
                                 const std::optional<Tensor>& own_bias) const {
  if (!at_backward() || !at::GradMode::is_enabled() || !own.requires_grad()) return false;
  if (own.scalar_type() != dtype || own.device() != basis.device()) return false;
  if (has_hooks(own) || (own_bias && has_hooks(*own_bias))) return false;
  return inputs.layout() == at::kStrided && !inputs.is_nested() &&
         !at::autocast::is_autocast_enabled(inputs.device().type()) && !is_transformed();
}

namespace {

// Some entries of a tensor on the CPU, after those that are there.
void read_entries(const Tensor& tensor, const std::vector<int64_t>& places,
                  std::vector<double>& found) {
  // Contiguous as a rule, and then read where it is.
  const Tensor flat = tensor.is_contiguous() ? tensor : tensor.detach().contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, flat.scalar_type(), "read_entries", [&] {
        const scalar_t* data = flat.const_data_ptr<scalar_t>();
        for (const int64_t place : places) found.push_back(static_cast<double>(data[place]));
      });
}

// Those of a weight, then those of its bias, zeros where it has none.
std::vector<double> read_both(const LinearCapture& capture, const Tensor& weight,
                              const std::optional<Tensor>& bias) {
  std::vector<double> found;
  found.reserve(capture.places.size() + capture.bias_places.size());
  read_entries(weight, capture.places, found);
  if (bias.has_value() && bias->defined()) read_entries(*bias, capture.bias_places, found);
  found.resize(capture.places.size() + capture.bias_places.size());
  return found;
}

double epsilon_of(at::ScalarType dtype) {
  double epsilon = 0;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "epsilon_of", [&] {
    epsilon = static_cast<double>(std::numeric_limits<scalar_t>::epsilon());
  });
  return epsilon;
}

double epsilon_of_both(const Tensor& weight, const std::optional<Tensor>& bias) {
  const double epsilon = epsilon_of(weight.scalar_type());
  const bool has_bias = bias.has_value() && bias->defined();
  return has_bias ? std::max(epsilon, epsilon_of(bias->scalar_type())) : epsilon;
}

bool any_nonzero(const std::vector<double>& values) {
  return std::any_of(values.begin(), values.end(), [](double value) { return value != 0; });
}

}  // namespace

void LinearCapture::clear_marks() {
  parts = 0;
  epsilon = 0;
  sums.clear();
  sizes.clear();
}

void LinearCapture::add_marks(const Tensor& part, const std::optional<Tensor>& bias_part) {
  const std::vector<double> found = read_both(*this, part, bias_part);
  sums.resize(found.size());
  sizes.resize(found.size());
  for (size_t i = 0; i < found.size(); ++i) {
    sums[i] += found[i];
    sizes[i] += std::abs(found[i]);
  }
  ++parts;
  epsilon = std::max(epsilon, epsilon_of_both(part, bias_part));
}

bool LinearCapture::match(const Tensor& gradient,
                          const std::optional<Tensor>& bias_gradient) const {
  const std::vector<double> found = read_both(*this, gradient, bias_gradient);
  const double scale = *std::max_element(sizes.begin(), sizes.end());
  if (scale == 0) return !any_nonzero(found);
  // At a scale of one, so that no square overflows or is lost.
  double product = 0, square = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    product += found[i] * (sums[i] / scale);
    square += (sums[i] / scale) * (sums[i] / scale);
  }
  const double factor = square > 0 ? product / square : 0;
  double difference = 0, size = 0;
  bool finite = true;
  for (size_t i = 0; i < found.size(); ++i) {
    finite = finite && std::isfinite(found[i]);
    difference = std::max(difference, std::abs(found[i] - factor * (sums[i] / scale)));
    size = std::max(size, std::abs(factor) * (sizes[i] / scale) + std::abs(found[i]));
  }
  // Each part, and the sum, is rounded to its dtype or the gradient's, and scaled a few times.
  const double widest = std::max(epsilon, epsilon_of_both(gradient, bias_gradient));
  const double rounding = (4 + 2 * parts) * widest;
  return !finite || !(difference > rounding * size);
}

bool LinearCapture::are_gone_from(const Tensor& gradient) const {
  const auto end = sums.begin() + std::min(sums.size(), places.size());
  // Of rows with few inputs they may all be zero.
  if (!any_nonzero({sums.begin(), end})) return !gradient.any().item<bool>();
  std::vector<double> found;
  read_entries(gradient, places, found);
  return !any_nonzero(found);
}

void LinearCapture::forget_dropped(const Tensor& gradient) {
  if (!has_marks()) return;
  if (!gradient.defined() || are_gone_from(gradient)) clear_marks();
}

namespace {

enum class Reach { kNothing, kGradient, kCaptured };

// Where the gradient of a parameter is accumulated, of a weight that is it or, under autocast, came
// from it. The parameter is not kept elsewhere, as torch swaps none that others refer to.
auto accumulator_of(const Tensor& weight) {
  auto node = torch::autograd::impl::gradient_edge(weight).function;
  while (node != nullptr && node->num_outputs() > 0) {
    auto next = node->next_edge(0).function;
    node = std::move(next);
  }
  return node;
}

// Where the running backward pass takes the gradient of a parameter: reach_of of
// gls_fused/capture/graph.py, by torch's own tables.
Reach reach_of(torch::autograd::Node* accumulator) {
  if (accumulator == nullptr) return Reach::kNothing;
  const auto* info = torch::autograd::get_current_graph_task_exec_info();
  // Empty where every leaf's gradient is accumulated.
  if (info == nullptr || info->empty()) return Reach::kGradient;
  const auto found = info->find(accumulator);
  if (found == info->end() || !found->second.should_execute()) return Reach::kNothing;
  return found->second.captures_ != nullptr ? Reach::kCaptured : Reach::kGradient;
}

// Weight and bias as they are, on whose gradients P acts: Observed of gls_fused/capture/observed.py.
// A second derivative reaches the weight through it.
struct ObservedWeight : torch::autograd::Function<ObservedWeight> {
  static variable_list forward(AutogradContext* ctx, const Tensor& weight,
                               const std::optional<Tensor>& bias,
                               const c10::intrusive_ptr<LinearCapture>& capture) {
    ctx->saved_data["capture"] = c10::IValue::make_capsule(capture);
    ctx->save_for_backward({weight});
    // Autograd takes no undefined tensor, in or out.
    if (!bias.has_value()) return {weight.detach()};
    return {weight.detach(), bias->detach()};
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients);
};

// What a backward pass asks first: whether P applies to a gradient of the weight.
bool applies_to(LinearCapture& capture, const Tensor& weight) {
  const auto accumulator = accumulator_of(weight);
  const Reach reach = reach_of(accumulator.get());
  const int64_t task = torch::autograd::get_current_graph_task_id();
  if (task != capture.task) {
    capture.task = task;
    if (reach == Reach::kGradient) {
      const auto* leaf = dynamic_cast<torch::autograd::AccumulateGrad*>(accumulator.get());
      if (leaf != nullptr) capture.forget_dropped(leaf->variable.grad());
    }
  }
  if (capture.at_backward() && at::GradMode::is_enabled()) {
    TORCH_CHECK(!capture.promised, "layer '", capture.name,
                "': a backward with create_graph=True would differentiate through the "
                "preconditioned gradient; use GLS(..., site=\"step\")");
    capture.leave();
  }
  // Who asks torch.autograd.grad for the gradient gets the gradient.
  return capture.at_backward() && (capture.promised || reach == Reach::kGradient);
}

variable_list ObservedWeight::backward(AutogradContext* ctx, variable_list gradients) {
  const auto capture = c10::static_intrusive_pointer_cast<LinearCapture>(
      ctx->saved_data["capture"].toCapsule());
  Tensor weight_gradient = gradients[0];
  const bool has_bias = gradients.size() > 1;
  Tensor bias_gradient = has_bias ? gradients[1] : Tensor();
  if (!ctx->needs_input_grad(0) || !weight_gradient.defined()) {
    return {weight_gradient, bias_gradient, Tensor()};
  }
  if (applies_to(*capture, ctx->get_saved_variables()[0])) {
    const bool with_bias = capture->ones && has_bias && ctx->needs_input_grad(1);
    std::optional<Tensor> plain;
    if (with_bias) {
      plain = bias_gradient.defined()
                  ? bias_gradient
                  : at::zeros({weight_gradient.size(0)}, weight_gradient.options());
    }
    const Tensor basis =
        with_bias ? capture->basis : capture->basis.narrow(0, 0, weight_gradient.size(1));
    Tensor last;
    std::tie(weight_gradient, last) = precondition_gradient(
        weight_gradient, plain, basis, capture->core_inverse, capture->shift);
    if (with_bias) bias_gradient = last;
    capture->deposit(weight_gradient, with_bias ? std::optional(last) : std::nullopt);
  }
  return {weight_gradient, bias_gradient, Tensor()};
}

struct CapturedLinear : torch::autograd::Function<CapturedLinear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& inputs, const Tensor& weight,
                        const std::optional<Tensor>& bias,
                        const c10::intrusive_ptr<LinearCapture>& capture) {
    // As torch's own op: who needs no gradient of the inputs may change the weight meanwhile, and the
    // bias whoever likes. They are asked for their nodes alone then. What is kept is the memory that the
    // weight has now, which somebody may swap for another.
    ctx->save_for_backward({inputs, inputs.requires_grad() ? weight.detach() : Tensor()});
    ctx->saved_data["weight"] = weight;
    ctx->saved_data["bias"] = bias;
    ctx->saved_data["capture"] = c10::IValue::make_capsule(capture);
    const Tensor outputs = at::linear(inputs, weight, bias);
    // A view made in here could not be modified in place, as ReLU(inplace=True) does.
    return outputs.is_view() ? at::_unsafe_view(outputs, outputs.sizes()) : outputs;
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const Tensor& output_gradient = gradients[0];
    const auto saved = ctx->get_saved_variables();
    const Tensor &inputs = saved[0], weight = ctx->saved_data["weight"].toTensor();
    const std::optional<Tensor> bias = ctx->saved_data["bias"].toOptional<Tensor>();
    const auto capture = c10::static_intrusive_pointer_cast<LinearCapture>(
        ctx->saved_data["capture"].toCapsule());
    const Tensor gradient = output_gradient.reshape({-1, weight.size(0)});
    // Without a bias autograd has no third edge to ask about.
    const bool needs_bias = bias.has_value() && ctx->needs_input_grad(2);
    const bool needs_weight = ctx->needs_input_grad(1);
    const bool applies = needs_weight && applies_to(*capture, weight);

    Tensor input_gradient, weight_gradient, bias_gradient;
    if (ctx->needs_input_grad(0)) {
      // A second derivative reaches the weight itself.
      Tensor factor = at::GradMode::is_enabled() ? weight : saved[1];
      if (at::GradMode::is_enabled() && weight.requires_grad() && capture->at_backward()) {
        const bool owned = capture->ones && bias.has_value() && bias->requires_grad();
        factor = ObservedWeight::apply(weight, owned ? bias : std::nullopt, capture)[0];
      }
      input_gradient = at::matmul(output_gradient, factor);
    }
    if (!needs_weight) {
      if (needs_bias) bias_gradient = gradient.sum(0);
      return {input_gradient, Tensor(), bias_gradient, Tensor()};
    }
    const Tensor rows = inputs.reshape({-1, weight.size(1)});
    if (!applies) {
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
      // As Rows.weight_gradient does, and why.
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
    capture->deposit(weight_gradient, ones ? std::optional(bias_gradient) : std::nullopt);
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
