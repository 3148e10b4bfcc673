// A product of csrc/cuda/product.h from what a test has.
#pragma once

#include "../../../csrc/cuda/product.h"

namespace gls_fused::cuda {

inline Product make_product(const void* x, Last kind, const void* last, const float* basis,
                            const float* core_inverse, float* parts, float* turned, double* squares,
                            int64_t n, int64_t size, int64_t x_row, int rank) {
  Product p{};
  p.x = x;
  p.last = last;
  p.basis = basis;
  p.core_inverse = core_inverse;
  p.parts = parts;
  p.turned = turned;
  p.squares = squares;
  p.n = n;
  p.size = size;
  p.x_row = x_row;
  p.basis_row = size + (kind != Last::kAbsent);
  p.last_stride = 1;
  p.rank = rank;
  p.splits = count_splits(n, size);
  const int64_t steps = (size + kProjectColumns - 1) / kProjectColumns;
  p.columns = (steps + p.splits - 1) / p.splits * kProjectColumns;
  p.kind = kind;
  return p;
}

inline bool is_aligned16(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// Whether every row of X begins at 16 bytes and ends there.
inline bool is_wide(const Product& p, int64_t bytes_of_element) {
  return is_aligned16(p.x) && p.size * bytes_of_element % 16 == 0 &&
         p.x_row * bytes_of_element % 16 == 0;
}

// Tables hold either wide entries or others.
inline void append(ProductTable (&tables)[2], Product p, int64_t bytes_of_element) {
  const bool wide = is_wide(p, bytes_of_element);
  ProductTable& table = tables[wide];
  table.wide = wide;
  const auto rows = static_cast<uint32_t>((p.n + kProjectRows - 1) / kProjectRows);
  p.first = table.blocks;
  table.blocks += rows * p.splits;
  if (rows > table.most_rows) table.most_rows = rows;
  table.entries[table.count++] = p;
}

}  // namespace gls_fused::cuda
