// The update of all layers in one call, on the CPU:
//
//   m <- momentum m + (1 - momentum) D,   v <- beta2 v + (1 - beta2) mean(D^2)
//   W <- W (1 - lr weight_decay) - lr update
//
// Memory bound. Each array is read and written once, except that D is read once more before the
// write where a layer's norm decides its step ("rms", "sgd"): bytes per float32 parameter are
// 16 with momentum 0 and 24 with momentum, 4 fewer for "none"; Adam moves 28.
//
// Work is cut into chunks of a fixed size, and sums of squares are taken per chunk and then in
// chunk order, so that the result does not depend on the number of threads.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

namespace gls_fused {
namespace {

// 128 KiB of float32: long enough to hide a thread's start, short enough to share small models.
constexpr int64_t kChunk = 32768;

enum class Normalize { kRms, kAdam, kSgd, kNone };

Normalize parse_normalize(c10::string_view name) {
  if (name == "rms") return Normalize::kRms;
  if (name == "adam") return Normalize::kAdam;
  if (name == "sgd") return Normalize::kSgd;
  TORCH_CHECK(name == "none", "update_layers_: expected normalize rms, adam, sgd or none, got ",
              name);
  return Normalize::kNone;
}

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

struct Chunk {
  size_t slice;
  int64_t begin;
  int64_t end;
};

template <typename param_t, typename state_t>
double sum_squares(const param_t* x, int64_t n) {
  using Vec = at::vec::Vectorized<state_t>;
  double total = 0;
  // Partial sums of 4096 elements keep float32's rounding below that of the elements.
  for (int64_t begin = 0; begin < n; begin += 4096) {
    const int64_t end = std::min(n, begin + 4096);
    state_t sum = 0;
    int64_t i = begin;
    if constexpr (std::is_same_v<param_t, state_t>) {
      Vec a(0), b(0), c(0), d(0);
      for (; i + 4 * Vec::size() <= end; i += 4 * Vec::size()) {
        const Vec x0 = Vec::loadu(x + i), x1 = Vec::loadu(x + i + Vec::size());
        const Vec x2 = Vec::loadu(x + i + 2 * Vec::size());
        const Vec x3 = Vec::loadu(x + i + 3 * Vec::size());
        a = at::vec::fmadd(x0, x0, a);
        b = at::vec::fmadd(x1, x1, b);
        c = at::vec::fmadd(x2, x2, c);
        d = at::vec::fmadd(x3, x3, d);
      }
      sum = at::vec::vec_reduce_all([](Vec& p, Vec& q) { return p + q; }, (a + b) + (c + d));
    }
    for (; i < end; ++i) {
      const state_t value = static_cast<state_t>(x[i]);
      sum += value * value;
    }
    total += sum;
  }
  return total;
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
                 at::TensorList steps, at::TensorList gradient_norms, Normalize normalize,
                 double lr, const Scalars& scalars) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < slices.size(); ++i) {
    for (int64_t begin = 0; begin < slices[i].numel; begin += kChunk) {
      chunks.push_back({i, begin, std::min(slices[i].numel, begin + kChunk)});
    }
  }
  const int64_t count = chunks.size();
  const size_t layers = steps.size();

  std::vector<double> squares(layers, 0), numels(layers, 0);
  if (normalize == Normalize::kRms || normalize == Normalize::kSgd) {
    std::vector<double> partial(count);
    at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const auto& slice = slices[chunks[i].slice];
        partial[i] = sum_squares<param_t, state_t>(slice.direction + chunks[i].begin,
                                                   chunks[i].end - chunks[i].begin);
      }
    });
    for (int64_t i = 0; i < count; ++i) {
      const size_t layer = slices[chunks[i].slice].layer;
      squares[layer] += partial[i];
      numels[layer] += chunks[i].end - chunks[i].begin;
    }
  }

  std::vector<double> rates(layers), corrections(layers, 1);
  for (size_t layer = 0; layer < layers; ++layer) {
    const double step = steps[layer].item<double>();
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
      scale = norm == 0 ? 1 : gradient_norms[layer].item<double>() / norm;
    }
    const double correction =
        scalars.momentum > 0 ? 1 - std::pow(scalars.momentum, step) : 1;
    rates[layer] = lr * scale / correction;
  }

  at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
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

// `tensor` itself where its memory is laid out as `like`'s and of this dtype, else a copy that is.
at::Tensor in_layout_of(const at::Tensor& tensor, const at::Tensor& like, at::ScalarType type) {
  TORCH_CHECK(tensor.sizes() == like.sizes(), "update_layers_: expected shape ", like.sizes(),
              ", got ", tensor.sizes());
  if (tensor.strides() == like.strides() && tensor.scalar_type() == type) return tensor;
  at::Tensor copy = at::empty_like(like, like.options().dtype(type));
  copy.copy_(tensor);
  return copy;
}

void update_layers_(at::TensorList params, at::TensorList directions, at::TensorList exp_avgs,
                    at::TensorList exp_avg_sqs, at::TensorList steps,
                    at::TensorList gradient_norms, at::IntArrayRef layer_sizes,
                    c10::string_view normalize_name, double lr, double momentum, double beta2,
                    double eps, double weight_decay) {
  if (params.empty()) return;
  const Normalize normalize = parse_normalize(normalize_name);
  const size_t layers = layer_sizes.size();
  TORCH_CHECK(directions.size() == params.size(), "update_layers_: expected ", params.size(),
              " directions, got ", directions.size());
  TORCH_CHECK(steps.size() == layers, "update_layers_: expected ", layers, " steps, got ",
              steps.size());
  TORCH_CHECK(exp_avgs.size() == (momentum > 0 ? params.size() : 0),
              "update_layers_: expected exp_avgs exactly with momentum, got ", exp_avgs.size(),
              " for momentum ", momentum);
  const size_t squares = normalize == Normalize::kRms    ? layers
                         : normalize == Normalize::kAdam ? params.size()
                                                         : 0;
  TORCH_CHECK(exp_avg_sqs.size() == squares, "update_layers_: expected ", squares,
              " exp_avg_sqs for normalize ", normalize_name, ", got ", exp_avg_sqs.size());
  TORCH_CHECK(gradient_norms.size() == (normalize == Normalize::kSgd ? layers : 0),
              "update_layers_: expected gradient_norms exactly for normalize sgd, got ",
              gradient_norms.size());
  const at::ScalarType type = params[0].scalar_type();
  const at::ScalarType state_type = at::toOpMathType(type);

  // Flat memory for every array, with copies standing in for layouts that are not.
  std::vector<at::Tensor> flat_params, flat_directions, flat_averages, flat_squares;
  for (size_t i = 0; i < params.size(); ++i) {
    TORCH_CHECK(params[i].scalar_type() == type && params[i].device().is_cpu(),
                "update_layers_: expected CPU parameters of dtype ", type, ", got ",
                params[i].scalar_type(), " on ", params[i].device());
    const bool dense = params[i].is_non_overlapping_and_dense();
    flat_params.push_back(dense ? params[i] : params[i].contiguous());
    const at::Tensor& like = flat_params.back();
    flat_directions.push_back(in_layout_of(directions[i], like, type));
    if (momentum > 0) flat_averages.push_back(in_layout_of(exp_avgs[i], like, state_type));
    if (normalize == Normalize::kAdam) {
      flat_squares.push_back(in_layout_of(exp_avg_sqs[i], like, state_type));
    }
  }

  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, type, "update_layers_", [&] {
    using param_t = scalar_t;
    using state_t = at::opmath_type<scalar_t>;
    std::vector<Slice<param_t, state_t>> slices;
    size_t i = 0;
    for (size_t layer = 0; layer < layers; ++layer) {
      for (int64_t j = 0; j < layer_sizes[layer]; ++j, ++i) {
        TORCH_CHECK(i < params.size(), "update_layers_: layer_sizes sum past ", params.size());
        slices.push_back(
            {flat_params[i].data_ptr<param_t>(), flat_directions[i].const_data_ptr<param_t>(),
             momentum > 0 ? flat_averages[i].data_ptr<state_t>() : nullptr,
             normalize == Normalize::kAdam ? flat_squares[i].data_ptr<state_t>() : nullptr,
             flat_params[i].numel(), layer});
      }
    }
    TORCH_CHECK(i == params.size(), "update_layers_: expected layer_sizes to sum to ",
                params.size(), ", got ", i);
    const Scalars scalars{1 - lr * weight_decay, momentum, beta2, eps};
    update_flat(slices, exp_avg_sqs, steps, gradient_norms, normalize, lr, scalars);
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

}  // namespace

TORCH_LIBRARY_IMPL(gls_fused, CPU, m) { m.impl("update_layers_", &update_layers_); }

}  // namespace gls_fused
