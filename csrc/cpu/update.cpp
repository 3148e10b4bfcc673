// The update of all layers in one call, on the CPU:
//
//   D = D0 P where the backward has not applied P,
//   m <- momentum m + (1 - momentum) D,   v <- beta2 v + (1 - beta2) mean(D^2)
//   W <- W (1 - lr weight_decay) - min(growth lr, bound) update
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
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <c10/util/accumulate.h>

#include <cmath>
#include <optional>
#include <vector>

#include "../check.h"
#include "../versions.h"
#include "products.h"
#include "rows.h"
#include "steps.h"
#include "threads.h"

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

// Fewer elements than so many are one thread's, which is not worth waking another.
constexpr int64_t kLeastShared = 8 * kChunk;

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

// Per layer, over all its slices; in parallel, and the same for any number of threads.
template <typename state_t, typename param_t>
std::vector<double> sum_layers(const std::vector<Span<param_t>>& spans, size_t layers) {
  std::vector<Chunk> chunks = cut(spans);
  std::vector<double> partial(chunks.size()), totals(layers, 0);
  share(0, chunks.size(), grain(chunks.size()), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      partial[i] = sum_squares_as<state_t>(spans[chunks[i].slice].data + chunks[i].begin,
                                           chunks[i].end - chunks[i].begin);
    }
  });
  for (size_t i = 0; i < chunks.size(); ++i) totals[spans[chunks[i].slice].layer] += partial[i];
  return totals;
}

// One element of a chunk. `share` is 1 - momentum and `fresh` 1 - beta2, whose digits a difference in
// single precision would lose; `rate` is lr times the layer's scale over the bias correction.
template <bool kMomentum, bool kElementwise, typename Value, typename Scalar>
inline Value update_element(Value param, Value direction, Value& exp_avg, Value& exp_avg_sq,
                            Scalar decayed, Scalar share, Scalar beta2, Scalar fresh, Scalar eps,
                            Scalar correction, Scalar rate) {
  Value average = direction;
  if constexpr (kMomentum) {
    exp_avg = exp_avg + (direction - exp_avg) * Value(share);
    average = exp_avg;
  }
  if constexpr (kElementwise) {
    exp_avg_sq = exp_avg_sq * Value(beta2) + direction * direction * Value(fresh);
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
  const state_t decayed = scalars.decayed, share = 1 - scalars.momentum, eps = scalars.eps;
  const state_t beta2 = scalars.beta2, fresh = 1 - scalars.beta2;
  const state_t corrected = correction, step = rate;
  int64_t i = begin;
  if constexpr (std::is_same_v<param_t, state_t>) {
    for (; i + Vec::size() <= end; i += Vec::size()) {
      Vec exp_avg(0), exp_avg_sq(0);
      if constexpr (kMomentum) exp_avg = Vec::loadu(slice.exp_avg + i);
      if constexpr (kElementwise) exp_avg_sq = Vec::loadu(slice.exp_avg_sq + i);
      const Vec updated = update_element<kMomentum, kElementwise>(
          Vec::loadu(slice.param + i), Vec::loadu(slice.direction + i), exp_avg, exp_avg_sq,
          decayed, share, beta2, fresh, eps, corrected, step);
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
        exp_avg_sq, decayed, share, beta2, fresh, eps, corrected, step));
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
      state_t& v = *exp_avg_sqs[layer].data_ptr<state_t>();
      const double mean = numels[layer] > 0 ? squares[layer] / numels[layer] : 0;
      v = blend_square(v, mean, scalars.beta2);
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
  share(0, count, grain(count), [&](int64_t first, int64_t last) {
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

// A weight or bias [m, columns], and its first column in c.
template <typename param_t, typename state_t>
struct Part {
  param_t* param;
  const param_t* direction;
  state_t* exp_avg;  // null when momentum is 0
  int64_t columns;
  int64_t first;
};

// sums[j] += x[j]^2 and their total. They do not overlap: a compiler that has to ask makes two loops of
// one, which round differently, and the addresses decide which runs.
template <typename state_t, typename param_t>
double add_squares(const param_t* __restrict x, int64_t n, state_t* __restrict sums) {
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

// A line of a layer whose denominator is line_root across_roots[j] + eps, or is in the rate already
// (where across_roots is null).
template <bool kMomentum, bool kFactored, typename param_t, typename state_t>
void update_line(param_t* param, const param_t* direction, state_t* exp_avg,
                 const state_t* across_roots, int64_t n, const Scalars& scalars, double line_root,
                 double rate) {
  using Vec = at::vec::Vectorized<state_t>;
  const state_t decayed = scalars.decayed, average = 1 - scalars.momentum, eps = scalars.eps;
  const state_t root = line_root, step = rate;
  const auto update = [&](auto w, auto d, auto& m, auto across_root) {
    using Value = decltype(w);
    if constexpr (kMomentum) {
      m = m + (d - m) * Value(average);
      d = m;
    }
    if constexpr (kFactored) d = d / (Value(root) * across_root + Value(eps));
    return w * Value(decayed) - d * Value(step);
  };
  int64_t j = 0;
  if constexpr (std::is_same_v<param_t, state_t>) {
    for (; j + Vec::size() <= n; j += Vec::size()) {
      Vec m(0), across_root(0);
      if constexpr (kMomentum) m = Vec::loadu(exp_avg + j);
      if constexpr (kFactored) across_root = Vec::loadu(across_roots + j);
      update(Vec::loadu(param + j), Vec::loadu(direction + j), m, across_root).store(param + j);
      if constexpr (kMomentum) m.store(exp_avg + j);
    }
  }
  for (; j < n; ++j) {
    state_t m = kMomentum ? exp_avg[j] : state_t(0);
    const state_t across_root = kFactored ? across_roots[j] : state_t(0);
    param[j] = static_cast<param_t>(
        update(static_cast<state_t>(param[j]), static_cast<state_t>(direction[j]), m, across_root));
    if constexpr (kMomentum) exp_avg[j] = m;
  }
}

// The step of one layer with mean squares v [m] per row and, for "factored", c [d] per column.
//
// It goes along memory, line by line: a line is a row of all parts or, where the weight is turned, a
// column of one of them. Each has a mean square, and so has what lies at one place of all lines. Of
// both, D is read for the squares of all lines, in stretches, before the first line moves; v alone of
// rows is a line's own. A bias beside rows, of each of which it has one element, then goes along its own
// memory. Threads share the pieces of all layers, see `run_pieces`.
template <typename param_t, typename state_t>
class AxesStep {
 public:
  AxesStep(std::vector<Part<param_t, state_t>> parts, bool turned, int64_t outputs, double step,
           double lr, const Scalars& scalars, state_t* row_squares, state_t* column_squares)
      : parts_(std::move(parts)),
        turned_(turned),
        scalars_(scalars),
        row_squares_(row_squares),
        column_squares_(column_squares) {
    dim_ = parts_.back().first + parts_.back().columns;
    lines_ = turned ? dim_ : outputs;
    length_ = turned ? outputs : dim_;
    correction_ = 1 - std::pow(scalars.beta2, step);
    rate_ = lr / (scalars.momentum > 0 ? 1 - std::pow(scalars.momentum, step) : 1);
    chunk_ = std::max<int64_t>(1, kChunk / std::max<int64_t>(length_, 1));
    chunks_ = (lines_ + chunk_ - 1) / chunk_;
    sums_first_ = turned_ || column_squares_;
    if (!sums_first_) return;
    // In a fixed number of stretches and then in their order, so that the result does not depend on
    // the number of threads.
    stretches_ = std::min<int64_t>(16, chunks_);
    if (!turned_ && parts_.size() > 1) {
      bias_ = parts_.back();
      parts_.pop_back();
    }
    along_.resize(lines_);
    partial_.resize(stretches_ * length_);
  }

  int64_t elements() const { return lines_ * length_; }
  int64_t stretches() const { return stretches_; }
  int64_t chunks() const { return chunks_; }

  void sum(int64_t stretch) {
    const int64_t end = lines_ * (stretch + 1) / stretches_;
    for (int64_t i = lines_ * stretch / stretches_; i < end; ++i) {
      for_parts(i, [&](const auto& part, int64_t at, int64_t count, int64_t place) {
        along_[i] += add_squares(part.direction + at, count, &partial_[stretch * length_ + place]);
      });
    }
    if (!bias_) return;
    state_t& across = partial_[stretch * length_ + bias_->first];
    for (int64_t i = lines_ * stretch / stretches_; i < end; ++i) {
      const state_t value = static_cast<state_t>(bias_->direction[i]), square = value * value;
      along_[i] += square;
      across += square;
    }
  }

  // After all sums, what the lines are divided by.
  void settle() {
    if (!sums_first_) return;
    std::vector<double> across(length_, 0);
    for (int64_t stretch = 0; stretch < stretches_; ++stretch) {
      for (int64_t j = 0; j < length_; ++j) across[j] += partial_[stretch * length_ + j];
    }
    std::vector<double>& by_row = turned_ ? across : along_;
    std::vector<double>& by_column = turned_ ? along_ : across;
    double total = 0;
    for (size_t i = 0; i < by_row.size(); ++i) total += blend(row_squares_[i], by_row[i], dim_);
    if (column_squares_) {
      const double rows = std::max<double>(by_row.size(), 1);
      const double mean = std::max<double>(total / rows, std::numeric_limits<state_t>::min());
      for (size_t i = 0; i < by_row.size(); ++i) by_row[i] = std::sqrt(row_squares_[i] / mean);
      for (size_t j = 0; j < by_column.size(); ++j) {
        by_column[j] = root_of(blend(column_squares_[j], by_column[j], by_row.size()));
      }
    } else {
      for (size_t i = 0; i < by_row.size(); ++i) by_row[i] = root_of(row_squares_[i]) + scalars_.eps;
      std::fill(by_column.begin(), by_column.end(), 1);
      scalars_.eps = 0;
    }
    line_roots_.assign(along_.begin(), along_.end());
    across_roots_.assign(across.begin(), across.end());
  }

  void update(int64_t chunk) {
    const int64_t first = chunk * chunk_, end = std::min(lines_, first + chunk_);
    if (sums_first_) {
      // Along memory, as it is then read ahead; `run_pieces` takes the chunks backwards.
      for (int64_t i = first; i < end; ++i) {
        update_parts(i, across_roots_.data(), line_roots_[i], rate_);
      }
      if (bias_) {
        update_part(*bias_, first, end - first, line_roots_.data() + first,
                    across_roots_[bias_->first], rate_);
      }
      return;
    }
    for (int64_t i = first; i < end; ++i) {
      double squares = 0;
      for_parts(i, [&](const auto& part, int64_t at, int64_t count, int64_t) {
        squares += sum_squares_as<state_t>(part.direction + at, count);
      });
      blend(row_squares_[i], squares, dim_);
      update_parts(i, nullptr, 0, rate_ / (root_of(row_squares_[i]) + scalars_.eps));
    }
  }

 private:
  // What a line has of each part: where in it, how much, and its first place in the line.
  template <typename Body>
  void for_parts(int64_t line, const Body& body) const {
    for (const auto& part : parts_) {
      if (!turned_) {
        body(part, line * part.columns, part.columns, part.first);
      } else if (line >= part.first && line < part.first + part.columns) {
        body(part, (line - part.first) * length_, length_, 0);
      }
    }
  }

  double root_of(double square) const { return std::sqrt(square / correction_); }

  state_t blend(state_t& square, double sum, int64_t count) const {
    return square = blend_square(square, count > 0 ? sum / count : 0, scalars_.beta2);
  }

  void update_parts(int64_t line, const state_t* across_roots, double line_root,
                    double rate) const {
    for_parts(line, [&](const auto& part, int64_t at, int64_t count, int64_t place) {
      update_part(part, at, count, across_roots ? across_roots + place : nullptr, line_root, rate);
    });
  }

  // Elements of a part that lie one after another.
  void update_part(const Part<param_t, state_t>& part, int64_t at, int64_t count,
                   const state_t* across_roots, double line_root, double rate) const {
    const auto run = [&](auto momentum, auto factored) {
      update_line<decltype(momentum)::value, decltype(factored)::value>(
          part.param + at, part.direction + at, part.exp_avg ? part.exp_avg + at : nullptr,
          across_roots, count, scalars_, line_root, rate);
    };
    if (part.exp_avg && across_roots) run(std::true_type{}, std::true_type{});
    else if (part.exp_avg) run(std::true_type{}, std::false_type{});
    else if (across_roots) run(std::false_type{}, std::true_type{});
    else run(std::false_type{}, std::false_type{});
  }

  std::vector<Part<param_t, state_t>> parts_;
  std::optional<Part<param_t, state_t>> bias_;
  bool turned_, sums_first_;
  Scalars scalars_;
  state_t *row_squares_, *column_squares_;
  int64_t dim_, lines_, length_, chunk_, chunks_, stretches_ = 0;
  double correction_, rate_;
  std::vector<double> along_;
  std::vector<state_t> partial_, line_roots_, across_roots_;
};

// Every piece of every layer once. A thread has as many elements as another and, in two calls in
// opposite orders, about the same ones, so that it finds last what it has read last.
template <typename Steps, typename Count, typename Run>
void run_pieces(Steps& steps, const Count& count_of_pieces, bool backwards, const Run& run) {
  std::vector<std::pair<size_t, int64_t>> pieces;
  std::vector<int64_t> starts;
  int64_t total = 0;
  for (size_t i = 0; i < steps.size(); ++i) {
    const int64_t count = count_of_pieces(steps[i]), elements = steps[i].elements();
    for (int64_t piece = 0; piece < count; ++piece) {
      pieces.emplace_back(i, piece);
      starts.push_back(total + elements * piece / count);
    }
    total += elements;
  }
  const int64_t last = pieces.size();
  const int64_t threads =
      total < kLeastShared ? 1 : std::min<int64_t>(at::get_num_threads(), last);
  const auto first_of = [&](int64_t thread) {
    if (thread == threads) return last;
    return std::lower_bound(starts.begin(), starts.end(), total * thread / threads) -
           starts.begin();
  };
  share(0, threads, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = first_of(begin), count = first_of(end) - first;
    for (int64_t i = 0; i < count; ++i) {
      const auto [step, piece] = pieces[first + (backwards ? count - 1 - i : i)];
      run(steps[step], piece);
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
    // Rows and columns lie along memory.
    const bool dense = axes ? params[i].is_contiguous() || is_turned(params[i])
                            : params[i].is_non_overlapping_and_dense();
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
      std::vector<AxesStep<param_t, state_t>> axes_steps;
      axes_steps.reserve(layers);
      for (size_t layer = 0, i = 0; layer < layers; i += layer_sizes[layer++]) {
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
        axes_steps.emplace_back(std::move(parts), is_turned(flat_params[i]), params[i].size(0),
                                count_of(steps[layer]), lrs[layer], scalars,
                                squares[0].data_ptr<state_t>(),
                                each == 2 ? squares[1].data_ptr<state_t>() : nullptr);
      }
      run_pieces(axes_steps, [](const auto& step) { return step.stretches(); }, false,
                 [](auto& step, int64_t stretch) { step.sum(stretch); });
      for (auto& step : axes_steps) step.settle();
      run_pieces(axes_steps, [](const auto& step) { return step.chunks(); }, true,
                 [](auto& step, int64_t chunk) { step.update(chunk); });
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
                    const std::optional<at::Tensor>& rates) {
  if (params.empty()) return;
  check_update(params, gradients, exp_avgs, exp_avg_sqs, steps, bases, core_inverses, shifts,
               layer_sizes, normalize_name, momentum, rates);
  advance_versions({params, exp_avgs, exp_avg_sqs, steps});
  check_scalar("lr_tensor", lr_tensor);
  check_scalar("grad_scale", grad_scale);
  check_scalar("found_inf", found_inf);
  if (found_inf && found_inf->item<double>() != 0) return;
  if (lr_tensor) lr = lr_tensor->item<double>();
  const Normalize normalize = parse_normalize(normalize_name);
  How how{normalize, {1 - lr * weight_decay, momentum, beta2, eps}, std::nullopt};
  if (grad_scale) how.grad_scale = grad_scale->item<double>();
  const std::vector<double> lrs = rates_within(lr, rates, layer_sizes.size());
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
