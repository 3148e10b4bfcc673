// Raises for arguments that an op cannot take, alike on every device.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/OpMathType.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/accumulate.h>

#include <optional>
#include <vector>

namespace gls_fused {
// csrc/cpu is compiled once per CPU capability, and a library must not run another's code.
#ifdef CPU_CAPABILITY
inline namespace CPU_CAPABILITY {
#endif

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

enum class Normalize { kRms, kRow, kFactored, kAdam, kSgd, kNone };

inline Normalize parse_normalize(c10::string_view name) {
  if (name == "rms") return Normalize::kRms;
  if (name == "row") return Normalize::kRow;
  if (name == "factored") return Normalize::kFactored;
  if (name == "adam") return Normalize::kAdam;
  if (name == "sgd") return Normalize::kSgd;
  TORCH_CHECK(name == "none", "update_layers_: expected normalize rms, row, factored, adam, sgd or none, got ", name);
  return Normalize::kNone;
}

// How many mean squares a layer of so many parameters keeps.
inline size_t squares_of(Normalize normalize, size_t params) {
  switch (normalize) {
    case Normalize::kRms:
    case Normalize::kRow:
      return 1;
    case Normalize::kFactored:
      return 2;
    case Normalize::kAdam:
      return params;
    default:
      return 0;
  }
}

inline void check_power(double power) {
  TORCH_CHECK(power == 1 || power == 0.75 || power == 0.5 || power == 0.25,
              "invert_core: expected power 1, 0.75, 0.5 or 0.25, got ", power);
}

inline void check_device(const char* op, const at::Tensor& first, const at::Tensor& other) {
  TORCH_CHECK(first.device() == other.device(), op, ": expected tensors on one device, got ",
              first.device(), " and ", other.device());
}

inline void check_matrix(const char* op, const char* name, const at::Tensor& x) {
  TORCH_CHECK(x.dim() == 2 && at::isFloatingType(x.scalar_type()), op, ": expected ", name,
              " of a floating-point dtype, got ", x.sizes(), " of ", x.scalar_type());
}

// U [dim, r] beside the matrix it is for.
inline void check_basis(const char* op, const at::Tensor& beside, int64_t dim,
                        const at::Tensor& basis) {
  const at::ScalarType type = basis.scalar_type();
  check_device(op, beside, basis);
  TORCH_CHECK(basis.dim() == 2 && basis.size(0) == dim, op, ": expected basis [", dim,
              ", r], got ", basis.sizes());
  TORCH_CHECK(type == at::kFloat || type == at::kDouble, op,
              ": expected basis of Float or Double, got ", type);
}

// P, of `dim` columns, its parts of one dtype.
inline void check_inverse(const char* op, const at::Tensor& beside, int64_t dim,
                          const at::Tensor& basis, const at::Tensor& core_inverse,
                          const at::Tensor& shift) {
  check_basis(op, beside, dim, basis);
  check_device(op, beside, core_inverse);
  check_device(op, beside, shift);
  TORCH_CHECK(core_inverse.dim() == 2 && core_inverse.size(0) == basis.size(1) &&
                  core_inverse.size(1) == basis.size(1),
              op, ": expected core_inverse [", basis.size(1), ", ", basis.size(1), "], got ",
              core_inverse.sizes());
  TORCH_CHECK(core_inverse.scalar_type() == basis.scalar_type() &&
                  shift.scalar_type() == basis.scalar_type(),
              op, ": expected core_inverse and shift of ", basis.scalar_type(), ", got ",
              core_inverse.scalar_type(), " and ", shift.scalar_type());
  TORCH_CHECK(shift.dim() == 0, op, ": expected shift [], got ", shift.sizes());
}

inline void check_rows(const char* op, const at::Tensor& rows, const at::Tensor& basis,
                       bool ones) {
  check_matrix(op, "rows [n, k]", rows);
  check_basis(op, rows, rows.size(1) + ones, basis);
}

inline void check_gradient(const at::Tensor& weight_gradient,
                           const std::optional<at::Tensor>& bias_gradient,
                           const at::Tensor& basis, const at::Tensor& core_inverse,
                           const at::Tensor& shift) {
  const char* op = "precondition_gradient";
  check_matrix(op, "weight_gradient [m, k]", weight_gradient);
  check_inverse(op, weight_gradient, weight_gradient.size(1) + bias_gradient.has_value(), basis,
                core_inverse, shift);
  if (!bias_gradient) return;
  check_device(op, weight_gradient, *bias_gradient);
  TORCH_CHECK(bias_gradient->dim() == 1 && bias_gradient->size(0) == weight_gradient.size(0) &&
                  bias_gradient->scalar_type() == weight_gradient.scalar_type(),
              op, ": expected bias_gradient [", weight_gradient.size(0), "] of ",
              weight_gradient.scalar_type(), ", got ", bias_gradient->sizes(), " of ",
              bias_gradient->scalar_type());
}

inline void check_sums(const at::Tensor& rows, const at::Tensor& basis, bool ones,
                       const at::Tensor& sums) {
  check_rows("add_sketch_", rows, basis, ones);
  check_device("add_sketch_", rows, sums);
  const int64_t numel = 2 + basis.size(1) * basis.size(1) + basis.numel();
  TORCH_CHECK(sums.dim() == 1 && sums.size(0) == numel && sums.scalar_type() == basis.scalar_type(),
              "add_sketch_: expected sums [", numel, "] of ", basis.scalar_type(), ", got ",
              sums.sizes(), " of ", sums.scalar_type());
}

inline void check_refresh(const at::Tensor& core, const at::Tensor& sketch) {
  check_device("refresh_subspace", core, sketch);
  const at::ScalarType type = core.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kDouble,
              "refresh_subspace: expected core of Float or Double, got ", type);
  TORCH_CHECK(sketch.dim() == 2 && sketch.size(0) >= sketch.size(1) &&
                  sketch.scalar_type() == type,
              "refresh_subspace: expected sketch [d, r] of ", type, " with r at most d, got ",
              sketch.sizes(), " of ", sketch.scalar_type());
  TORCH_CHECK(core.dim() == 2 && core.size(0) == sketch.size(1) && core.size(1) == sketch.size(1),
              "refresh_subspace: expected core [", sketch.size(1), ", ", sketch.size(1), "], got ",
              core.sizes());
}

inline void check_blend(at::TensorList bases, at::TensorList cores, at::TensorList traces,
                        at::TensorList samples, at::TensorList sums,
                        const char* op = "blend_subspaces") {
  const size_t layers = bases.size();
  TORCH_CHECK(cores.size() == layers && traces.size() == layers && samples.size() == layers &&
                  sums.size() == layers,
              op, ": expected ", layers, " cores, traces, samples and sums, got ",
              cores.size(), ", ", traces.size(), ", ", samples.size(), " and ", sums.size());
  for (size_t i = 0; i < layers; ++i) {
    const at::ScalarType type = bases[i].scalar_type();
    TORCH_CHECK(type == at::kFloat || type == at::kDouble,
                op, ": expected basis of Float or Double, got ", type);
    TORCH_CHECK(bases[i].dim() == 2, op, ": expected basis [d, r], got ",
                bases[i].sizes());
    const int64_t d = bases[i].size(0), r = bases[i].size(1);
    const auto check = [&](const char* name, const at::Tensor& tensor, at::IntArrayRef sizes) {
      check_device(op, bases[i], tensor);
      TORCH_CHECK(tensor.sizes() == sizes && tensor.scalar_type() == type,
                  op, ": expected ", name, " ", sizes, " of ", type, ", got ",
                  tensor.sizes(), " of ", tensor.scalar_type());
    };
    check("core", cores[i], {r, r});
    check("trace", traces[i], {});
    check("samples", samples[i], {});
    check("sums", sums[i], {2 + r * (r + d)});
  }
}

inline void check_core(const at::Tensor& core, const at::Tensor& trace, int64_t dim,
                       const std::optional<at::Tensor>& samples) {
  const at::ScalarType type = core.scalar_type();
  check_device("invert_core", core, trace);
  TORCH_CHECK(dim > 0, "invert_core: expected dim at least 1, got ", dim);
  TORCH_CHECK(core.dim() == 2 && core.size(0) == core.size(1) && core.size(0) <= dim,
              "invert_core: expected core [r, r] with r at most ", dim, ", got ", core.sizes());
  TORCH_CHECK(type == at::kFloat || type == at::kDouble,
              "invert_core: expected core of Float or Double, got ", type);
  TORCH_CHECK(trace.dim() == 0 && trace.scalar_type() == type, "invert_core: expected trace [] of ",
              type, ", got ", trace.sizes(), " of ", trace.scalar_type());
  if (samples) {
    check_device("invert_core", core, *samples);
    TORCH_CHECK(samples->dim() == 0 && samples->scalar_type() == type,
                "invert_core: expected samples [] of ", type, ", got ", samples->sizes(), " of ",
                samples->scalar_type());
  }
}

inline void check_cores(at::TensorList cores, at::TensorList traces, at::IntArrayRef dims,
                        at::TensorList samples) {
  TORCH_CHECK(cores.size() == traces.size() && cores.size() == dims.size(),
              "invert_cores: expected ", cores.size(), " traces and dims, got ", traces.size(),
              " and ", dims.size());
  TORCH_CHECK(samples.empty() || samples.size() == cores.size(), "invert_cores: expected ",
              cores.size(), " samples or none, got ", samples.size());
}

// Estimates as `blend_subspaces` takes them, and C [r, r] and lambda'^p [] of each: all to be written to
// where they are, U by columns.
inline void check_commit(at::TensorList bases, at::TensorList cores, at::TensorList traces,
                         at::TensorList samples, at::TensorList core_inverses,
                         at::TensorList shifts, at::TensorList sums, at::TensorList gradients,
                         at::IntArrayRef gradient_counts) {
  const char* op = "commit_subspaces_";
  check_blend(bases, cores, traces, samples, sums, op);
  const size_t layers = bases.size();
  TORCH_CHECK(core_inverses.size() == layers && shifts.size() == layers &&
                  gradient_counts.size() == layers,
              op, ": expected ", layers, " core_inverses, shifts and gradient_counts, got ",
              core_inverses.size(), ", ", shifts.size(), " and ", gradient_counts.size());
  int64_t total = 0;
  for (const int64_t count : gradient_counts) {
    TORCH_CHECK(count >= 0, op, ": expected gradient_counts of at least 0, got ", gradient_counts);
    total += count;
  }
  TORCH_CHECK(static_cast<int64_t>(gradients.size()) == total, op, ": expected ", total,
              " gradients, got ", gradients.size());
  for (size_t i = 0; i < layers; ++i) {
    for (const auto& [name, like, tensor] :
         {std::tuple{"core_inverse", &cores[i], &core_inverses[i]},
          std::tuple{"shift", &traces[i], &shifts[i]}}) {
      check_device(op, *like, *tensor);
      TORCH_CHECK(tensor->sizes() == like->sizes() && tensor->scalar_type() == like->scalar_type(),
                  op, ": expected ", name, " ", like->sizes(), " of ", like->scalar_type(),
                  ", got ", tensor->sizes(), " of ", tensor->scalar_type());
    }
    TORCH_CHECK(bases[i].size(1) <= bases[i].size(0), op, ": expected basis [d, r] with r at most d, got ",
                bases[i].sizes());
    TORCH_CHECK(bases[i].t().is_contiguous() && cores[i].is_contiguous() &&
                    core_inverses[i].is_contiguous(),
                op, ": expected basis by columns, core and core_inverse by rows, got strides ",
                bases[i].strides(), ", ", cores[i].strides(), " and ", core_inverses[i].strides());
  }
  for (const at::Tensor& gradient : gradients) {
    check_device(op, bases[0], gradient);
    TORCH_CHECK(gradient.is_floating_point(), op, ": expected gradients of floating point, got ",
                gradient.scalar_type());
  }
}

inline void check_measured(at::TensorList weights, at::TensorList results,
                           at::ArrayRef<double> least) {
  const char* op = "measure_weights_";
  TORCH_CHECK(results.size() == weights.size() && least.size() == weights.size(), op, ": expected ",
              weights.size(), " results and least, got ", results.size(), " and ", least.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    check_device(op, weights[i], results[i]);
    TORCH_CHECK(weights[i].is_floating_point(), op, ": expected weights of floating point, got ",
                weights[i].scalar_type());
    const at::ScalarType type = results[i].scalar_type();
    TORCH_CHECK(results[i].dim() == 0 && (type == at::kFloat || type == at::kDouble), op,
                ": expected results [] of Float or Double, got ", results[i].sizes(), " of ", type);
  }
}

inline void check_growths(at::TensorList squares, at::TensorList growths, at::TensorList slows,
                          at::TensorList steps) {
  const char* op = "measure_growths_";
  const size_t layers = squares.size();
  TORCH_CHECK(growths.size() == layers && slows.size() == layers && steps.size() == layers, op,
              ": expected ", layers, " growths, slows and steps, got ", growths.size(), ", ",
              slows.size(), " and ", steps.size());
  for (size_t i = 0; i < layers; ++i) {
    const at::ScalarType type = squares[i].scalar_type();
    TORCH_CHECK(type == at::kFloat || type == at::kDouble, op,
                ": expected squares of Float or Double, got ", type);
    for (const at::Tensor& each : {growths[i], slows[i]}) {
      check_device(op, squares[i], each);
      TORCH_CHECK(each.dim() == 0 && each.scalar_type() == type, op,
                  ": expected growths and slows [] of ", type, ", got ", each.sizes(), " of ",
                  each.scalar_type());
    }
    check_device(op, squares[i], steps[i]);
    TORCH_CHECK(steps[i].numel() == 1, op, ": expected steps of one number, got ",
                steps[i].sizes());
  }
}

// A tensor that is written to element by element.
inline void check_written(const char* name, const at::Tensor& tensor, at::IntArrayRef sizes) {
  TORCH_CHECK(tensor.sizes() == sizes, "update_layers_: expected ", name, " ", sizes, ", got ",
              tensor.sizes());
  TORCH_CHECK(at::has_internal_overlap(tensor) != at::MemOverlap::Yes, "update_layers_: expected ",
              name, " whose elements do not share memory, got strides ", tensor.strides(), " for ",
              sizes);
}

inline void check_scalar(const char* name, const std::optional<at::Tensor>& tensor) {
  TORCH_CHECK(!tensor || (tensor->numel() == 1 && (tensor->scalar_type() == at::kFloat ||
                                                   tensor->scalar_type() == at::kDouble)),
              "update_layers_: expected ", name, " of one Float or Double, got ", tensor->sizes(),
              " of ", tensor->scalar_type());
}

// A layer's P, and that weight and bias are of its shape. Its gradients begin at `gradients`.
inline void check_layer_inverse(const at::Tensor* gradients, bool has_bias,
                                const std::optional<at::Tensor>& basis,
                                const std::optional<at::Tensor>& core_inverse,
                                const std::optional<at::Tensor>& shift) {
  TORCH_CHECK(basis.has_value() == core_inverse.has_value() &&
                  basis.has_value() == shift.has_value(),
              "update_layers_: expected basis, core_inverse and shift of a layer together, got ",
              basis.has_value(), ", ", core_inverse.has_value(), " and ", shift.has_value());
  if (!basis) return;
  TORCH_CHECK(gradients[0].dim() >= 2,
              "update_layers_: expected weight [m, ...] beside an inverse, got ",
              gradients[0].sizes());
  const int64_t outputs = gradients[0].size(0);
  TORCH_CHECK(!has_bias || gradients[1].sizes() == at::IntArrayRef(outputs),
              "update_layers_: expected bias [", outputs, "], got ", gradients[1].sizes());
  int64_t size = 1;
  for (const int64_t extent : gradients[0].sizes().slice(1)) size *= extent;
  check_inverse("update_layers_", gradients[0], size + has_bias, *basis, *core_inverse, *shift);
}

// v [m] of a layer, and c [d] for "factored", where d may count a bias that takes no step.
inline void check_axes(at::TensorList params, at::TensorList exp_avg_sqs, at::ScalarType type) {
  const at::Tensor& weight = params[0];
  const bool has_bias = params.size() == 2;
  TORCH_CHECK(weight.dim() >= 2, "update_layers_: expected weight [m, ...], got ", weight.sizes());
  const at::IntArrayRef outputs = weight.sizes().slice(0, 1);
  TORCH_CHECK(!has_bias || params[1].sizes() == outputs, "update_layers_: expected bias ", outputs,
              ", got ", params[1].sizes());
  const int64_t size = c10::multiply_integers(weight.sizes().slice(1));
  for (size_t i = 0; i < exp_avg_sqs.size(); ++i) {
    const at::Tensor& squares = exp_avg_sqs[i];
    check_device("update_layers_", weight, squares);
    TORCH_CHECK(squares.dim() == 1 && squares.is_contiguous() && squares.scalar_type() == type &&
                    (i == 0 ? squares.size(0) == weight.size(0)
                            : squares.size(0) == size + has_bias || squares.size(0) == size + 1),
                "update_layers_: expected exp_avg_sqs [", i == 0 ? weight.size(0) : size + has_bias,
                "] of ", type, ", contiguous, got ", squares.sizes(), " of ",
                squares.scalar_type());
  }
}

// All lists of update_layers_; the layer of each parameter.
inline std::vector<size_t> check_update(at::TensorList params, at::TensorList gradients,
                                        at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                                        at::TensorList steps, const OptionalTensors& bases,
                                        const OptionalTensors& core_inverses,
                                        const OptionalTensors& shifts,
                                        at::IntArrayRef layer_sizes,
                                        c10::string_view normalize_name, double momentum,
                                        const std::optional<at::Tensor>& rates) {
  const Normalize normalize = parse_normalize(normalize_name);
  const size_t layers = layer_sizes.size();
  TORCH_CHECK(gradients.size() == params.size(), "update_layers_: expected ", params.size(),
              " gradients, got ", gradients.size());
  TORCH_CHECK(steps.size() == layers, "update_layers_: expected ", layers, " steps, got ",
              steps.size());
  TORCH_CHECK(bases.size() == layers && core_inverses.size() == layers && shifts.size() == layers,
              "update_layers_: expected ", layers, " bases, core_inverses and shifts, got ",
              bases.size(), ", ", core_inverses.size(), " and ", shifts.size());
  TORCH_CHECK(exp_avgs.size() == (momentum > 0 ? params.size() : 0),
              "update_layers_: expected exp_avgs exactly with momentum, got ", exp_avgs.size(),
              " for momentum ", momentum);
  size_t squares = 0;
  for (const int64_t size : layer_sizes) squares += squares_of(normalize, size);
  if (rates) {
    check_device("update_layers_", params[0], *rates);
    TORCH_CHECK(rates->dim() == 2 && rates->size(0) == static_cast<int64_t>(layers) &&
                    rates->size(1) == 2 &&
                    (rates->scalar_type() == at::kFloat || rates->scalar_type() == at::kDouble),
                "update_layers_: expected rates [", layers, ", 2] of Float or Double, got ",
                rates->sizes(), " of ", rates->scalar_type());
  }
  TORCH_CHECK(exp_avg_sqs.size() == squares, "update_layers_: expected ", squares,
              " exp_avg_sqs for normalize ", normalize_name, ", got ", exp_avg_sqs.size());
  const at::ScalarType type = params[0].scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 ||
                  type == at::kHalf,
              "update_layers_: expected parameters of Float, Double, BFloat16 or Half, got ", type);
  const at::ScalarType state_type = at::toOpMathType(type);
  std::vector<size_t> layer_of;
  for (size_t layer = 0; layer < layers; ++layer) {
    TORCH_CHECK(layer_sizes[layer] == 1 || layer_sizes[layer] == 2,
                "update_layers_: expected layer_sizes of 1 or 2, got ", layer_sizes[layer]);
    TORCH_CHECK(steps[layer].dim() == 0, "update_layers_: expected steps [], got ",
                steps[layer].sizes());
    check_device("update_layers_", params[0], steps[layer]);
    if (normalize == Normalize::kRms) {
      check_device("update_layers_", params[0], exp_avg_sqs[layer]);
      TORCH_CHECK(exp_avg_sqs[layer].dim() == 0 && exp_avg_sqs[layer].scalar_type() == state_type,
                  "update_layers_: expected exp_avg_sqs [] of ", state_type, ", got ",
                  exp_avg_sqs[layer].sizes(), " of ", exp_avg_sqs[layer].scalar_type());
    }
    layer_of.insert(layer_of.end(), layer_sizes[layer], layer);
  }
  TORCH_CHECK(layer_of.size() == params.size(), "update_layers_: expected layer_sizes to sum to ",
              params.size(), ", got ", layer_of.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const at::IntArrayRef sizes = params[i].sizes();
    check_device("update_layers_", params[0], params[i]);
    check_device("update_layers_", params[0], gradients[i]);
    TORCH_CHECK(params[i].scalar_type() == type, "update_layers_: expected parameters of ", type,
                ", got ", params[i].scalar_type());
    TORCH_CHECK(gradients[i].sizes() == sizes && at::isFloatingType(gradients[i].scalar_type()),
                "update_layers_: expected gradients ", sizes, " of a floating-point dtype, got ",
                gradients[i].sizes(), " of ", gradients[i].scalar_type());
    check_written("params", params[i], sizes);
    if (momentum > 0) {
      check_device("update_layers_", params[0], exp_avgs[i]);
      check_written("exp_avgs", exp_avgs[i], sizes);
    }
    if (normalize == Normalize::kAdam) {
      check_device("update_layers_", params[0], exp_avg_sqs[i]);
      check_written("exp_avg_sqs", exp_avg_sqs[i], sizes);
    }
  }
  for (size_t i = 0; i < params.size(); i += layer_sizes[layer_of[i]]) {
    const size_t layer = layer_of[i];
    check_layer_inverse(&gradients[i], layer_sizes[layer] == 2, bases.get(layer),
                        core_inverses.get(layer), shifts.get(layer));
    if (normalize == Normalize::kRow || normalize == Normalize::kFactored) {
      const size_t each = squares_of(normalize, 0);
      check_axes(params.slice(i, layer_sizes[layer]), exp_avg_sqs.slice(layer * each, each),
                 state_type);
    }
  }
  return layer_of;
}

// Of round_params_.
inline void check_rounded(at::TensorList params, at::TensorList values, at::IntArrayRef seeds,
                          at::TensorList steps) {
  const size_t count = params.size();
  TORCH_CHECK(values.size() == count && seeds.size() == count && steps.size() == count,
              "round_params_: expected ", count, " values, seeds and steps, got ", values.size(),
              ", ", seeds.size(), " and ", steps.size());
  for (size_t i = 0; i < count; ++i) {
    const at::ScalarType type = params[i].scalar_type();
    TORCH_CHECK(type == at::kBFloat16 || type == at::kHalf,
                "round_params_: expected parameters of BFloat16 or Half, got ", type);
    TORCH_CHECK(type == params[0].scalar_type(),
                "round_params_: expected parameters of one dtype, got ", type, " beside ",
                params[0].scalar_type());
    TORCH_CHECK(values[i].sizes() == params[i].sizes() && values[i].scalar_type() == at::kFloat,
                "round_params_: expected values ", params[i].sizes(), " of Float, got ",
                values[i].sizes(), " of ", values[i].scalar_type());
    TORCH_CHECK(steps[i].numel() == 1 && (steps[i].scalar_type() == at::kFloat ||
                                          steps[i].scalar_type() == at::kDouble),
                "round_params_: expected steps of one Float or Double, got ", steps[i].sizes(),
                " of ", steps[i].scalar_type());
    TORCH_CHECK(seeds[i] >= 0 && seeds[i] < (int64_t(1) << 32),
                "round_params_: expected seeds in [0, 2^32), got ", seeds[i]);
    for (const at::Tensor& other : {params[i], values[i], steps[i]}) {
      check_device("round_params_", params[0], other);
    }
  }
}

// `tensor` itself where its memory is laid out as `like`'s and of this dtype, else a copy that is.
inline at::Tensor in_layout_of(const at::Tensor& tensor, const at::Tensor& like,
                               at::ScalarType type) {
  if (tensor.strides() == like.strides() && tensor.scalar_type() == type) return tensor;
  at::Tensor copy = at::empty_like(like, like.options().dtype(type));
  copy.copy_(tensor);
  return copy;
}

#ifdef CPU_CAPABILITY
}  // namespace CPU_CAPABILITY
#endif
}  // namespace gls_fused
