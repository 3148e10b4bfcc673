// A product of csrc/cuda/product.h from what a test has.
#pragma once

#include "../../../../csrc/cuda/plan.h"

namespace gls_fused::cuda {

inline Product make_product(const void* x, Last kind, const void* last, const float* basis,
                            const float* core_inverse, float* parts, double* squares, int64_t n,
                            int64_t size, int64_t x_row, int rank) {
  Product p{};
  p.x = x;
  p.last = last;
  p.basis = basis;
  p.core_inverse = core_inverse;
  p.parts = parts;
  p.squares = squares;
  p.n = n;
  p.size = size;
  p.x_row = x_row;
  p.basis_row = size + (kind != Last::kAbsent);
  p.last_stride = 1;
  p.rank = rank;
  p.kind = kind;
  split_columns(p);
  return p;
}

}  // namespace gls_fused::cuda
