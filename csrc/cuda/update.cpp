// update_layers_ on CUDA devices, in a fixed number of launches as long as its tables hold all
// layers: see update.cuh and tile_update.cuh for what each moves.
//
//   D given      (square_flat_kernel,) finish_layers_kernel, update_flat_kernel
//   D formed     project_kernel, turn_kernel, (square_tiles_kernel,) finish, update_tiles_kernel
//
// Those in brackets for "rms" and "sgd" only. No host synchronisation.

#include "update.h"

#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../check.h"
#include "projection.h"
#include "tile_update.h"

namespace gls_fused::cuda {
namespace {

using at::Tensor;

// Of what is read, and of what is written.
const void* source_of(const Tensor& tensor) { return tensor.const_data_ptr(); }
void* target_of(const Tensor& tensor) { return tensor.mutable_data_ptr(); }

// Sums of squares of a layer: where they begin, and how many.
struct Slots {
  int64_t first = 0;
  int64_t count = 0;
};

// The parameters whose D is given, in tables.
class FlatPlan {
 public:
  explicit FlatPlan(at::ScalarType type)
      : dtype_(dtype_of(type)), chunk_(chunk_elements(int(c10::elementSize(type)))) {}

  void add(const FlatTensor& tensor, Slots& slots, int64_t& next_slot) {
    if (tensor.numel == 0) return;
    if (tables_.empty() || tables_.back().count == kMaxTensors) {
      tables_.emplace_back();
      first_slots_.push_back(next_slot);
    }
    FlatTable& table = tables_.back();
    FlatTensor& entry = table.entries[table.count++] = tensor;
    const uint32_t blocks = uint32_t((tensor.numel + chunk_ - 1) / chunk_);
    entry.first = table.blocks;
    table.blocks += blocks;
    if (slots.count == 0) slots.first = next_slot;
    slots.count += blocks;
    next_slot += blocks;
  }

  void square(bool both, double2* squares, cudaStream_t stream) const {
    for (size_t i = 0; i < tables_.size(); ++i) {
      launch_square_flat(tables_[i], dtype_, both, squares + first_slots_[i], stream);
    }
  }

  void update(const LayerStep* steps, const Decays& decays, cudaStream_t stream) const {
    for (const FlatTable& table : tables_) {
      launch_update_flat(table, dtype_, steps, decays, stream);
    }
  }

 private:
  Dtype dtype_;
  int64_t chunk_;
  std::vector<FlatTable> tables_;
  std::vector<int64_t> first_slots_;
};

// The layers whose D is formed by the update, in tables; a table is of wide layers or of others.
class TilePlan {
 public:
  explicit TilePlan(at::ScalarType type) : type_(type) {}

  void add(const TileLayer& layer, bool wide, Slots& slots, int64_t& next_slot) {
    const bool half = c10::elementSize(type_) == 2;
    if (tables_.empty() || tables_.back().wide != wide || tables_.back().count == kMaxTiled) {
      tables_.emplace_back();
      tables_.back().wide = wide;
      first_slots_.push_back(next_slot);
    }
    TileTable& table = tables_.back();
    TileLayer& entry = table.entries[table.count++] = layer;
    entry.across = uint32_t((layer.size + tile_columns(half) - 1) / tile_columns(half));
    const uint32_t down = uint32_t((layer.n + tile_rows(half) - 1) / tile_rows(half));
    entry.first = table.blocks;
    table.blocks += down * entry.across;
    slots = {next_slot, down * int64_t(entry.across)};
    next_slot += slots.count;
  }

  void square(double2* squares, cudaStream_t stream) const {
    for (size_t i = 0; i < tables_.size(); ++i) {
      launch_square_tiles(tables_[i], dtype_of(type_), squares + first_slots_[i], stream);
    }
  }

  void update(const LayerStep* steps, const Decays& decays, cudaStream_t stream) const {
    for (const TileTable& table : tables_) {
      launch_update_tiles(table, dtype_of(type_), steps, decays, stream);
    }
  }

 private:
  at::ScalarType type_;
  std::vector<TileTable> tables_;
  std::vector<int64_t> first_slots_;
};

// A parameter's arrays as flat memory, laid out alike; copies stand in for those that are not.
struct FlatArrays {
  Tensor param, direction, gradient, exp_avg, exp_avg_sq;
};

// All arguments of one call, and what it launches.
class Update {
 public:
  Update(at::TensorList params, at::TensorList gradients, at::TensorList exp_avgs,
         at::TensorList exp_avg_sqs, Normalize normalize, at::IntArrayRef layer_sizes)
      : params_(params),
        gradients_(gradients),
        exp_avgs_(exp_avgs),
        exp_avg_sqs_(exp_avg_sqs),
        normalize_(normalize),
        layer_sizes_(layer_sizes),
        type_(params[0].scalar_type()),
        state_type_(at::toOpMathType(type_)),
        slots_(layer_sizes.size()),
        flat_(type_),
        tiled_(type_) {}

  // P of a layer, or none where its gradients are directions.
  void add_layer(size_t layer, size_t first, const std::optional<Tensor>& basis,
                 const std::optional<Tensor>& core_inverse, const std::optional<Tensor>& shift) {
    const size_t size = layer_sizes_[layer];
    if (basis && is_tiled(first, size, *basis)) {
      add_tiles(layer, first, *basis, *core_inverse, *shift);
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
    for (size_t i = 0; i < size; ++i) add_flat(layer, first + i, directions[i]);
  }

  void run(at::TensorList steps, FinishOptions options) {
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    run_projections(projections_, type_);
    for (const bool wide : {true, false}) {
      for (size_t i = 0; i < tile_layers_.size(); ++i) {
        if (wide_[i] == wide) tiled_.add(tile_layers_[i], wide, slots_[tile_layers_[i].layer], slots_used_);
      }
    }
    const auto bytes = params_[0].options().dtype(at::kByte);
    const Tensor squares = at::empty({std::max<int64_t>(slots_used_, 1) * 16}, bytes);
    const Tensor layers = at::empty({int64_t(slots_.size() * sizeof(LayerStep))}, bytes);
    double2* sums = static_cast<double2*>(squares.mutable_data_ptr());
    LayerStep* layer_steps = static_cast<LayerStep*>(layers.mutable_data_ptr());
    if (options.scale != Scale::kNone) {
      flat_.square(options.scale == Scale::kGradientNorm, sums, stream);
      tiled_.square(sums, stream);
    }
    finish_layers(steps, options, sums, layer_steps, stream);
    flat_.update(layer_steps, options.decays, stream);
    tiled_.update(layer_steps, options.decays, stream);
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

  void add_tiles(size_t layer, size_t first, const Tensor& basis, const Tensor& core_inverse,
                 const Tensor& shift) {
    const bool has_bias = layer_sizes_[layer] == 2;
    std::optional<Tensor> bias;
    if (has_bias) bias = gradients_[first + 1];
    projections_.push_back(
        make_projection(gradients_[first].flatten(1), bias, basis, core_inverse, false));
    const Product& product = projections_.back().product;
    TileLayer tile{};
    tile.weight = arrays_of(first);
    if (has_bias) tile.bias = arrays_of(first + 1);
    tile.basis = product.basis;
    tile.turned = product.turned;
    tile.shift = shift.const_data_ptr<float>();
    tile.n = product.n;
    tile.size = product.size;
    tile.basis_row = product.basis_row;
    tile.rank = product.rank;
    tile.layer = uint32_t(layer);
    bool wide = is_wide(params_[first], tile.size, tile.size) && projections_.back().wide;
    for (const void* state : {tile.weight.exp_avg, tile.weight.exp_avg_sq}) {
      wide = wide && reinterpret_cast<uintptr_t>(state) % 16 == 0;
    }
    tile_layers_.push_back(tile);
    wide_.push_back(wide);
  }

  void add_flat(size_t layer, size_t i, const Tensor& direction) {
    FlatArrays arrays;
    arrays.param = params_[i].is_non_overlapping_and_dense() ? params_[i] : params_[i].contiguous();
    const Tensor& like = arrays.param;
    arrays.direction = in_layout_of(direction, like, type_);
    FlatTensor tensor{};
    tensor.param = target_of(arrays.param);
    tensor.direction = source_of(arrays.direction);
    tensor.numel = like.numel();
    tensor.layer = uint32_t(layer);
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
    flat_.add(tensor, slots_[layer], slots_used_);
  }

  void write_back(const Tensor& target, const Tensor& copy) {
    if (!copy.is_same(target)) copies_.emplace_back(target, copy);
  }

  void finish_layers(at::TensorList steps, const FinishOptions& options, const double2* sums,
                     LayerStep* layer_steps, cudaStream_t stream) const {
    size_t first = 0;
    for (size_t begin = 0; begin < slots_.size(); begin += kMaxLayers) {
      LayerTable table{};
      for (size_t layer = begin; layer < slots_.size() && table.count < kMaxLayers; ++layer) {
        LayerSums& entry = table.entries[table.count++];
        entry.step = target_of(steps[layer]);
        if (normalize_ == Normalize::kRms) entry.exp_avg_sq = target_of(exp_avg_sqs_[layer]);
        entry.first = slots_[layer].first;
        entry.count = slots_[layer].count;
        for (int64_t i = 0; i < layer_sizes_[layer]; ++i) entry.numel += params_[first++].numel();
      }
      launch_finish_layers(table, options, sums, layer_steps + begin, stream);
    }
  }

  at::TensorList params_, gradients_, exp_avgs_, exp_avg_sqs_;
  Normalize normalize_;
  at::IntArrayRef layer_sizes_;
  at::ScalarType type_, state_type_;
  std::vector<Slots> slots_;
  int64_t slots_used_ = 0;
  FlatPlan flat_;
  TilePlan tiled_;
  std::vector<TileLayer> tile_layers_;
  std::vector<bool> wide_;
  std::vector<Projection> projections_;
  // Tables know addresses only, so their tensors are kept until all is launched.
  std::vector<FlatArrays> kept_;
  std::vector<std::pair<Tensor, Tensor>> copies_;
};

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
                    const std::optional<Tensor>& found_inf) {
  if (params.empty()) return;
  const std::vector<size_t> layer_of =
      check_update(params, gradients, exp_avgs, exp_avg_sqs, steps, bases, core_inverses, shifts,
                   layer_sizes, normalize_name, momentum);
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
  options.scale = normalize == Normalize::kRms   ? Scale::kRootMeanSquare
                  : normalize == Normalize::kSgd ? Scale::kGradientNorm
                                                 : Scale::kNone;
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

  Update update(params, gradients, exp_avgs, exp_avg_sqs, normalize, layer_sizes);
  for (size_t i = 0; i < params.size(); i += layer_sizes[layer_of[i]]) {
    const size_t layer = layer_of[i];
    update.add_layer(layer, i, bases.get(layer), core_inverses.get(layer), shifts.get(layer));
  }
  update.run(steps, options);
}

}  // namespace

TORCH_LIBRARY_IMPL(gls_fused, CUDA, m) { m.impl("update_layers_", &update_layers_); }

}  // namespace gls_fused::cuda
