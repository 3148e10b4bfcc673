// The small dense work of the subspace, on the CPU: its orthonormal basis and its damped inverse.
//
// Everything [r, r] is done in float64 by plain loops, as r is some tens: LAPACK's calls, and the
// waking of threads, took ten times as long at r = 32.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/any.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ne.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../check.h"
#include "products.h"
#include "subspace.h"

namespace gls_fused {
inline namespace CPU_CAPABILITY {

using at::Tensor;

namespace {

// [r, r], row-major.
using Matrix = std::vector<double>;

constexpr int64_t kLanes = at::vec::Vectorized<double>::size();

// to -= weight from, n elements that do not overlap.
inline void subtract(double* __restrict to, const double* __restrict from, double weight,
                     int64_t n) {
  for (int64_t j = 0; j < n; ++j) to[j] -= weight * from[j];
}

// S = L L', in the lower triangle, from the upper one; false where a pivot is at most `least` of its
// diagonal entry. Row by row of L', each from all above it at once, a few columns to its left included
// so that whole vectors are taken.
bool factor(Matrix& s, int64_t r, double least) {
  for (int64_t k = 0; k < r; ++k) {
    double* row = &s[k * r];
    const int64_t first = k / kLanes * kLanes;
    const double diagonal = row[k];
    sum_rows<double>(row + first, r, -1, {&s[k], 0, r}, 1, &s[first], r, k, r - first, row + first,
                     r);
    // Written so that a NaN fails.
    if (!(-row[k] > least * diagonal) || !std::isfinite(row[k])) return false;
    const double scale = -1 / std::sqrt(-row[k]);
    for (int64_t j = first; j < r; ++j) row[j] *= scale;
  }
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < i; ++j) s[i * r + j] = s[j * r + i];
  }
  return true;
}

// L^-1 of a lower triangle; the upper triangle is zero.
Matrix invert_triangle(const Matrix& l, int64_t r) {
  Matrix inverse(r * r, 0);
  for (int64_t i = 0; i < r; ++i) {
    double* row = &inverse[i * r];
    const int64_t count = std::min(r, (i + kLanes - 1) / kLanes * kLanes);
    sum_rows<double>(nullptr, 0, 0, {&l[i * r], 0, 1}, 1, inverse.data(), r, i, count, row, r);
    const double reciprocal = 1 / l[i * r + i];
    for (int64_t j = 0; j < i; ++j) row[j] *= -reciprocal;
    row[i] = reciprocal;
  }
  return inverse;
}

Matrix multiply(const Matrix& a, const Matrix& b, int64_t r) {
  Matrix product(r * r);
  sum_rows<double>(nullptr, 0, 0, {a.data(), r, 1}, r, b.data(), r, r, r, product.data(), r);
  return product;
}

// A' A.
Matrix square(const Matrix& a, int64_t r) {
  Matrix product(r * r);
  sum_rows<double>(nullptr, 0, 0, {a.data(), 1, r}, r, a.data(), r, r, r, product.data(), r);
  return product;
}

double trace_of(const Matrix& x, int64_t r) {
  double total = 0;
  for (int64_t i = 0; i < r; ++i) total += x[i * r + i];
  return total;
}

// Symmetric to the last bit, as an iteration would let an asymmetry grow.
void mirror(Matrix& x, int64_t r) {
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < i; ++j) x[j * r + i] = x[i * r + j];
  }
}

// A B for symmetric A and B that commute, whose product is symmetric.
Matrix multiply_symmetric(const Matrix& a, const Matrix& b, int64_t r) {
  Matrix product = multiply(a, b, r);
  mirror(product, r);
  return product;
}

// S^-1 of a symmetric positive definite S, in place, by elimination without pivoting; false where S
// is not. A few rows at a time, so that each pass over S does the work of as many.
bool invert(Matrix& s, int64_t r) {
  constexpr int64_t kRows = 4;
  std::vector<double> rows(kRows * r), weights(r * kRows);
  for (int64_t first = 0; first < r; first += kRows) {
    const int64_t count = std::min(kRows, r - first);
    // The block on the diagonal is inverted in `rows`, which then become its inverse times theirs.
    std::copy_n(&s[first * r], count * r, rows.data());
    for (int64_t k = 0; k < count; ++k) {
      double* row = &rows[k * r];
      const double pivot = row[first + k];
      if (!(pivot > 0) || !std::isfinite(pivot)) return false;
      row[first + k] = 1;
      for (int64_t j = 0; j < r; ++j) row[j] /= pivot;
      for (int64_t i = 0; i < count; ++i) {
        if (i == k) continue;
        const double weight = rows[i * r + first + k];
        rows[i * r + first + k] = 0;
        subtract(&rows[i * r], row, weight, r);
      }
    }
    for (int64_t i = 0; i < r; ++i) {
      for (int64_t k = 0; k < count; ++k) {
        weights[i * kRows + k] = -s[i * r + first + k];
        s[i * r + first + k] = 0;
      }
    }
    sum_rows<double>(s.data(), r, 1, {weights.data(), kRows, 1}, r, rows.data(), r, count, r,
                     s.data(), r);
    std::copy_n(rows.data(), count * r, &s[first * r]);
  }
  return true;
}

// S^-1/2 of a positive definite S whose eigenvalues are between `low` and `high`; false where they
// are not. By Newton's iteration for the square root in its product form,
//   B <- (2 I + B + B^-1) / 4,   Y <- Y (I + B^-1) / 2,   from B = S / c and Y = I,
// which takes B to I and Y to (S / c)^-1/2: Cheng, Higham, Kenney and Laub, 2001, "Approximating the
// logarithm of a matrix to specified accuracy". An inverse of a matrix this small takes little more
// than a product, and there are a quarter as many as in an iteration of products alone. The
// eigenvalues of B that are between 1 / x and x are then between 1 and (2 + x + 1 / x) / 4; divided by
// the root of that they are about 1 again, and x a root of what it was, or less.
bool invert_root(Matrix& s, int64_t r, double low, double high, double tolerance) {
  double middle = std::sqrt(low) * std::sqrt(high), spread = std::sqrt(high / low);
  if (!(middle > 0) || !std::isfinite(middle) || !std::isfinite(spread)) return false;
  Matrix b = s, root, inverse, step(r * r);
  for (double& value : b) value /= middle;
  // Seven do where the largest is 1e10 of the least; the others are for what is beyond the bounds.
  constexpr int kMost = 16;
  for (int iteration = 0; iteration < kMost; ++iteration) {
    inverse = b;
    if (!invert(inverse, r)) return false;
    const double most = (2 + spread + 1 / spread) / 4, centre = std::sqrt(most);
    for (int64_t i = 0; i < r * r; ++i) {
      step[i] = inverse[i] / 2;
      b[i] = (b[i] + inverse[i]) / 4;
    }
    for (int64_t i = 0; i < r; ++i) step[i * r + i] += 0.5, b[i * r + i] += 0.5;
    root = iteration == 0 ? step : multiply_symmetric(root, step, r);
    if (most - 1 < tolerance) {
      double distance = 0;
      for (int64_t i = 0; i < r; ++i) b[i * r + i] -= 1;
      for (const double value : b) distance += value * value;
      for (int64_t i = 0; i < r; ++i) b[i * r + i] += 1;
      if (std::sqrt(distance) < 1e-7) {
        const double scale = 1 / std::sqrt(middle);
        for (double& value : root) value *= scale;
        s = std::move(root);
        return true;
      }
    }
    for (double& value : b) value /= centre;
    middle *= centre;
    spread = centre;
    mirror(b, r);
  }
  return false;
}

// S^-p of a positive definite S, from its eigenvalues; false where it is not.
bool raise_eigenvalues(Matrix& s, int64_t r, double power) {
  // LAPACK raises for what is not finite.
  for (const double value : s) {
    if (!std::isfinite(value)) return false;
  }
  const at::Tensor matrix = at::from_blob(s.data(), {r, r}, at::kDouble);
  const auto [values, vectors] = at::linalg_eigh(matrix);
  if (!(values.const_data_ptr<double>()[0] > 0)) return false;
  matrix.copy_((vectors * values.pow(-power)).mm(vectors.t()));
  return true;
}

// S^-p for p = .25, .5 or .75, of a positive definite S whose eigenvalues are at least `least` of
// its trace; false where they are not.
bool raise(Matrix& s, int64_t r, double power, double least, double tolerance) {
  // An inverse that is worse conditioned loses too many digits; float32 admits no such damping.
  if (least < 1e-10) return raise_eigenvalues(s, r, power);
  const double high = trace_of(s, r), low = least * high;
  Matrix half = s;
  if (!invert_root(half, r, low, high, tolerance)) return false;
  if (power == 0.5) {
    s = std::move(half);
    return true;
  }
  // The inverse root of S^-1/2 is S^1/4. That of S^1/2 = S S^-1/2 would lose more digits.
  s = half;
  if (!invert_root(s, r, 1 / std::sqrt(high), 1 / std::sqrt(low), tolerance)) return false;
  if (!invert(s, r)) return false;
  if (power == 0.75) s = multiply_symmetric(s, half, r);
  return true;
}

template <typename T>
Matrix to_matrix(const Tensor& x) {
  const int64_t r = x.size(0);
  const T* data = x.const_data_ptr<T>();
  Matrix result(r * r);
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < r; ++j) result[i * r + j] = data[i * x.stride(0) + j * x.stride(1)];
  }
  return result;
}

template <typename T>
void store(const Matrix& matrix, T* to) {
  for (size_t i = 0; i < matrix.size(); ++i) to[i] = static_cast<T>(matrix[i]);
}

// Columns that one thread takes at a time; sums are taken over them in order, so that the result
// does not depend on the number of threads.
constexpr int64_t kPanel = 512;

template <typename Body>
void for_panels(int64_t d, const Body& body) {
  const int64_t panels = (d + kPanel - 1) / kPanel;
  // Below four panels waking another thread takes longer than it saves.
  at::parallel_for(0, panels, panels < 4 ? 4 : 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      body(panel, panel * kPanel, std::min(kPanel, d - panel * kPanel));
    }
  });
}

// The upper triangle of rows rows' for `rows` [r, d], multiplied and added up in `Wide`.
template <typename Wide, typename T>
Matrix gram_of(const T* rows, int64_t r, int64_t d) {
  const int64_t panels = (d + kPanel - 1) / kPanel;
  std::vector<Wide> partial(panels * r * r, 0);
  for_panels(d, [&](int64_t panel, int64_t first, int64_t size) {
    // By columns: a product then adds up whole rows, with nothing to sum across a vector. Sixteen
    // at a time, so that what is read in lines is written within the first-level cache.
    std::vector<Wide> columns(size * r);
    for (int64_t block = 0; block < size; block += 16) {
      const int64_t end = std::min(block + 16, size);
      for (int64_t i = 0; i < r; ++i) {
        const T* row = rows + i * d + first;
        for (int64_t k = block; k < end; ++k) columns[k * r + i] = row[k];
      }
    }
    // What is above the diagonal, and a little of what is below.
    for (int64_t i = 0; i < r; i += kNarrowRows) {
      sum_rows<Wide>(nullptr, 0, 0, {&columns[i], 1, r}, std::min(kNarrowRows, r - i), &columns[i],
                     r, size, r - i, &partial[(panel * r + i) * r + i], r);
    }
  });
  Matrix gram(r * r, 0);
  for (int64_t panel = 0; panel < panels; ++panel) {
    for (int64_t i = 0; i < r * r; ++i) gram[i] += partial[panel * r * r + i];
  }
  return gram;
}

// to [r, d] = weights from, `from` [r, d]; weights are rounded to the rows' dtype.
template <typename T>
void combine(const Matrix& weights, const T* from, int64_t r, int64_t d, T* to) {
  std::vector<T> rounded(r * r);
  store(weights, rounded.data());
  for_panels(d, [&](int64_t, int64_t first, int64_t size) {
    sum_rows<T>(nullptr, 0, 0, {rounded.data(), r, 1}, r, from + first, d, r, size, to + first, d);
  });
}

// U' [r, d] orthonormal and lower triangular T' with Z' = T' U', by a Cholesky factor of the Gram
// matrix, twice: the first leaves U orthonormal up to the condition number's square, the second
// up to rounding. False where Z is so close to rank deficient that the first says nothing.
template <typename T>
bool orthonormalise(const T* sketch, int64_t r, int64_t d, T* basis, Matrix& triangle) {
  // In float64, where products of float32 are exact: the condition number is squared.
  Matrix once = gram_of<double>(sketch, r, d);
  // Pivots relative to the diagonal are the squares of sines; float64's rounding is at 1e-16.
  if (!factor(once, r, 1e-10)) return false;
  std::vector<T> rough(r * d);
  combine(invert_triangle(once, r), sketch, r, d, rough.data());
  Matrix twice = gram_of<T>(rough.data(), r, d);
  if (!factor(twice, r, 0.25)) return false;
  combine(invert_triangle(twice, r), rough.data(), r, d, basis);
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = i + 1; j < r; ++j) once[i * r + j] = twice[i * r + j] = 0;
  }
  triangle = multiply(once, twice, r);
  return true;
}

// M+ = T (M + nu I)^-1 T', nu = 4 eps tr M, for T given as T': lower triangular, or of any form after
// LAPACK's QR.
Matrix move_core(Matrix core, const Matrix& triangle, int64_t r, double eps, double tiny) {
  const double nu = 4 * trace_of(core, r) * eps + tiny;
  for (int64_t i = 0; i < r; ++i) core[i * r + i] += nu;
  if (!factor(core, r, 0)) return Matrix(r * r, std::numeric_limits<double>::quiet_NaN());
  // M+ = (L^-1 T')' (L^-1 T').
  return square(multiply(invert_triangle(core, r), triangle, r), r);
}

}  // namespace

// U+ T = Z,  M+ = T (M + nu I)^-1 T'
template <typename T>
void refresh(const T* sketch, const T* core, int64_t r, int64_t d, T* basis, T* moved) {
  using Vec = at::vec::Vectorized<T>;
  if (r == 0) return;
  const double eps = std::numeric_limits<T>::epsilon(), tiny = std::numeric_limits<T>::min();
  const double largest = at::vec::map_reduce_all<T>(
      [](Vec x) { return x.abs(); }, [](Vec x, Vec y) { return at::vec::maximum(x, y); }, sketch,
      r * d);
  // At order one, so that no square or reciprocal leaves the dtype's range.
  const double scale = std::max(largest, tiny);
  std::vector<T> unit(r * d);
  for (int64_t i = 0; i < r * d; ++i) unit[i] = sketch[i] / static_cast<T>(scale);
  Matrix unit_core(core, core + r * r), triangle;
  for (double& value : unit_core) value /= scale;
  if (!orthonormalise(unit.data(), r, d, basis, triangle)) {
    const auto type = c10::CppTypeToScalarType<T>::value;
    const Tensor rows = at::from_blob(unit.data(), {r, d}, type);
    const auto [columns, upper] = at::linalg_qr(rows.t());
    // Of an input that is always zero LAPACK leaves its rounding.
    Tensor found = at::from_blob(basis, {r, d}, type);
    at::mul_out(found, columns.t(), rows.ne(0).any(0));
    triangle = to_matrix<T>(upper.t());
  }
  Matrix next = move_core(std::move(unit_core), triangle, r, eps, tiny);
  for (double& value : next) value *= scale;
  store(next, moved);
}

// lambda = damping t / min(d, s),  lambda' = lambda + rho,  C = (M + lambda I)^-p - I / lambda'^p
template <typename T>
void damp(const T* core, double trace, double samples, int64_t r, int64_t d, double damping,
            double power, T* inverse, T* shift) {
  const double eps = std::numeric_limits<T>::epsilon();
  const double share = std::max(damping / std::min<double>(d, samples), 32 * eps);
  const double least = trace * share;
  Matrix unit(core, core + r * r);
  const double total = trace_of(unit, r);
  const double rest = d > r ? std::max(trace - total, 0.0) / (d - r) : 0.0;
  const double shifted = std::pow(least + rest, power);
  for (double& value : unit) value /= least;
  for (int64_t i = 0; i < r; ++i) unit[i * r + i] += 1;
  bool definite = true;
  if (power == 1) {
    definite = factor(unit, r, 0);
    if (definite) unit = square(invert_triangle(unit, r), r);
  } else if (r > 0) {
    // tr M may exceed t by rounding; t / least + r bounds the trace either way.
    definite = raise(unit, r, power, share / (2 + r * share), std::max(eps / 8, 1e-15));
  }
  const double scale = std::pow(least, -power);
  if (definite) {
    for (double& value : unit) value *= scale;
  } else {
    // Rounding has left M + lambda I not positive definite.
    unit.assign(r * r, 0);
    for (int64_t i = 0; i < r; ++i) unit[i * r + i] = std::pow(least + total / r, -power);
  }
  for (int64_t i = 0; i < r; ++i) unit[i * r + i] -= 1 / shifted;
  store(unit, inverse);
  *shift = static_cast<T>(shifted);
}

template void refresh(const float*, const float*, int64_t, int64_t, float*, float*);
template void refresh(const double*, const double*, int64_t, int64_t, double*, double*);
template void damp(const float*, double, double, int64_t, int64_t, double, double, float*, float*);
template void damp(const double*, double, double, int64_t, int64_t, double, double, double*,
                     double*);

namespace {

std::tuple<Tensor, Tensor> refresh_subspace(const Tensor& core, const Tensor& sketch) {
  check_refresh(core, sketch);
  const int64_t d = sketch.size(0), r = sketch.size(1);
  const Tensor rows = sketch.t().contiguous(), old = core.contiguous();
  const Tensor basis = at::empty({r, d}, sketch.options()), moved = at::empty({r, r}, core.options());
  AT_DISPATCH_FLOATING_TYPES(core.scalar_type(), "refresh_subspace", [&] {
    refresh(rows.const_data_ptr<scalar_t>(), old.const_data_ptr<scalar_t>(), r, d,
            basis.data_ptr<scalar_t>(), moved.data_ptr<scalar_t>());
  });
  return {basis.t(), moved};
}

std::tuple<Tensor, Tensor> invert_core(const Tensor& core, const Tensor& trace, int64_t dim,
                                       double damping, double power,
                                       const std::optional<Tensor>& samples) {
  check_core(core, trace, dim, samples);
  check_power(power);
  const int64_t r = core.size(0);
  const Tensor old = core.contiguous();
  const Tensor inverse = at::empty({r, r}, core.options()), shift = at::empty({}, core.options());
  AT_DISPATCH_FLOATING_TYPES(core.scalar_type(), "invert_core", [&] {
    const double rows = samples ? samples->item<double>() : INFINITY;
    damp(old.const_data_ptr<scalar_t>(), trace.item<double>(), rows, r, dim, damping, power,
           inverse.data_ptr<scalar_t>(), shift.data_ptr<scalar_t>());
  });
  return {inverse, shift};
}

}  // namespace
}  // namespace CPU_CAPABILITY

TORCH_LIBRARY_IMPL(gls_fused, CPU, m) {
  m.impl("refresh_subspace", &refresh_subspace);
  m.impl("invert_core", &invert_core);
}

}  // namespace gls_fused
