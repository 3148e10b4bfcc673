// The sketch of rows, on the CPU: Y = A U,  Y'Y,  A'Y,  ||A||_F^2.
//
// Threads share the rows for Y, and then the columns of (A'Y)'. Of both the pieces have a fixed size, so
// that the result does not depend on the number of threads.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "../check.h"
#include "../sums.h"
#include "products.h"
#include "rows.h"
#include "threads.h"

namespace gls_fused {
inline namespace CPU_CAPABILITY {

using at::Tensor;

namespace {

// Columns of (A'Y)' that a thread takes at a time, of which a stretch of terms stays in the caches.
constexpr int64_t kPanelColumns = 128;

// Where the sums go, see gls_fused::Sketch.
template <typename T>
struct Sums {
  T* core;
  T* transposed;
  T* trace;
};

// Rows [n, k], and U' [r, d] with d = k or, with ones, k + 1.
template <typename T>
void sketch(const T* rows, int64_t row, int64_t n, int64_t size, const T* u, int64_t u_row,
            int64_t rank, bool ones, const at::TensorOptions& options, Sums<T> sums) {
  const int64_t width = packed_width<T>(rank), dim = size + ones, flops = 2 * n * size * rank;
  const Tensor memory = at::empty({(size + n) * width}, options);
  T *packed = memory.data_ptr<T>(), *y = packed + size * width;
  share(0, size, grain(size, 8 * size * rank), [&](int64_t begin, int64_t end) {
    pack(u, u_row, rank, begin, end, width, packed);
  });
  const int64_t blocks = (n + kBlockRows - 1) / kBlockRows;
  std::vector<double> squares(blocks, 0);
  share(0, blocks, grain(blocks, flops), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlockRows, count = std::min(kBlockRows, n - first);
      const T* from = rows + first * row;
      T* to = y + first * width;
      sum_terms<T>({from, row, 1}, count, packed, width, size, width, to, width);
      for (int64_t i = 0; i < count; ++i) {
        squares[block] += sum_squares(from + i * row, size);
        for (int64_t j = 0; ones && j < rank; ++j) to[i * width + j] += u[j * u_row + size];
      }
    }
  });
  *sums.trace =
      static_cast<T>(std::accumulate(squares.begin(), squares.end(), ones ? double(n) : 0.0));
  const Strided<T> by_direction{y, 1, width};
  sum_terms<T>(by_direction, rank, y, width, n, rank, sums.core, rank);
  const int64_t panels = (size + kPanelColumns - 1) / kPanelColumns;
  share(0, panels, grain(panels, flops), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPanelColumns, last = std::min(size, end * kPanelColumns);
    for (int64_t c = first; c < last; c += kPanelColumns) {
      sum_terms<T>(by_direction, rank, rows + c, row, n, std::min(kPanelColumns, last - c),
                   sums.transposed + c, dim);
    }
  });
  for (int64_t j = 0; ones && j < rank; ++j) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += y[i * width + j];
    sums.transposed[j * dim + size] = static_cast<T>(total);
  }
}

template <typename T>
void sketch_into(const Tensor& rows, const Tensor& basis, bool ones, Sums<T> sums) {
  const Tensor inputs = in_rows(rows.to(basis.scalar_type())), transposed = in_rows(basis.t());
  sketch(inputs.const_data_ptr<T>(), inputs.stride(0), inputs.size(0), inputs.size(1),
         transposed.const_data_ptr<T>(), transposed.stride(0), basis.size(1), ones, basis.options(),
         sums);
}

std::tuple<Tensor, Tensor, Tensor> sketch_rows(const Tensor& rows, const Tensor& basis,
                                               bool ones) {
  check_rows("sketch_rows", rows, basis, ones);
  const Sketch found = make_sketch(basis);
  AT_DISPATCH_FLOATING_TYPES(basis.scalar_type(), "sketch_rows", [&] {
    sketch_into<scalar_t>(rows, basis, ones,
                          {found.core.data_ptr<scalar_t>(), found.transposed.data_ptr<scalar_t>(),
                           found.trace.data_ptr<scalar_t>()});
  });
  return {found.core, found.transposed.t(), found.trace};
}

// sums [2 + r r + r d] += [n, ||A||_F^2, Y'Y, (A'Y)'], unless these are not finite or all zero.
void add_sketch_(const Tensor& rows, const Tensor& basis, bool ones, Tensor& sums) {
  check_sums(rows, basis, ones, sums);
  const Tensor fresh = at::empty(sums.sizes(), sums.options());
  const int64_t square = basis.size(1) * basis.size(1);
  AT_DISPATCH_FLOATING_TYPES(basis.scalar_type(), "add_sketch_", [&] {
    scalar_t* to = fresh.data_ptr<scalar_t>();
    to[0] = static_cast<scalar_t>(rows.size(0));
    sketch_into<scalar_t>(rows, basis, ones, {to + 2, to + 2 + square, to + 1});
    // The trace tells: as U is orthonormal, no entry of the moments is larger.
    if (to[1] > 0 && to[1] < std::numeric_limits<scalar_t>::max() / 4) sums.add_(fresh);
  });
}

}  // namespace
}  // namespace CPU_CAPABILITY

TORCH_LIBRARY_IMPL(gls_fused, CPU, m) {
  m.impl("sketch_rows", &sketch_rows);
  m.impl("add_sketch_", &add_sketch_);
}

}  // namespace gls_fused
