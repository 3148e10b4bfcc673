// Orthogonal steps of all layers, on the CPU, before and after their factors:
//
//   D = D0 P where the backward has not applied P,
//   m <- momentum m + (1 - momentum) D,   N = momentum m + (1 - momentum) D
//   W <- W (1 - lr weight_decay) - min(lr, bound) update
//
// After D memory bound: D, m, N and update, W are each read and written once, 32 bytes per float32
// parameter, by two calls for all layers, whatever their number. See
// gls_fused.reference.update_spectral_layers_.

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <c10/util/accumulate.h>

#include <cmath>
#include <vector>

#include "../check.h"
#include "products.h"
#include "rows.h"
#include "steps.h"
#include "threads.h"

namespace gls_fused {
inline namespace CPU_CAPABILITY {
namespace {

using at::Tensor;

void check_alike(const char* op, const Tensor& first, const Tensor& other) {
  check_device(op, first, other);
  TORCH_CHECK(other.scalar_type() == first.scalar_type(), op, ": expected tensors of one dtype, got ",
              other.scalar_type(), " beside ", first.scalar_type());
}

void check_bounds(const char* op, const std::optional<Tensor>& bounds, size_t layers) {
  TORCH_CHECK(!bounds || bounds->sizes() == at::IntArrayRef{static_cast<int64_t>(layers)}, op,
              ": expected lr_bounds [", layers, "], got ", bounds ? bounds->sizes() : at::IntArrayRef{});
}

// Rows of a layer's weight.
struct Rows {
  size_t layer;
  int64_t begin, end;
};

std::vector<Rows> cut_rows(const std::vector<Tensor>& weights) {
  std::vector<Rows> blocks;
  for (size_t layer = 0; layer < weights.size(); ++layer) {
    const int64_t rows = weights[layer].size(0), columns = weights[layer].size(1);
    const int64_t most = std::max<int64_t>(1, kChunk / std::max<int64_t>(columns, 1));
    for (int64_t begin = 0; begin < rows; begin += most) {
      blocks.push_back({layer, begin, std::min(rows, begin + most)});
    }
  }
  return blocks;
}

// As torch.lerp: exact at either end.
template <typename Value, typename Scalar>
Value lerp(Value from, Value to, Scalar weight) {
  if (weight < Scalar(0.5)) return from + (to - from) * Value(weight);
  return to - (to - from) * Value(Scalar(1) - weight);
}

// m and N of n elements.
template <typename T>
void blend(const T* direction, T* exp_avg, T* average, int64_t n, double momentum) {
  using Vec = at::vec::Vectorized<T>;
  const T share = 1 - momentum, kept = momentum;
  const auto run = [&](auto d, auto& m) {
    m = lerp(m, d, share);
    return lerp(d, m, kept);
  };
  int64_t i = 0;
  for (; i + Vec::size() <= n; i += Vec::size()) {
    Vec m = Vec::loadu(exp_avg + i);
    run(Vec::loadu(direction + i), m).store(average + i);
    m.store(exp_avg + i);
  }
  for (; i < n; ++i) average[i] = run(direction[i], exp_avg[i]);
}

// The step of "row" for a bias [m], beside a weight of `columns` whose squares of D [m] are given.
template <typename T>
void move_bias(T* bias, const T* direction, T* exp_avg, T* exp_avg_sq, const double* squares,
               int64_t m, int64_t columns, double step, double lr, double decayed, double momentum,
               double beta2, double eps) {
  const double correction = 1 - std::pow(beta2, step);
  const double rate = lr / (momentum > 0 ? 1 - std::pow(momentum, step) : 1);
  for (int64_t i = 0; i < m; ++i) {
    const double own = direction[i], mean = (squares[i] + own * own) / (columns + 1);
    exp_avg[i] = lerp(exp_avg[i], direction[i], T(1 - momentum));
    exp_avg_sq[i] = blend_square(exp_avg_sq[i], mean, beta2);
    const double root = std::sqrt(exp_avg_sq[i] / correction) + eps;
    bias[i] = static_cast<T>(bias[i] * decayed - rate * exp_avg[i] / root);
  }
}

// The momenta of all layers; biases move. The N [m, k] of the weights.
std::vector<Tensor> blend_directions_(at::TensorList params, at::TensorList gradients,
                                      at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                                      at::TensorList steps, const OptionalTensors& bases,
                                      const OptionalTensors& core_inverses,
                                      const OptionalTensors& shifts, at::IntArrayRef layer_sizes,
                                      double lr, double momentum, double beta2, double eps,
                                      double weight_decay,
                                      const std::optional<Tensor>& lr_bounds) {
  const size_t layers = layer_sizes.size();
  TORCH_CHECK(steps.size() == layers && exp_avg_sqs.size() == layers,
              "blend_directions_: expected a step and mean squares for each of ", layers,
              " layers, got ", steps.size(), " and ", exp_avg_sqs.size());
  TORCH_CHECK(gradients.size() == params.size() && exp_avgs.size() == params.size(),
              "blend_directions_: expected gradients and exp_avgs for each of ", params.size(),
              " params, got ", gradients.size(), " and ", exp_avgs.size());
  TORCH_CHECK(bases.size() == layers && core_inverses.size() == layers && shifts.size() == layers,
              "blend_directions_: expected ", layers, " bases, core_inverses and shifts, got ",
              bases.size(), ", ", core_inverses.size(), " and ", shifts.size());
  std::vector<size_t> firsts;
  std::vector<Tensor> found, momenta, averages;
  size_t next = 0;
  for (size_t layer = 0; layer < layers; ++layer) {
    const int64_t size = layer_sizes[layer];
    TORCH_CHECK((size == 1 || size == 2) && next + size <= params.size(),
                "blend_directions_: expected layer_sizes of 1 or 2 that add up to ", params.size(),
                " params, got ", layer_sizes);
    TORCH_CHECK(steps[layer].dim() == 0, "blend_directions_: expected steps [], got ",
                steps[layer].sizes());
    check_device("blend_directions_", params[0], steps[layer]);
    firsts.push_back(next);
    for (size_t i = next; i < next + size; ++i) {
      TORCH_CHECK(params[i].dim() > 0 && gradients[i].sizes() == params[i].sizes() &&
                      exp_avgs[i].sizes() == params[i].sizes(),
                  "blend_directions_: expected a gradient and exp_avg shaped as the parameter, ",
                  params[i].sizes(), ", got ", gradients[i].sizes(), " and ",
                  exp_avgs[i].sizes());
      TORCH_CHECK(exp_avgs[i].is_contiguous(), "blend_directions_: expected exp_avgs contiguous");
      for (const Tensor& other : {params[i], gradients[i], exp_avgs[i]}) {
        check_alike("blend_directions_", params[0], other);
      }
    }
    if (size == 2) {
      const int64_t outputs = params[next].size(0);
      const Tensor& squares = exp_avg_sqs[layer];
      check_alike("blend_directions_", params[0], squares);
      TORCH_CHECK(params[next + 1].sizes() == at::IntArrayRef{outputs} &&
                      params[next + 1].is_contiguous() &&
                      squares.sizes() == params[next + 1].sizes() && squares.is_contiguous(),
                  "blend_directions_: expected a contiguous bias and mean squares of [", outputs,
                  "], got ", params[next + 1].sizes(), " and ", squares.sizes());
    }
    const std::optional<Tensor> basis = bases.get(layer), core = core_inverses.get(layer);
    const std::optional<Tensor> shift = shifts.get(layer);
    TORCH_CHECK(basis.has_value() == core.has_value() && basis.has_value() == shift.has_value(),
                "blend_directions_: expected basis, core_inverse and shift of a layer together, got ",
                basis.has_value(), ", ", core.has_value(), " and ", shift.has_value());
    if (basis) {
      const int64_t columns = c10::multiply_integers(params[next].sizes().slice(1));
      check_inverse("blend_directions_", params[next], columns + (size == 2), *basis, *core, *shift);
      check_alike("blend_directions_", params[0], *basis);
    }
    next += size;
  }
  TORCH_CHECK(next == params.size(), "blend_directions_: expected layer_sizes that add up to ",
              params.size(), " params, got ", layer_sizes);
  check_bounds("blend_directions_", lr_bounds, layers);
  if (params.empty()) return averages;
  std::vector<Tensor> directions(gradients.begin(), gradients.end());
  precondition_layers(directions, layer_sizes, bases, core_inverses, shifts);
  for (size_t layer = 0; layer < layers; ++layer) {
    const Tensor direction = directions[firsts[layer]].contiguous().flatten(1);
    found.push_back(direction.dim() == 1 ? direction.unsqueeze(1) : direction);
    momenta.push_back(exp_avgs[firsts[layer]].view(found.back().sizes()));
    averages.push_back(at::empty(found.back().sizes(), found.back().options()));
  }
  const std::vector<double> lrs = bounded(lr, lr_bounds, layers);
  const std::vector<Rows> blocks = cut_rows(found);
  const int64_t count = blocks.size();
  for (const Tensor& step : steps) advance(step);
  AT_DISPATCH_FLOATING_TYPES(params[0].scalar_type(), "blend_directions_", [&] {
    std::vector<std::vector<double>> squares(layers);
    for (size_t layer = 0; layer < layers; ++layer) {
      if (layer_sizes[layer] == 2) squares[layer].resize(found[layer].size(0));
    }
    share(0, count, grain(count), [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        const Rows& rows = blocks[block];
        const int64_t columns = found[rows.layer].size(1), at = rows.begin * columns;
        const scalar_t* direction = found[rows.layer].template const_data_ptr<scalar_t>();
        blend<scalar_t>(direction + at, momenta[rows.layer].template data_ptr<scalar_t>() + at,
                        averages[rows.layer].template data_ptr<scalar_t>() + at,
                        (rows.end - rows.begin) * columns, momentum);
        if (squares[rows.layer].empty()) continue;
        for (int64_t i = rows.begin; i < rows.end; ++i) {
          squares[rows.layer][i] = sum_squares(direction + i * columns, columns);
        }
      }
    });
    for (size_t layer = 0; layer < layers; ++layer) {
      if (layer_sizes[layer] == 1) continue;
      const size_t bias = firsts[layer] + 1;
      const Tensor direction = directions[bias].contiguous();
      move_bias<scalar_t>(params[bias].data_ptr<scalar_t>(), direction.const_data_ptr<scalar_t>(),
                          exp_avgs[bias].data_ptr<scalar_t>(),
                          exp_avg_sqs[layer].data_ptr<scalar_t>(), squares[layer].data(),
                          found[layer].size(0), found[layer].size(1), count_of(steps[layer]),
                          lrs[layer], 1 - lr * weight_decay, momentum, beta2, eps);
    }
  });
  return averages;
}

// w <- w decayed - rate u of rows of W; of a turned W, whose columns lie one after the other, those.
template <typename T>
void move_rows(T* __restrict w, bool turned, const T* __restrict u, int64_t begin, int64_t end,
               int64_t rows, int64_t columns, T decayed, T rate) {
  if (!turned) {
    for (int64_t i = begin * columns; i < end * columns; ++i) w[i] = w[i] * decayed - rate * u[i];
    return;
  }
  constexpr int64_t kBlock = 16;
  for (int64_t j = 0; j < columns; j += kBlock) {
    for (int64_t i = begin; i < end; i += kBlock) {
      for (int64_t c = j; c < std::min(columns, j + kBlock); ++c) {
        for (int64_t r = i; r < std::min(end, i + kBlock); ++r) {
          w[c * rows + r] = w[c * rows + r] * decayed - rate * u[r * columns + c];
        }
      }
    }
  }
}

// Of weights that are contiguous, or whose transpose is.
void move_weights_(at::TensorList weights, at::TensorList updates, double lr, double weight_decay,
                   const std::optional<Tensor>& lr_bounds) {
  const size_t layers = weights.size();
  TORCH_CHECK(updates.size() == layers, "move_weights_: expected an update for each of ", layers,
              " weights, got ", updates.size());
  check_bounds("move_weights_", lr_bounds, layers);
  if (layers == 0) return;
  std::vector<Tensor> found;
  std::vector<bool> turned;
  for (size_t layer = 0; layer < layers; ++layer) {
    const Tensor &weight = weights[layer], &update = updates[layer];
    TORCH_CHECK(update.dim() == 2 && update.numel() == weight.numel() && weight.dim() > 0 &&
                    update.size(0) == weight.size(0),
                "move_weights_: expected an update [m, k] for a weight of ", weight.sizes(),
                ", got ", update.sizes());
    check_alike("move_weights_", weights[0], weight);
    check_alike("move_weights_", weights[0], update);
    turned.push_back(is_turned(weight));
    TORCH_CHECK(turned.back() || weight.is_contiguous(),
                "move_weights_: expected weights that are contiguous or turned, got strides ",
                weight.strides());
    found.push_back(update.contiguous());
  }
  const std::vector<double> lrs = bounded(lr, lr_bounds, layers);
  const std::vector<Rows> blocks = cut_rows(found);
  const int64_t count = blocks.size();
  AT_DISPATCH_FLOATING_TYPES(weights[0].scalar_type(), "move_weights_", [&] {
    share(0, count, grain(count), [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        const Rows& rows = blocks[block];
        const Tensor& update = found[rows.layer];
        move_rows<scalar_t>(weights[rows.layer].data_ptr<scalar_t>(), turned[rows.layer],
                            update.const_data_ptr<scalar_t>(), rows.begin, rows.end,
                            update.size(0), update.size(1), 1 - lr * weight_decay,
                            lrs[rows.layer]);
      }
    });
  });
}

}  // namespace
}  // namespace CPU_CAPABILITY

TORCH_LIBRARY_IMPL(gls_fused, CPU, m) {
  m.impl("blend_directions_", &blend_directions_);
  m.impl("move_weights_", &move_weights_);
}

}  // namespace gls_fused
