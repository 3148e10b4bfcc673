// Ops whose work is matrix products of torch's BLAS and LAPACK, on any device: written once, in
// terms of ATen. The equations are in docs/method.md, the letters in gls_fused/reference.py.

#include "composite.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

namespace gls_fused {

using at::Tensor;

namespace {

void check_inverse(const char* op, int64_t dim, const Tensor& basis, const Tensor& core_inverse) {
  TORCH_CHECK(basis.dim() == 2 && basis.size(0) == dim, op, ": expected basis [", dim,
              ", r], got ", basis.sizes());
  TORCH_CHECK(core_inverse.dim() == 2 && core_inverse.size(0) == basis.size(1) &&
                  core_inverse.size(1) == basis.size(1),
              op, ": expected core_inverse [", basis.size(1), ", ", basis.size(1), "], got ",
              core_inverse.sizes());
}

// X / shift + T U' for X [*, k], where U may have one row more than X columns.
Tensor add_correction(const Tensor& x, const Tensor& coefficients, const Tensor& basis,
                      const Tensor& shift) {
  const Tensor top = basis.narrow(0, 0, x.size(1));
  if (x.is_cpu()) {
    return at::addmm(x, coefficients, top.t(), /*beta=*/1 / shift.item<double>(), /*alpha=*/1);
  }
  // On a GPU reading `shift` would wait for the device.
  return at::addmm(x / shift, coefficients, top.t());
}

// Y = A U: `rows U`, plus U's last row where a column of ones belongs to A.
Tensor project(const Tensor& rows, const Tensor& basis, bool ones) {
  if (!ones) return at::mm(rows, basis);
  const int64_t size = rows.size(1);
  return at::addmm(basis[size], rows, basis.narrow(0, 0, size));
}

}  // namespace

std::tuple<Tensor, Tensor> precondition_rows(const Tensor& rows, const Tensor& basis,
                                             const Tensor& core_inverse, const Tensor& shift,
                                             bool ones) {
  TORCH_CHECK(rows.dim() == 2, "precondition_rows: expected rows [n, k], got ", rows.sizes());
  const int64_t size = rows.size(1);
  check_inverse("precondition_rows", size + ones, basis, core_inverse);
  const Tensor inputs = rows.to(basis.scalar_type());
  const Tensor coefficients = at::mm(project(inputs, basis, ones), core_inverse);
  const Tensor product = add_correction(inputs, coefficients, basis, shift);
  const Tensor last = ones ? at::mv(coefficients, basis[size]) + shift.reciprocal()
                           : at::empty({0}, inputs.options());
  return {product.to(rows.scalar_type()), last.to(rows.scalar_type())};
}

std::tuple<Tensor, Tensor> precondition_gradient(const Tensor& weight_gradient,
                                                 const std::optional<Tensor>& bias_gradient,
                                                 const Tensor& basis, const Tensor& core_inverse,
                                                 const Tensor& shift) {
  TORCH_CHECK(weight_gradient.dim() == 2,
              "precondition_gradient: expected weight_gradient [m, k], got ",
              weight_gradient.sizes());
  const int64_t size = weight_gradient.size(1);
  const bool ones = bias_gradient.has_value();
  check_inverse("precondition_gradient", size + ones, basis, core_inverse);
  const Tensor weight = weight_gradient.to(basis.scalar_type());
  Tensor y = at::mm(weight, basis.narrow(0, 0, size));
  Tensor bias;
  if (ones) {
    TORCH_CHECK(bias_gradient->dim() == 1 && bias_gradient->size(0) == weight.size(0),
                "precondition_gradient: expected bias_gradient [", weight.size(0), "], got ",
                bias_gradient->sizes());
    bias = bias_gradient->to(basis.scalar_type());
    y.addr_(bias, basis[size]);
  }
  const Tensor coefficients = at::mm(y, core_inverse);
  const Tensor product = add_correction(weight, coefficients, basis, shift);
  const Tensor last = ones ? at::mv(coefficients, basis[size]) + bias / shift
                           : at::empty({0}, weight.options());
  return {product.to(weight_gradient.scalar_type()), last.to(weight_gradient.scalar_type())};
}

// Y'Y, A'Y and ||A||_F^2 for Y = A U.
void sketch_rows_out(const Tensor& rows, const Tensor& basis, bool ones, Tensor& core,
                     Tensor& sketch, Tensor& trace) {
  TORCH_CHECK(rows.dim() == 2, "sketch_rows: expected rows [n, k], got ", rows.sizes());
  const int64_t size = rows.size(1);
  TORCH_CHECK(basis.dim() == 2 && basis.size(0) == size + ones, "sketch_rows: expected basis [",
              size + ones, ", r], got ", basis.sizes());
  // Contiguous: torch's norm of strided memory loses an order of magnitude in accuracy.
  const Tensor inputs = rows.to(basis.scalar_type()).contiguous();
  const Tensor y = project(inputs, basis, ones);
  at::mm_out(core, y.t(), y);
  Tensor top = sketch.narrow(0, 0, size);
  at::mm_out(top, inputs.t(), y);
  trace.copy_(at::linalg_vector_norm(inputs).square_());
  if (ones) {
    sketch[size].copy_(y.sum(0));
    trace.add_(rows.size(0));
  }
}

std::tuple<Tensor, Tensor, Tensor> sketch_rows(const Tensor& rows, const Tensor& basis,
                                               bool ones) {
  const int64_t rank = basis.size(-1);
  Tensor core = at::empty({rank, rank}, basis.options());
  Tensor sketch = at::empty(basis.sizes(), basis.options());
  Tensor trace = at::empty({}, basis.options());
  sketch_rows_out(rows, basis, ones, core, sketch, trace);
  return {core, sketch, trace};
}

namespace {

template <typename scalar_t>
std::pair<double, double> precision_of() {
  return {std::numeric_limits<scalar_t>::epsilon(), std::numeric_limits<scalar_t>::min()};
}

std::pair<double, double> precision(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? precision_of<double>() : precision_of<float>();
}

// U+ T = Z,  M+ = T (M + nu I)^-1 T',  Z+ = U+ M+
std::tuple<Tensor, Tensor, Tensor> refresh_subspace(const Tensor& core, const Tensor& sketch) {
  TORCH_CHECK(sketch.dim() == 2 && core.dim() == 2 && core.size(0) == sketch.size(1),
              "refresh_subspace: expected core [r, r] and sketch [d, r], got ", core.sizes(),
              " and ", sketch.sizes());
  const auto [eps, tiny] = precision(core);
  const Tensor scale = sketch.abs().max().clamp_min(tiny);
  const auto [columns, triangle] = at::linalg_qr(sketch / scale);
  // LAPACK returns columns; rows of U are what the products with it read.
  const Tensor basis = columns.contiguous();
  Tensor unit = core / scale;
  const Tensor shift = unit.trace() * (eps * core.size(0)) + tiny;
  unit.diagonal().add_(shift);
  const Tensor factor = std::get<0>(at::linalg_cholesky_ex(unit));
  const Tensor root = at::linalg_solve_triangular(factor, triangle.t(), /*upper=*/false);
  const Tensor moved = at::mm(root.t(), root) * scale;
  return {basis, moved, at::mm(basis, moved)};
}

// lambda = damping t / d,  lambda' = lambda + rho,  C = (M + lambda I)^-1 - I / lambda'
std::tuple<Tensor, Tensor> invert_core(const Tensor& core, const Tensor& trace, int64_t dim,
                                       double damping) {
  const int64_t rank = core.size(0);
  TORCH_CHECK(core.dim() == 2 && core.size(1) == rank && rank <= dim,
              "invert_core: expected core [r, r] with r at most ", dim, ", got ", core.sizes());
  const double eps = precision(core).first;
  const Tensor damp = trace * std::max(damping / dim, 32 * eps);
  const Tensor total = core.trace();
  Tensor shift = damp;
  if (dim > rank) shift = shift + (trace - total).clamp_min(0) / (dim - rank);
  Tensor unit = core / damp;
  unit.diagonal().add_(1);
  const auto [factor, info] = at::linalg_cholesky_ex(unit);
  const Tensor identity = at::eye(rank, core.options());
  const Tensor inverse = at::where(info == 0, at::cholesky_inverse(factor) / damp,
                                   identity / (damp + total / rank));
  return {at::sub(inverse, identity / shift).contiguous(), shift};
}

}  // namespace

TORCH_LIBRARY_IMPL(gls_fused, CompositeExplicitAutograd, m) {
  m.impl("precondition_rows", &precondition_rows);
  m.impl("precondition_gradient", &precondition_gradient);
  m.impl("sketch_rows", &sketch_rows);
  m.impl("refresh_subspace", &refresh_subspace);
  m.impl("invert_core", &invert_core);
}

}  // namespace gls_fused
