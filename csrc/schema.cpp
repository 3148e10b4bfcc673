// The one schema of every native op; kernels register themselves per device in files of their own.
// gls_fused/backends/native.py gives them the names and signatures of gls_fused.reference.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "check.h"

namespace {

using at::Tensor;
using Lists = std::tuple<std::vector<Tensor>, std::vector<Tensor>>;

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// One layer after the other, where a device has no kernel for some at once.

Lists refresh_subspaces(at::TensorList cores, at::TensorList sketches) {
  static const auto op = find_op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&)>(
      "gls_fused::refresh_subspace");
  TORCH_CHECK(cores.size() == sketches.size(), "refresh_subspaces: expected ", cores.size(),
              " sketches, got ", sketches.size());
  Lists results;
  for (size_t i = 0; i < cores.size(); ++i) {
    const auto [basis, core] = op.call(cores[i], sketches[i]);
    std::get<0>(results).push_back(basis);
    std::get<1>(results).push_back(core);
  }
  return results;
}

Lists invert_cores(at::TensorList cores, at::TensorList traces, at::IntArrayRef dims,
                   double damping, double power, at::TensorList samples) {
  using Rows = std::optional<Tensor>;
  static const auto op =
      find_op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, int64_t, double, double,
                                         const Rows&)>("gls_fused::invert_core");
  gls_fused::check_cores(cores, traces, dims, samples);
  Lists results;
  for (size_t i = 0; i < cores.size(); ++i) {
    const Rows rows = samples.empty() ? Rows() : Rows(samples[i]);
    const auto [core_inverse, shift] = op.call(cores[i], traces[i], dims[i], damping, power, rows);
    std::get<0>(results).push_back(core_inverse);
    std::get<1>(results).push_back(shift);
  }
  return results;
}

}  // namespace

TORCH_LIBRARY(gls_fused, m) {
  // Without a column of ones the second result is empty.
  m.def(
      "precondition_rows(Tensor rows, Tensor basis, Tensor core_inverse, Tensor shift, bool ones)"
      " -> (Tensor, Tensor)");
  m.def(
      "precondition_gradient(Tensor weight_gradient, Tensor? bias_gradient, Tensor basis,"
      " Tensor core_inverse, Tensor shift) -> (Tensor, Tensor)");
  m.def("sketch_rows(Tensor rows, Tensor basis, bool ones) -> (Tensor, Tensor, Tensor)");
  // The patches [n, c kh kw] at outputs `places` of a convolution, numbered as [N, groups, oh, ow].
  m.def(
      "take_patches(Tensor images, int[] kernel_size, int[] stride, int[] padding, int[] dilation,"
      " int[]? output_padding, int groups, Tensor places) -> Tensor");
  m.def("refresh_subspace(Tensor core, Tensor sketch) -> (Tensor, Tensor)");
  m.def(
      "invert_core(Tensor core, Tensor trace, int dim, float damping, float power=1,"
      " Tensor? samples=None) -> (Tensor, Tensor)");
  m.def(
      "blend_subspaces(Tensor[] bases, Tensor[] cores, Tensor[] traces, Tensor[] samples,"
      " Tensor[] sums, float beta) -> (Tensor[], Tensor[], Tensor[], Tensor[])");
  m.def("refresh_subspaces(Tensor[] cores, Tensor[] sketches) -> (Tensor[], Tensor[])");
  // `samples` of all layers, or of none.
  m.def(
      "invert_cores(Tensor[] cores, Tensor[] traces, int[] dims, float damping, float power,"
      " Tensor[] samples) -> (Tensor[], Tensor[])");
  // These three in place, less mu: of each layer's sums, which count only if one of the next
  // gradient_counts[i] gradients, where there are any, is not zero.
  m.def(
      "commit_subspaces_(Tensor(a!)[] bases, Tensor(b!)[] cores, Tensor(c!)[] traces,"
      " Tensor(d!)[] samples, Tensor(e!)[] core_inverses, Tensor(f!)[] shifts, Tensor[] sums,"
      " Tensor[] gradients, int[] gradient_counts, float beta, float damping, float power) -> ()");
  // [n, ||A||_F^2, Y'Y, (A'Y)'] of some rows, added to the sums of a step where they are usable.
  m.def("add_sketch_(Tensor rows, Tensor basis, bool ones, Tensor(a!) sums) -> ()");
  // A length times the orthogonal factor of each matrix [m, k], or of each of `split` matrices of as
  // many rows, with three coefficients a step.
  m.def(
      "orthogonalize_each(Tensor[] matrices, float[] lengths, int split, float[] coefficients) "
      "-> Tensor[]");
  // Before and after them. Layers and their inverses are as below; lr_bounds: the most that a
  // layer's lr may be.
  m.def(
      "blend_directions_(Tensor(a!)[] params, Tensor[] gradients, Tensor(b!)[] exp_avgs,"
      " Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, Tensor?[] bases, Tensor?[] core_inverses,"
      " Tensor?[] shifts, int[] layer_sizes, float lr, float momentum, float beta2, float eps,"
      " float weight_decay, Tensor? lr_bounds) -> Tensor[]");
  m.def(
      "move_weights_(Tensor(a!)[] weights, Tensor[] updates, float lr, float weight_decay,"
      " Tensor? lr_bounds) -> ()");
  // The root mean square of each weight, at least `least`.
  m.def("measure_weights_(Tensor[] weights, Tensor(a!)[] results, float[] least) -> ()");
  // How much the mean squares of some layers have grown, over averages of more steps.
  m.def(
      "measure_growths_(Tensor[] squares, Tensor(a!)[] growths, Tensor(b!)[] slows, Tensor[] steps,"
      " float beta2, int every, float most) -> ()");
  m.def("round_params_(Tensor(a!)[] params, Tensor[] values, int[] seeds, Tensor[] steps) -> ()");
  // layer_sizes[i] consecutive params, gradients and exp_avgs belong to layer i, whose inverse is
  // the i-th of bases, core_inverses and shifts; None where gradients holds the directions.
  // lr_tensor stands for lr; gradients are divided by grad_scale; where found_inf is not 0 no step
  // is taken. All three are read on the device, as are rates, the most that a layer's rate may be,
  // and how many times lr it is below that.
  m.def(
      "update_layers_(Tensor(a!)[] params, Tensor[] gradients, Tensor(b!)[] exp_avgs,"
      " Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, Tensor?[] bases, Tensor?[] core_inverses,"
      " Tensor?[] shifts, int[] layer_sizes, str normalize, float lr, float momentum, float beta2,"
      " float eps, float weight_decay, Tensor? lr_tensor=None, Tensor? grad_scale=None,"
      " Tensor? found_inf=None, Tensor? rates=None) -> ()");
}

TORCH_LIBRARY_IMPL(gls_fused, CompositeExplicitAutograd, m) {
  m.impl("refresh_subspaces", &refresh_subspaces);
  m.impl("invert_cores", &invert_cores);
}
