// The orthogonal factors of many matrices, on the CPU: gls_fused.reference.orthogonalize.
//
// BLAS shares each of some twenty products of a factor among the threads, and waking them takes as
// long as a product of this size. Here one thread takes a matrix from its norm to the end, and the
// next one whichever is left.
//
// A matrix lies with its longer side first, [b, s], so that X'X and X R both run along rows without
// sums across a register; of products that are symmetric the upper tiles are computed and the rest
// is mirrored. A long one goes on in the polynomials of A = X'X alone, see
// gls_fused/backends/factors.py.

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "../check.h"
#include "products.h"
#include "threads.h"

namespace gls_fused {
inline namespace CPU_CAPABILITY {
namespace {

using at::Tensor;

// Multiply-adds below which another thread is not woken.
constexpr int64_t kLeastShared = int64_t(1) << 22;
// Terms of a product that are summed at once: what they are taken from fits the first cache.
constexpr int64_t kTerms = 128;
// b / s from which the polynomials alone take less, and the step after which X is formed once.
constexpr double kLong = 1.5;
constexpr size_t kRestart = 2;

// to[j, i] = scale from[i, j], in blocks that fit the first cache.
template <typename T>
void transpose(const T* from, int64_t from_row, int64_t rows, int64_t columns, T scale, T* to,
               int64_t to_row) {
  constexpr int64_t kBlock = 16;
  for (int64_t i = 0; i < rows; i += kBlock) {
    const int64_t last = std::min(rows, i + kBlock);
    for (int64_t j = 0; j < columns; j += kBlock) {
      const int64_t end = std::min(columns, j + kBlock);
      for (int64_t c = j; c < end; ++c) {
        for (int64_t r = i; r < last; ++r) to[c * to_row + r] = scale * from[r * from_row + c];
      }
    }
  }
}

// LEAST_RMS of gls_fused.reference.
constexpr double kLeastRms = 1e-12;

// A step of X <- X p(A), p(A) = a + b A + c A A.
struct Polynomial {
  double a, b, c;
};

// One thread's memory, and what it does to one matrix after the other.
template <typename T>
class Factor {
 public:
  static int64_t memory(int64_t b, int64_t s) { return row_of<T>(s) * (2 * b + 5 * s); }

  Factor(T* memory, int64_t b, int64_t s) : b_(b), s_(s), row_(row_of<T>(s)) {
    constexpr int64_t size = at::vec::Vectorized<T>::size();
    // What lies beyond s is zero, and stays zero.
    columns_ = (s + size - 1) / size * size;
    x_ = memory;
    next_ = x_ + b * row_;
    gram_ = next_ + b * row_;
    rest_ = gram_ + s * row_;
    product_ = rest_ + s * row_;
    half_ = product_ + s * row_;
    other_ = half_ + s * row_;
  }

  // Of a matrix [rows, columns], b and s of them in either order.
  void run(const T* from, int64_t rows, const std::vector<Polynomial>& steps, double length, T* to) {
    const bool wide = rows != b_;
    const T norm = static_cast<T>(std::sqrt(sum_squares(from, s_ * b_)));
    const T least = static_cast<T>(kLeastRms * std::sqrt(static_cast<double>(s_ * b_)));
    const T scale = 1 / std::max(static_cast<T>(1.01) * norm, least);
    if (row_ != s_) std::fill(x_, x_ + b_ * row_, T(0));
    if (wide) {
      transpose(from, b_, s_, b_, scale, x_, row_);
    } else {
      for (int64_t i = 0; i < b_; ++i) {
        for (int64_t j = 0; j < s_; ++j) x_[i * row_ + j] = scale * from[i * s_ + j];
      }
    }
    if (b_ >= kLong * s_) {
      run_polynomials(steps, length);
    } else {
      for (size_t step = 0; step < steps.size(); ++step) {
        form_gram();
        form_polynomial(steps[step], step + 1 == steps.size() ? length : 1);
        multiply_x(rest_);
      }
    }
    if (wide) {
      transpose<T>(x_, row_, b_, s_, 1, to, b_);
    } else {
      for (int64_t i = 0; i < b_; ++i) std::copy_n(x_ + i * row_, s_, to + i * s_);
    }
  }

 private:
  void run_polynomials(const std::vector<Polynomial>& steps, double length) {
    bool formed = true;  // whether X is what the polynomials since then are to be multiplied with
    form_gram();
    for (size_t step = 0; step < steps.size(); ++step) {
      form_polynomial(steps[step], 1);
      if (formed) {
        std::copy_n(rest_, s_ * row_, product_);
      } else {
        multiply_symmetric(product_, rest_, other_);
        std::swap(product_, other_);
      }
      formed = step + 1 == kRestart && step + 1 < steps.size();
      if (formed) {
        multiply_x(product_);
        form_gram();
      } else if (step + 1 < steps.size()) {
        multiply_symmetric(gram_, rest_, half_);
        multiply_symmetric(half_, rest_, gram_);
      }
    }
    for (int64_t i = 0; i < s_ * row_; ++i) product_[i] *= static_cast<T>(length);
    multiply_x(product_);
  }

  // A = X'X
  void form_gram() { multiply({x_, 1, row_}, s_, x_, b_, true, gram_); }

  // p(A) times a factor
  void form_polynomial(const Polynomial& p, double factor) {
    multiply_symmetric(gram_, gram_, rest_);
    const T a = p.a * factor, b = p.b * factor, c = p.c * factor;
    for (int64_t i = 0; i < s_ * row_; ++i) rest_[i] = b * gram_[i] + c * rest_[i];
    for (int64_t i = 0; i < s_; ++i) rest_[i * row_ + i] += a;
  }

  // X R
  void multiply_x(const T* r) {
    multiply({x_, row_, 1}, b_, r, s_, false, next_);
    std::swap(x_, next_);
  }

  // Of matrices that commute, whose product is symmetric.
  void multiply_symmetric(const T* left, const T* right, T* out) {
    multiply({left, 1, row_}, s_, right, s_, true, out);
  }

  // out[i, c] = sum_j weights(i, j) b[j, c]
  void multiply(Strided<T> weights, int64_t rows, const T* b, int64_t terms, bool symmetric,
                T* out) {
    using Vec = at::vec::Vectorized<T>;
    constexpr int64_t kVectors = tile_vectors<T>(), kPanel = kVectors * Vec::size();
    int64_t c = 0;
    for (; c + kPanel <= columns_; c += kPanel) {
      const int64_t above = symmetric ? std::min(rows, c + kPanel) : rows;
      add_panel<kVectors>(weights, above, b + c, terms, out + c);
    }
    for (; c < columns_; c += Vec::size()) {
      const int64_t above = symmetric ? std::min(rows, c + Vec::size()) : rows;
      add_panel<1>(weights, above, b + c, terms, out + c);
    }
    if (!symmetric) return;
    // Of each panel what is below its own rows.
    const int64_t whole = columns_ / kPanel * kPanel;
    for (c = 0; c < s_;) {
      const int64_t end = std::min(s_, c + (c < whole ? kPanel : Vec::size()));
      transpose<T>(out + c * row_ + end, row_, end - c, s_ - end, 1, out + end * row_ + c, row_);
      c = end;
    }
  }

  template <int kVectors>
  void add_panel(Strided<T> weights, int64_t rows, const T* b, int64_t terms, T* out) {
    constexpr int kRows = kVectors > 1 ? kTileRows : kNarrowRows;
    constexpr int64_t size = at::vec::Vectorized<T>::size();
    for (int64_t j = 0; j < terms; j += kTerms) {
      const Strided<T> from{weights.data + j * weights.column, weights.row, weights.column};
      sum_panel<T, kRows, kVectors>(out, row_, j == 0 ? 0 : 1, from, rows, b + j * row_, row_,
                                    std::min(kTerms, terms - j), size, out, row_);
    }
  }

  int64_t b_, s_, row_, columns_;
  T *x_, *next_, *gram_, *rest_, *product_, *half_, *other_;
};

struct Part {
  size_t matrix;
  int64_t begin;  // of its elements
  int64_t rows, columns;
};

// Each matrix [m, k] is `split` of as many rows, one above the other, with a factor each.
std::vector<Tensor> orthogonalize_each(at::TensorList matrices, at::ArrayRef<double> lengths,
                                       int64_t split, at::ArrayRef<double> coefficients) {
  TORCH_CHECK(!coefficients.empty() && coefficients.size() % 3 == 0,
              "orthogonalize_each: expected three coefficients a step, got ", coefficients.size());
  TORCH_CHECK(lengths.size() == matrices.size(), "orthogonalize_each: expected a length for each of ",
              matrices.size(), " matrices, got ", lengths.size());
  std::vector<Polynomial> steps;
  for (size_t i = 0; i < coefficients.size(); i += 3) {
    steps.push_back({coefficients[i], coefficients[i + 1], coefficients[i + 2]});
  }
  std::vector<Tensor> inputs, results;
  std::vector<Part> parts;
  int64_t work = 0;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const Tensor& matrix = matrices[i];
    TORCH_CHECK(matrix.dim() == 2 && split > 0 && matrix.size(0) % split == 0,
                "orthogonalize_each: expected matrices whose rows are a multiple of split ", split,
                ", got ", matrix.sizes());
    check_device("orthogonalize_each", matrices[0], matrix);
    TORCH_CHECK(matrix.scalar_type() == matrices[0].scalar_type(),
                "orthogonalize_each: expected matrices of one dtype, got ", matrix.scalar_type(),
                " beside ", matrices[0].scalar_type());
    inputs.push_back(matrix.contiguous());
    results.push_back(at::empty_like(inputs.back()));
    const int64_t rows = matrix.size(0) / split, columns = matrix.size(1);
    if (rows * columns == 0) continue;
    for (int64_t j = 0; j < split; ++j) parts.push_back({i, j * rows * columns, rows, columns});
  }
  const auto cost = [](const Part& part) {
    const int64_t s = std::min(part.rows, part.columns);
    return s * part.rows * part.columns;
  };
  for (const Part& part : parts) work += 3 * cost(part) * static_cast<int64_t>(steps.size());
  // The costliest first, so that the last ones fill what is left of the time.
  std::stable_sort(parts.begin(), parts.end(),
                   [&](const Part& x, const Part& y) { return cost(x) > cost(y); });
  if (parts.empty()) return results;
  const int64_t threads =
      work < kLeastShared
          ? 1
          : std::min<int64_t>(at::get_num_threads(), static_cast<int64_t>(parts.size()));
  AT_DISPATCH_FLOATING_TYPES(inputs[0].scalar_type(), "orthogonalize_each", [&] {
    int64_t most = 0;
    for (const Part& part : parts) {
      const auto [s, b] = std::minmax(part.rows, part.columns);
      most = std::max(most, Factor<scalar_t>::memory(b, s));
    }
    const Tensor memory = at::empty({threads, most}, inputs[0].options());
    scalar_t* base = memory.data_ptr<scalar_t>();
    std::atomic<size_t> next{0};
    share(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        for (size_t i = next++; i < parts.size(); i = next++) {
          const Part& part = parts[i];
          const auto [s, b] = std::minmax(part.rows, part.columns);
          Factor<scalar_t>(base + thread * most, b, s)
              .run(inputs[part.matrix].const_data_ptr<scalar_t>() + part.begin, part.rows, steps,
                   lengths[part.matrix], results[part.matrix].data_ptr<scalar_t>() + part.begin);
        }
      }
    });
  });
  return results;
}

}  // namespace
}  // namespace CPU_CAPABILITY

TORCH_LIBRARY_IMPL(gls_fused, CPU, m) { m.impl("orthogonalize_each", &orthogonalize_each); }

}  // namespace gls_fused
