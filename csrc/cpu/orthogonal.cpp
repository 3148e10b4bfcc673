// The orthogonal factor of small matrices, on the CPU: gls_fused.reference.orthogonalize.
//
// Of matrices this small a product takes less time than to wake the threads that BLAS would share it
// with, which one of some twenty products does anew. Here one thread takes a matrix from its norm to
// the end, and others take the next.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "products.h"

namespace gls_fused {
inline namespace CPU_CAPABILITY {
namespace {

using at::Tensor;

// Multiply-adds below which another thread is not woken.
constexpr int64_t kLeastShared = int64_t(1) << 22;

// X <- a X + (b A + c A A) X, A = X X', with three coefficients a step; the last one times `length`.
template <typename T>
void orthogonalize_matrix(const T* from, int64_t s, int64_t b, at::ArrayRef<double> coefficients,
                          double length, T* to) {
  const T norm = static_cast<T>(std::sqrt(sum_squares(from, s * b)));
  const T scale = 1 / std::max(static_cast<T>(1.01) * norm, std::numeric_limits<T>::min());
  std::vector<T> x(s * b), next(s * b), gram(s * s), rest(s * s);
  for (int64_t i = 0; i < s * b; ++i) x[i] = from[i] * scale;
  for (size_t step = 0; step < coefficients.size(); step += 3) {
    const bool last = step + 3 == coefficients.size();
    const T factor = last ? length : 1, own = coefficients[step] * factor;
    const T first = coefficients[step + 1] * factor, second = coefficients[step + 2] * factor;
    dot_rows<T>(x.data(), b, s, x.data(), b, s, b, gram.data(), s);
    sum_rows<T>(nullptr, 0, 0, {gram.data(), s, 1}, s, gram.data(), s, s, s, rest.data(), s);
    for (int64_t i = 0; i < s * s; ++i) rest[i] = first * gram[i] + second * rest[i];
    T* result = last ? to : next.data();
    sum_rows<T>(x.data(), b, own, {rest.data(), s, 1}, s, x.data(), b, s, b, result, b);
    if (!last) std::swap(x, next);
  }
}

// Of matrices [layers, s, b], s <= b.
Tensor orthogonalize_small(const Tensor& matrices, at::ArrayRef<double> coefficients,
                           double length) {
  TORCH_CHECK(matrices.dim() == 3 && matrices.size(1) <= matrices.size(2),
              "orthogonalize_small: expected matrices [layers, s, b] with s <= b, got ",
              matrices.sizes());
  TORCH_CHECK(!coefficients.empty() && coefficients.size() % 3 == 0,
              "orthogonalize_small: expected three coefficients a step, got ", coefficients.size());
  const Tensor inputs = matrices.contiguous();
  Tensor result = at::empty_like(inputs);
  const int64_t layers = inputs.size(0), s = inputs.size(1), b = inputs.size(2);
  const int64_t work = layers * s * s * (2 * b + s) * static_cast<int64_t>(coefficients.size() / 3);
  AT_DISPATCH_FLOATING_TYPES(inputs.scalar_type(), "orthogonalize_small", [&] {
    const scalar_t* from = inputs.const_data_ptr<scalar_t>();
    scalar_t* to = result.data_ptr<scalar_t>();
    const int64_t grain = work < kLeastShared ? std::max<int64_t>(layers, 1) : 1;
    at::parallel_for(0, layers, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        orthogonalize_matrix<scalar_t>(from + i * s * b, s, b, coefficients, length,
                                       to + i * s * b);
      }
    });
  });
  return result;
}

}  // namespace
}  // namespace CPU_CAPABILITY

TORCH_LIBRARY_IMPL(gls_fused, CPU, m) { m.impl("orthogonalize_small", &orthogonalize_small); }

}  // namespace gls_fused
