// The update of all layers in one call, on the CPU:
//
//   D = D0 P where the backward has not applied P,
//   m <- momentum m + (1 - momentum) D,   v <- beta2 v + (1 - beta2) mean(D^2)
//   W <- W (1 - lr weight_decay) - min(lr, bound) update
//
// Memory bound. Each array is read and written once, except that D is read once more before the
// write where a layer's norm or columns decide its step ("rms", "sgd", "factored"): bytes per
// float32 parameter are 16 with momentum 0 and 24 with momentum, 4 fewer for "none" and "row";
// Adam moves 28.
//
// Work is cut into chunks of a fixed size, and sums of squares are taken per chunk and then in
// chunk order, so that the result does not depend on the number of threads.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <c10/util/accumulate.h>

#include <cmath>
#include <vector>

#include "../check.h"
#include "products.h"
#include "rows.h"
#include "steps.h"

namespace gls_fused {
inline namespace CPU_CAPABILITY {
namespace {

struct Scalars {
  double decayed;   // 1 - lr weight_decay
  double momentum;
  double beta2;
  double eps;
};

// A parameter's arrays as flat memory, and what its layer's step is multiplied with.
template <typename param_t, typename state_t>
struct Slice {
  param_t* param;
  const param_t* direction;
  state_t* exp_avg;     // null when momentum is 0
  state_t* exp_avg_sq;  // per element for "adam", else null
  int64_t numel;
  size_t layer;
};

// Flat memory that belongs to a layer.
template <typename param_t>
struct Span {
  const param_t* data;
  int64_t numel;
  size_t layer;
};

struct Chunk {
  size_t slice;
  int64_t begin;
  int64_t end;
};

template <typename Slices>
std::vector<Chunk> cut(const Slices& slices) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < slices.size(); ++i) {
    for (int64_t begin = 0; begin < slices[i].numel; begin += kChunk) {
      chunks.push_back({i, begin, std::min(slices[i].numel, begin + kChunk)});
    }
  }
  return chunks;
}

// In the state's dtype, whatever the parameters are stored in.
template <typename state_t, typename param_t>
double sum_squares_as(const param_t* x, int64_t n) {
  if constexpr (std::is_same_v<param_t, state_t>) {
    return sum_squares(x, n);
  } else {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double value = static_cast<state_t>(x[i]);
      total += value * value;
    }
    return total;
  }
}

// Per layer, over all its slices; in parallel, and the same for any number of threads.
template <typename state_t, typename param_t>
std::vector<double> sum_layers(const std::vector<Span<param_t>>& spans, size_t layers) {
  std::vector<Chunk> chunks = cut(spans);
  std::vector<double> partial(chunks.size()), totals(layers, 0);
  at::parallel_for(0, chunks.size(), grain(chunks.size()), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      partial[i] = sum_squares_as<state_t>(spans[chunks[i].slice].data + chunks[i].begin,
                                           chunks[i].end - chunks[i].begin);
    }
  });
  for (size_t i = 0; i < chunks.size(); ++i) totals[spans[chunks[i].slice].layer] += partial[i];
  return totals;
}

// One element of a chunk. `rate` is lr times the layer's scale over the bias correction.
template <bool kMomentum, bool kElementwise, typename Value, typename Scalar>
inline Value update_element(Value param, Value direction, Value& exp_avg, Value& exp_avg_sq,
                            Scalar decayed, Scalar momentum, Scalar beta2, Scalar eps,
                            Scalar correction, Scalar rate) {
  Value average = direction;
  if constexpr (kMomentum) {
    exp_avg = exp_avg + (direction - exp_avg) * Value(Scalar(1) - momentum);
    average = exp_avg;
  }
  if constexpr (kElementwise) {
    exp_avg_sq = exp_avg_sq + (direction * direction - exp_avg_sq) * Value(Scalar(1) - beta2);
    Value root;
    if constexpr (std::is_arithmetic_v<Value>) {
      root = std::sqrt(exp_avg_sq / correction);
    } else {
      root = (exp_avg_sq / Value(correction)).sqrt();
    }
    average = average / (root + Value(eps));
  }
  return param * Value(decayed) - average * Value(rate);
}

template <bool kMomentum, bool kElementwise, typename param_t, typename state_t>
void update_chunk(const Slice<param_t, state_t>& slice, int64_t begin, int64_t end,
                  const Scalars& scalars, double correction, double rate) {
  using Vec = at::vec::Vectorized<state_t>;
  const state_t decayed = scalars.decayed, momentum = scalars.momentum, beta2 = scalars.beta2;
  const state_t eps = scalars.eps, corrected = correction, step = rate;
  int64_t i = begin;
  if constexpr (std::is_same_v<param_t, state_t>) {
    for (; i + Vec::size() <= end; i += Vec::size()) {
      Vec exp_avg(0), exp_avg_sq(0);
      if constexpr (kMomentum) exp_avg = Vec::loadu(slice.exp_avg + i);
      if constexpr (kElementwise) exp_avg_sq = Vec::loadu(slice.exp_avg_sq + i);
      const Vec updated = update_element<kMomentum, kElementwise>(
          Vec::loadu(slice.param + i), Vec::loadu(slice.direction + i), exp_avg, exp_avg_sq,
          decayed, momentum, beta2, eps, corrected, step);
      updated.store(slice.param + i);
      if constexpr (kMomentum) exp_avg.store(slice.exp_avg + i);
      if constexpr (kElementwise) exp_avg_sq.store(slice.exp_avg_sq + i);
    }
  }
  for (; i < end; ++i) {
    state_t exp_avg = kMomentum ? slice.exp_avg[i] : state_t(0);
    state_t exp_avg_sq = kElementwise ? slice.exp_avg_sq[i] : state_t(0);
    slice.param[i] = static_cast<param_t>(update_element<kMomentum, kElementwise>(
        static_cast<state_t>(slice.param[i]), static_cast<state_t>(slice.direction[i]), exp_avg,
        exp_avg_sq, decayed, momentum, beta2, eps, corrected, step));
    if constexpr (kMomentum) slice.exp_avg[i] = exp_avg;
    if constexpr (kElementwise) slice.exp_avg_sq[i] = exp_avg_sq;
  }
}

template <typename param_t, typename state_t>
void update_flat(const std::vector<Slice<param_t, state_t>>& slices, at::TensorList exp_avg_sqs,
                 at::TensorList steps, const std::vector<double>& gradient_squares,
                 Normalize normalize, const std::vector<double>& lrs, const Scalars& scalars) {
  const size_t layers = steps.size();
  std::vector<double> squares, numels(layers, 0);
  if (normalize == Normalize::kRms || normalize == Normalize::kSgd) {
    std::vector<Span<param_t>> spans;
    for (const auto& slice : slices) {
      spans.push_back({slice.direction, slice.numel, slice.layer});
      numels[slice.layer] += slice.numel;
    }
    squares = sum_layers<state_t>(spans, layers);
  }

  std::vector<double> rates(layers), corrections(layers, 1);
  for (size_t layer = 0; layer < layers; ++layer) {
    const double step = count_of(steps[layer]);
    double scale = 1;
    corrections[layer] = 1 - std::pow(scalars.beta2, step);
    if (normalize == Normalize::kRms) {
      // Held in the dtype of the state, as the other backends do.
      state_t& v = *exp_avg_sqs[layer].data_ptr<state_t>();
      const double mean = numels[layer] > 0 ? squares[layer] / numels[layer] : 0;
      v += (static_cast<state_t>(mean) - v) * static_cast<state_t>(1 - scalars.beta2);
      scale = 1 / (std::sqrt(v / corrections[layer]) + scalars.eps);
    } else if (normalize == Normalize::kSgd) {
      const double norm = std::sqrt(squares[layer]);
      // Not `norm > 0`: a norm that is not a number must reach the parameters.
      scale = norm == 0 ? 1 : std::sqrt(gradient_squares[layer]) / norm;
    }
    const double correction = scalars.momentum > 0 ? 1 - std::pow(scalars.momentum, step) : 1;
    rates[layer] = lrs[layer] * scale / correction;
  }

  // Backwards: the directions whose squares were summed last are the ones still in cache.
  const std::vector<Chunk> chunks = cut(slices);
  const int64_t count = chunks.size();
  at::parallel_for(0, count, grain(count), [&](int64_t first, int64_t last) {
    for (int64_t i = last - 1; i >= first; --i) {
      const auto& slice = slices[chunks[i].slice];
      const auto update = [&](auto momentum, auto elementwise) {
        update_chunk<decltype(momentum)::value, decltype(elementwise)::value>(
            slice, chunks[i].begin, chunks[i].end, scalars, corrections[slice.layer],
            rates[slice.layer]);
      };
      if (slice.exp_avg && slice.exp_avg_sq) update(std::true_type{}, std::true_type{});
      else if (slice.exp_avg) update(std::true_type{}, std::false_type{});
      else if (slice.exp_avg_sq) update(std::false_type{}, std::true_type{});
      else update(std::false_type{}, std::false_type{});
    }
  });
}

// A weight or bias as rows, and its first column in c.
template <typename param_t, typename state_t>
struct Part {
  param_t* param;
  const param_t* direction;
  state_t* exp_avg;  // null when momentum is 0
  int64_t columns;
  int64_t first;
};

// sums[j] += x[j]^2 and their total.
template <typename state_t, typename param_t>
double add_squares(const param_t* x, int64_t n, state_t* sums) {
  using Vec = at::vec::Vectorized<state_t>;
  state_t total = 0;
  int64_t j = 0;
  if constexpr (std::is_same_v<param_t, state_t>) {
    Vec totals(0);
    for (; j + Vec::size() <= n; j += Vec::size()) {
      const Vec value = Vec::loadu(x + j), square = value * value;
      totals = totals + square;
      (Vec::loadu(sums + j) + square).store(sums + j);
    }
    total = reduce_sum(totals);
  }
  for (; j < n; ++j) {
    const state_t value = static_cast<state_t>(x[j]);
    total += value * value;
    sums[j] += value * value;
  }
  return total;
}

// A row of a layer whose denominator is row_root columns_root[j] + eps ("factored"), or is in the
// rate already ("row", where columns_root is null).
template <bool kMomentum, bool kFactored, typename param_t, typename state_t>
void update_row(param_t* param, const param_t* direction, state_t* exp_avg,
                const state_t* column_roots, int64_t n, const Scalars& scalars, double row_root,
                double rate) {
  using Vec = at::vec::Vectorized<state_t>;
  const state_t decayed = scalars.decayed, average = 1 - scalars.momentum, eps = scalars.eps;
  const state_t root = row_root, step = rate;
  const auto update = [&](auto w, auto d, auto& m, auto column_root) {
    using Value = decltype(w);
    if constexpr (kMomentum) {
      m = m + (d - m) * Value(average);
      d = m;
    }
    if constexpr (kFactored) d = d / (Value(root) * column_root + Value(eps));
    return w * Value(decayed) - d * Value(step);
  };
  int64_t j = 0;
  if constexpr (std::is_same_v<param_t, state_t>) {
    for (; j + Vec::size() <= n; j += Vec::size()) {
      Vec m(0), column_root(0);
      if constexpr (kMomentum) m = Vec::loadu(exp_avg + j);
      if constexpr (kFactored) column_root = Vec::loadu(column_roots + j);
      update(Vec::loadu(param + j), Vec::loadu(direction + j), m, column_root).store(param + j);
      if constexpr (kMomentum) m.store(exp_avg + j);
    }
  }
  for (; j < n; ++j) {
    state_t m = kMomentum ? exp_avg[j] : state_t(0);
    const state_t column_root = kFactored ? column_roots[j] : state_t(0);
    param[j] = static_cast<param_t>(
        update(static_cast<state_t>(param[j]), static_cast<state_t>(direction[j]), m, column_root));
    if constexpr (kMomentum) exp_avg[j] = m;
  }
}

// The step of one layer with mean squares v [m] per row and, for "factored", c [d] per column.
template <typename param_t, typename state_t>
void update_axes(const std::vector<Part<param_t, state_t>>& parts, int64_t outputs,
                 state_t* row_squares, state_t* column_squares, double step, double lr,
                 const Scalars& scalars) {
  int64_t dim = 0;
  for (const auto& part : parts) dim += part.columns;
  const double correction = 1 - std::pow(scalars.beta2, step);
  const double rate = lr / (scalars.momentum > 0 ? 1 - std::pow(scalars.momentum, step) : 1);
  // Held in the dtype of the state, as the other backends do.
  const auto blend = [&](state_t& v, double mean) {
    v += (static_cast<state_t>(mean) - v) * static_cast<state_t>(1 - scalars.beta2);
  };
  const auto blend_row = [&](int64_t i, double squares) {
    blend(row_squares[i], dim > 0 ? squares / dim : 0);
  };
  const auto update = [&](int64_t i, const state_t* column_roots, double row_root, double scaled) {
    for (const auto& part : parts) {
      const int64_t at = i * part.columns;
      const auto run = [&](auto momentum, auto factored) {
        update_row<decltype(momentum)::value, decltype(factored)::value>(
            part.param + at, part.direction + at, part.exp_avg ? part.exp_avg + at : nullptr,
            column_roots ? column_roots + part.first : nullptr, part.columns, scalars, row_root,
            scaled);
      };
      if (part.exp_avg && column_roots) run(std::true_type{}, std::true_type{});
      else if (part.exp_avg) run(std::true_type{}, std::false_type{});
      else if (column_roots) run(std::false_type{}, std::true_type{});
      else run(std::false_type{}, std::false_type{});
    }
  };
  const int64_t rows = std::max<int64_t>(1, kChunk / std::max<int64_t>(dim, 1));
  const int64_t blocks = (outputs + rows - 1) / rows;
  if (!column_squares) {
    // A row stays in cache between its squares and its step.
    at::parallel_for(0, blocks, grain(blocks), [&](int64_t first, int64_t last) {
      for (int64_t i = first * rows; i < std::min(outputs, last * rows); ++i) {
        double squares = 0;
        for (const auto& part : parts) {
          squares += sum_squares_as<state_t>(part.direction + i * part.columns, part.columns);
        }
        blend_row(i, squares);
        const double root = std::sqrt(row_squares[i] / correction) + scalars.eps;
        update(i, nullptr, 0, rate / root);
      }
    });
    return;
  }

  // Sums over columns are taken in a fixed number of stretches and then in their order, so that the
  // result does not depend on the number of threads.
  const int64_t stretches = std::min<int64_t>(16, blocks);
  std::vector<state_t> partial(stretches * dim, 0);
  at::parallel_for(0, stretches, grain(blocks) > 1 ? stretches : 1, [&](int64_t first,
                                                                        int64_t last) {
    for (int64_t stretch = first; stretch < last; ++stretch) {
      const int64_t end = outputs * (stretch + 1) / stretches;
      for (int64_t i = outputs * stretch / stretches; i < end; ++i) {
        double squares = 0;
        for (const auto& part : parts) {
          squares += add_squares(part.direction + i * part.columns, part.columns,
                                 &partial[stretch * dim + part.first]);
        }
        blend_row(i, squares);
      }
    }
  });
  double total = 0;
  for (int64_t i = 0; i < outputs; ++i) total += row_squares[i];
  const double mean =
      std::max<double>(total / std::max<int64_t>(outputs, 1), std::numeric_limits<state_t>::min());
  std::vector<state_t> roots(dim);
  for (int64_t j = 0; j < dim; ++j) {
    double squares = 0;
    for (int64_t stretch = 0; stretch < stretches; ++stretch) squares += partial[stretch * dim + j];
    blend(column_squares[j], outputs > 0 ? squares / outputs : 0);
    roots[j] = std::sqrt(column_squares[j] / correction);
  }
  // Backwards: the directions whose squares were summed last are the ones still in cache.
  at::parallel_for(0, blocks, grain(blocks), [&](int64_t first, int64_t last) {
    for (int64_t i = std::min(outputs, last * rows) - 1; i >= first * rows; --i) {
      update(i, roots.data(), std::sqrt(row_squares[i] / mean), rate);
    }
  });
}

// What is alike in all layers.
struct How {
  Normalize normalize;
  Scalars scalars;
  std::optional<double> grad_scale;
};

// A run of layers, by the places of its first ones in the lists of all.
struct Run {
  size_t layer, layers, param, params, square, squares;
};

// The D of a run stays in the caches from its product to the step, and its memory is the next run's.
constexpr int64_t kRunElements = 1 << 20;

std::vector<Run> cut_runs(at::TensorList params, at::IntArrayRef layer_sizes, Normalize normalize) {
  std::vector<Run> runs;
  int64_t elements = 0;
  size_t param = 0, square = 0;
  for (size_t layer = 0; layer < layer_sizes.size(); ++layer) {
    const size_t size = layer_sizes[layer], squares = squares_of(normalize, size);
    int64_t mine = 0;
    for (const at::Tensor& tensor : params.slice(param, size)) mine += tensor.numel();
    if (runs.empty() || elements + mine > kRunElements) {
      runs.push_back({layer, 0, param, 0, square, 0});
      elements = 0;
    }
    elements += mine;
    runs.back().layers += 1;
    runs.back().params += size;
    runs.back().squares += squares;
    param += size;
    square += squares;
  }
  return runs;
}

OptionalTensors slice(const OptionalTensors& parts, const Run& run) {
  OptionalTensors found;
  for (size_t layer = run.layer; layer < run.layer + run.layers; ++layer) {
    found.push_back(parts.get(layer));
  }
  return found;
}

void update_run(at::TensorList params, at::TensorList gradients, at::TensorList exp_avgs,
                at::TensorList exp_avg_sqs, at::TensorList steps, const OptionalTensors& bases,
                const OptionalTensors& core_inverses, const OptionalTensors& shifts,
                at::IntArrayRef layer_sizes, const std::vector<double>& lrs, const How& how) {
  const size_t layers = layer_sizes.size();
  const Normalize normalize = how.normalize;
  const Scalars& scalars = how.scalars;
  const double momentum = scalars.momentum;
  const at::ScalarType type = params[0].scalar_type(), state_type = at::toOpMathType(type);
  const bool axes = normalize == Normalize::kRow || normalize == Normalize::kFactored;
  std::vector<size_t> layer_of;
  for (size_t layer = 0; layer < layers; ++layer) {
    layer_of.insert(layer_of.end(), layer_sizes[layer], layer);
  }
  std::vector<at::Tensor> unscaled(gradients.begin(), gradients.end());
  if (how.grad_scale) {
    for (at::Tensor& gradient : unscaled) {
      gradient = gradient.to(state_type).div(*how.grad_scale);
    }
  }
  std::vector<at::Tensor> directions = unscaled;
  precondition_layers(directions, layer_sizes, bases, core_inverses, shifts);

  // Flat memory for every array, with copies standing in for layouts that are not.
  std::vector<at::Tensor> flat_params, flat_directions, flat_gradients, flat_averages, flat_squares;
  for (size_t i = 0; i < params.size(); ++i) {
    // Rows and columns are of the contiguous layout.
    const bool dense =
        axes ? params[i].is_contiguous() : params[i].is_non_overlapping_and_dense();
    flat_params.push_back(dense ? params[i] : params[i].contiguous());
    const at::Tensor& like = flat_params.back();
    flat_directions.push_back(in_layout_of(directions[i], like, type));
    if (normalize == Normalize::kSgd) {
      flat_gradients.push_back(in_layout_of(unscaled[i], like, type));
    }
    if (momentum > 0) flat_averages.push_back(in_layout_of(exp_avgs[i], like, state_type));
    if (normalize == Normalize::kAdam) {
      flat_squares.push_back(in_layout_of(exp_avg_sqs[i], like, state_type));
    }
  }

  for (const at::Tensor& step : steps) advance(step);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, type, "update_layers_", [&] {
    using param_t = scalar_t;
    using state_t = at::opmath_type<scalar_t>;
    if (axes) {
      const size_t each = squares_of(normalize, 0);
      for (size_t layer = 0, i = 0; layer < layers; i += layer_sizes[layer++]) {
        const int64_t outputs = params[i].size(0);
        std::vector<Part<param_t, state_t>> parts;
        for (int64_t part = 0, first = 0; part < layer_sizes[layer]; ++part) {
          const at::Tensor& param = flat_params[i + part];
          const int64_t columns = c10::multiply_integers(param.sizes().slice(1));
          parts.push_back({param.data_ptr<param_t>(),
                           flat_directions[i + part].const_data_ptr<param_t>(),
                           momentum > 0 ? flat_averages[i + part].data_ptr<state_t>() : nullptr,
                           columns, first});
          first += columns;
        }
        const at::Tensor* squares = &exp_avg_sqs[layer * each];
        update_axes(parts, outputs, squares[0].data_ptr<state_t>(),
                    each == 2 ? squares[1].data_ptr<state_t>() : nullptr,
                    count_of(steps[layer]), lrs[layer], scalars);
      }
      return;
    }
    std::vector<Slice<param_t, state_t>> slices;
    std::vector<Span<param_t>> spans;
    for (size_t i = 0; i < params.size(); ++i) {
      slices.push_back(
          {flat_params[i].data_ptr<param_t>(), flat_directions[i].const_data_ptr<param_t>(),
           momentum > 0 ? flat_averages[i].data_ptr<state_t>() : nullptr,
           normalize == Normalize::kAdam ? flat_squares[i].data_ptr<state_t>() : nullptr,
           flat_params[i].numel(), layer_of[i]});
      if (normalize == Normalize::kSgd) {
        spans.push_back({flat_gradients[i].const_data_ptr<param_t>(), flat_params[i].numel(),
                         layer_of[i]});
      }
    }
    const std::vector<double> gradient_squares = sum_layers<state_t>(spans, layers);
    update_flat(slices, exp_avg_sqs, steps, gradient_squares, normalize, lrs, scalars);
  });

  for (size_t i = 0; i < params.size(); ++i) {
    if (!flat_params[i].is_same(params[i])) params[i].copy_(flat_params[i]);
    if (momentum > 0 && !flat_averages[i].is_same(exp_avgs[i])) {
      exp_avgs[i].copy_(flat_averages[i]);
    }
    if (normalize == Normalize::kAdam && !flat_squares[i].is_same(exp_avg_sqs[i])) {
      exp_avg_sqs[i].copy_(flat_squares[i]);
    }
  }
}

void update_layers_(at::TensorList params, at::TensorList gradients, at::TensorList exp_avgs,
                    at::TensorList exp_avg_sqs, at::TensorList steps,
                    const OptionalTensors& bases, const OptionalTensors& core_inverses,
                    const OptionalTensors& shifts, at::IntArrayRef layer_sizes,
                    c10::string_view normalize_name, double lr, double momentum, double beta2,
                    double eps, double weight_decay, const std::optional<at::Tensor>& lr_tensor,
                    const std::optional<at::Tensor>& grad_scale,
                    const std::optional<at::Tensor>& found_inf,
                    const std::optional<at::Tensor>& lr_bounds) {
  if (params.empty()) return;
  check_update(params, gradients, exp_avgs, exp_avg_sqs, steps, bases, core_inverses, shifts,
               layer_sizes, normalize_name, momentum, lr_bounds);
  check_scalar("lr_tensor", lr_tensor);
  check_scalar("grad_scale", grad_scale);
  check_scalar("found_inf", found_inf);
  if (found_inf && found_inf->item<double>() != 0) return;
  if (lr_tensor) lr = lr_tensor->item<double>();
  const Normalize normalize = parse_normalize(normalize_name);
  How how{normalize, {1 - lr * weight_decay, momentum, beta2, eps}, std::nullopt};
  if (grad_scale) how.grad_scale = grad_scale->item<double>();
  const std::vector<double> lrs = bounded(lr, lr_bounds, layer_sizes.size());
  for (const Run& run : cut_runs(params, layer_sizes, normalize)) {
    const auto first = lrs.begin() + run.layer;
    update_run(params.slice(run.param, run.params), gradients.slice(run.param, run.params),
               exp_avgs.empty() ? exp_avgs : exp_avgs.slice(run.param, run.params),
               exp_avg_sqs.slice(run.square, run.squares), steps.slice(run.layer, run.layers),
               slice(bases, run), slice(core_inverses, run), slice(shifts, run),
               layer_sizes.slice(run.layer, run.layers), {first, first + run.layers}, how);
  }
}

}  // namespace
}  // namespace CPU_CAPABILITY

TORCH_LIBRARY_IMPL(gls_fused, CPU, m) { m.impl("update_layers_", &update_layers_); }

}  // namespace gls_fused
