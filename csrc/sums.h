// Where a sketch writes its sums, alike on all devices.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

namespace gls_fused {
// csrc/cpu is compiled once per CPU capability, and a library must not run another's code.
#ifdef CPU_CAPABILITY
inline namespace CPU_CAPABILITY {
#endif

// Each contiguous.
struct Sketch {
  at::Tensor core;        // Y'Y [r, r]
  at::Tensor transposed;  // (A'Y)' [r, d]
  at::Tensor trace;       // ||A||_F^2 []
};

inline Sketch make_sketch(const at::Tensor& basis) {
  const int64_t dim = basis.size(0), rank = basis.size(1);
  return {at::empty({rank, rank}, basis.options()), at::empty({rank, dim}, basis.options()),
          at::empty({}, basis.options())};
}

// In sums [2 + r r + r d], which are [n, ||A||_F^2, Y'Y, (A'Y)'].
inline Sketch view_sketch(const at::Tensor& sums, const at::Tensor& basis) {
  const int64_t dim = basis.size(0), rank = basis.size(1), square = rank * rank;
  return {sums.narrow(0, 2, square).view({rank, rank}),
          sums.narrow(0, 2 + square, rank * dim).view({rank, dim}), sums[1]};
}

#ifdef CPU_CAPABILITY
}  // namespace CPU_CAPABILITY
#endif
}  // namespace gls_fused
