// update_layers_ on CUDA devices, in a fixed number of launches as long as its tables hold all
// layers: see update.cuh and tile_update.cuh for what each moves, plan.h for the tables.
//
//   D given      (square_flat_kernel,) finish_layers_kernel, update_flat_kernel
//   D formed     project_kernel, (square_tiles_kernel,) finish_layers_kernel, update_tiles_kernel
//
// Those in brackets for "rms" and "sgd" only. "row" and "factored" have kernels of their own, whether
// D is given or formed: (project_kernel,) square_axes_kernel, blend_axes_kernel, update_axes_kernel.
// No host synchronisation.

#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "../check.h"
#include "../versions.h"
#include "plan.h"
#include "projection.h"

namespace gls_fused::cuda {
namespace {

using at::Tensor;

// Of what is read, and of what is written.
const void* source_of(const Tensor& tensor) { return tensor.const_data_ptr(); }
void* target_of(const Tensor& tensor) { return tensor.mutable_data_ptr(); }

// A parameter's arrays as flat memory, laid out alike; copies stand in for those that are not.
struct FlatArrays {
  Tensor param, direction, gradient, exp_avg, exp_avg_sq;
};

// All arguments of one call, and what it launches.
class Update {
 public:
  Update(at::TensorList params, at::TensorList gradients, at::TensorList exp_avgs,
         at::TensorList exp_avg_sqs, const std::optional<Tensor>& rates, Normalize normalize,
         at::IntArrayRef layer_sizes)
      : params_(params),
        gradients_(gradients),
        exp_avgs_(exp_avgs),
        exp_avg_sqs_(exp_avg_sqs),
        rates_(rates ? rates->contiguous() : Tensor()),
        normalize_(normalize),
        layer_sizes_(layer_sizes),
        type_(params[0].scalar_type()),
        state_type_(at::toOpMathType(type_)),
        plan_(dtype_of(type_)) {}

  // P of a layer, or none where its gradients are directions.
  void add_layer(size_t layer, size_t first, const Tensor& step, const std::optional<Tensor>& basis,
                 const std::optional<Tensor>& core_inverse, const std::optional<Tensor>& shift) {
    const size_t size = layer_sizes_[layer];
    const bool rms = normalize_ == Normalize::kRms;
    plan_.add_layer(target_of(step), rms ? target_of(exp_avg_sqs_[layer]) : nullptr,
                    rates_.defined() ? source_of(rates_[layer]) : nullptr);
    const bool by_axis = normalize_ == Normalize::kRow || normalize_ == Normalize::kFactored;
    if (basis && is_tiled(first, size, *basis)) {
      std::optional<Tensor> bias;
      if (size == 2) bias = gradients_[first + 1];
      projections_.push_back(
          make_projection(gradients_[first].flatten(1), bias, *basis, *core_inverse, false));
      const Product& product = projections_.back().product;
      if (by_axis) {
        add_axes(layer, first, {&gradients_[first], size}, &product, shift->const_data_ptr<float>());
      } else {
        plan_.add_tiles(product, arrays_of(first), size == 2 ? arrays_of(first + 1) : TileArrays{},
                        shift->const_data_ptr<float>());
      }
      return;
    }
    std::vector<Tensor> directions(&gradients_[first], &gradients_[first] + size);
    if (basis) {
      const std::optional<Tensor> bias = size == 2 ? std::optional(directions[1]) : std::nullopt;
      const auto [product, last] =
          multiply_inverse(directions[0].flatten(1), bias, *basis, *core_inverse, *shift);
      directions[0] = product.view(directions[0].sizes());
      if (bias) directions[1] = last;
    }
    if (by_axis) {
      add_axes(layer, first, directions, nullptr, nullptr);
      return;
    }
    for (size_t i = 0; i < size; ++i) add_flat(first + i, directions[i]);
  }

  void run(const FinishOptions& options) {
    const auto bytes = params_[0].options().dtype(at::kByte);
    const Tensor squares = at::empty({plan_.count_squares() * int64_t(sizeof(double2))}, bytes);
    const Tensor sums = at::empty({plan_.count_axis_sums()}, bytes.dtype(state_type_));
    const Tensor steps = at::empty({int64_t(layer_sizes_.size() * sizeof(LayerStep))}, bytes);
    plan_.launch(options, static_cast<double2*>(target_of(squares)), target_of(sums),
                 static_cast<LayerStep*>(target_of(steps)), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    for (const auto& [target, copy] : copies_) target.copy_(copy);
  }

 private:
  bool is_tiled(size_t first, size_t size, const Tensor& basis) const {
    if (!has_kernels(basis) || type_ == at::kDouble || params_[first].numel() == 0) return false;
    for (size_t i = first; i < first + size; ++i) {
      const bool plain = params_[i].is_contiguous() && gradients_[i].is_contiguous() &&
                         gradients_[i].scalar_type() == type_ &&
                         (exp_avgs_.empty() || is_plain_state(exp_avgs_[i])) &&
                         (normalize_ != Normalize::kAdam || is_plain_state(exp_avg_sqs_[i]));
      if (!plain) return false;
    }
    return true;
  }

  bool is_plain_state(const Tensor& state) const {
    return state.is_contiguous() && state.scalar_type() == state_type_;
  }

  TileArrays arrays_of(size_t i) const {
    return {target_of(params_[i]), source_of(gradients_[i]),
            exp_avgs_.empty() ? nullptr : target_of(exp_avgs_[i]),
            normalize_ == Normalize::kAdam ? target_of(exp_avg_sqs_[i]) : nullptr};
  }

  // `directions`: D; D0, where a product is given.
  void add_axes(size_t layer, size_t first, at::TensorList directions, const Product* product,
                const float* shift) {
    AxisLayer axes{};
    axes.weight = axis_arrays_of(first, directions[0]);
    if (directions.size() == 2) axes.bias = axis_arrays_of(first + 1, directions[1]);
    axes.n = params_[first].size(0);
    // Of a weight without rows no quotient.
    axes.size = 1;
    for (const int64_t extent : params_[first].sizes().slice(1)) axes.size *= extent;
    const bool factored = normalize_ == Normalize::kFactored;
    const size_t square = factored ? 2 * layer : layer;
    axes.rows = written(exp_avg_sqs_[square], state_type_);
    if (factored) axes.columns = written(exp_avg_sqs_[square + 1], state_type_);
    plan_.add_axes(axes, product, shift);
  }

  AxisArrays axis_arrays_of(size_t i, const Tensor& direction) {
    const Tensor read = direction.to(type_).contiguous();
    copied_.push_back(read);
    return {written(params_[i], type_), source_of(read),
            exp_avgs_.empty() ? nullptr : written(exp_avgs_[i], state_type_)};
  }

  // The memory of a tensor in the order of its indices, or of a copy, whose numbers it takes on.
  void* written(const Tensor& tensor, at::ScalarType type) {
    if (tensor.is_contiguous() && tensor.scalar_type() == type) return target_of(tensor);
    const Tensor copy = at::empty(tensor.sizes(), tensor.options().dtype(type));
    copy.copy_(tensor);
    write_back(tensor, copy);
    return target_of(copy);
  }

  void add_flat(size_t i, const Tensor& direction) {
    FlatArrays arrays;
    arrays.param = params_[i].is_non_overlapping_and_dense() ? params_[i] : params_[i].contiguous();
    const Tensor& like = arrays.param;
    arrays.direction = in_layout_of(direction, like, type_);
    FlatTensor tensor{};
    tensor.param = target_of(arrays.param);
    tensor.direction = source_of(arrays.direction);
    tensor.numel = like.numel();
    write_back(params_[i], arrays.param);
    if (normalize_ == Normalize::kSgd) {
      arrays.gradient = in_layout_of(gradients_[i], like, type_);
      tensor.gradient = source_of(arrays.gradient);
    }
    if (!exp_avgs_.empty()) {
      arrays.exp_avg = in_layout_of(exp_avgs_[i], like, state_type_);
      tensor.exp_avg = target_of(arrays.exp_avg);
      write_back(exp_avgs_[i], arrays.exp_avg);
    }
    if (normalize_ == Normalize::kAdam) {
      arrays.exp_avg_sq = in_layout_of(exp_avg_sqs_[i], like, state_type_);
      tensor.exp_avg_sq = target_of(arrays.exp_avg_sq);
      write_back(exp_avg_sqs_[i], arrays.exp_avg_sq);
    }
    kept_.push_back(std::move(arrays));
    plan_.add_flat(tensor);
  }

  void write_back(const Tensor& target, const Tensor& copy) {
    if (!copy.is_same(target)) copies_.emplace_back(target, copy);
  }

  at::TensorList params_, gradients_, exp_avgs_, exp_avg_sqs_;
  Tensor rates_;  // contiguous, bound and growth of each layer
  Normalize normalize_;
  at::IntArrayRef layer_sizes_;
  at::ScalarType type_, state_type_;
  UpdatePlan plan_;
  // Tables know addresses only, so their tensors are kept until all is launched.
  std::vector<Projection> projections_;
  std::vector<FlatArrays> kept_;
  std::vector<Tensor> copied_;
  std::vector<std::pair<Tensor, Tensor>> copies_;
};

Scale scale_of(Normalize normalize) {
  switch (normalize) {
    case Normalize::kRms: return Scale::kRootMeanSquare;
    case Normalize::kSgd: return Scale::kGradientNorm;
    case Normalize::kRow: return Scale::kRow;
    case Normalize::kFactored: return Scale::kFactored;
    default: return Scale::kNone;
  }
}

const void* scalar_address(const Tensor& beside, const std::optional<Tensor>& scalar,
                           bool& is_double) {
  if (!scalar) return nullptr;
  check_device("update_layers_", beside, *scalar);
  is_double = scalar->scalar_type() == at::kDouble;
  return scalar->const_data_ptr();
}

void update_layers_(at::TensorList params, at::TensorList gradients, at::TensorList exp_avgs,
                    at::TensorList exp_avg_sqs, at::TensorList steps,
                    const OptionalTensors& bases, const OptionalTensors& core_inverses,
                    const OptionalTensors& shifts, at::IntArrayRef layer_sizes,
                    c10::string_view normalize_name, double lr, double momentum, double beta2,
                    double eps, double weight_decay, const std::optional<Tensor>& lr_tensor,
                    const std::optional<Tensor>& grad_scale,
                    const std::optional<Tensor>& found_inf,
                    const std::optional<Tensor>& rates) {
  if (params.empty()) return;
  const std::vector<size_t> layer_of =
      check_update(params, gradients, exp_avgs, exp_avg_sqs, steps, bases, core_inverses, shifts,
                   layer_sizes, normalize_name, momentum, rates);
  advance_versions({params, exp_avgs, exp_avg_sqs, steps});
  check_scalar("lr_tensor", lr_tensor);
  check_scalar("grad_scale", grad_scale);
  check_scalar("found_inf", found_inf);
  const at::ScalarType step_type = steps[0].scalar_type();
  for (const Tensor& step : steps) {
    TORCH_CHECK(step.scalar_type() == step_type &&
                    (step_type == at::kFloat || step_type == at::kDouble),
                "update_layers_: expected steps all of Float or all of Double, got ",
                step.scalar_type());
  }
  const c10::cuda::CUDAGuard guard(params[0].device());
  const Normalize normalize = parse_normalize(normalize_name);
  FinishOptions options{};
  options.scale = scale_of(normalize);
  options.double_steps = step_type == at::kDouble;
  options.double_state = params[0].scalar_type() == at::kDouble;
  options.lr = lr;
  options.weight_decay = weight_decay;
  options.decays = {momentum, beta2, eps};
  if (lr_tensor && lr_tensor->device().is_cpu()) {
    options.lr = lr_tensor->item<double>();
  } else {
    options.lr_address = scalar_address(params[0], lr_tensor, options.double_lr);
  }
  options.grad_scale = scalar_address(params[0], grad_scale, options.double_grad_scale);
  options.found_inf = scalar_address(params[0], found_inf, options.double_found_inf);
  options.double_rates = rates && rates->scalar_type() == at::kDouble;

  Update update(params, gradients, exp_avgs, exp_avg_sqs, rates, normalize, layer_sizes);
  for (size_t i = 0; i < params.size(); i += layer_sizes[layer_of[i]]) {
    const size_t layer = layer_of[i];
    update.add_layer(layer, i, steps[layer], bases.get(layer), core_inverses.get(layer),
                     shifts.get(layer));
  }
  update.run(options);
}

}  // namespace

TORCH_LIBRARY_IMPL(gls_fused, CUDA, m) { m.impl("update_layers_", &update_layers_); }

}  // namespace gls_fused::cuda
