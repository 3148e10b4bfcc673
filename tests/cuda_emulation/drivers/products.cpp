// A P, A U and its sums, by the launchers of rows_kernels.cu and sketch_kernels.cu.

#include "products.h"

#include <emulation/driver.h>

#include "../../../csrc/cuda/sketch.h"

using namespace gls_fused::cuda;
using cuda_emulation::guarded;

namespace {

int64_t element_bytes(Dtype dtype) { return dtype == Dtype::kFloat ? 4 : 2; }

// X U, then T = (X U) C, or (X U) itself where core_inverse is null.
Product project(Dtype dtype, const Product& product) {
  ProductTable tables[2]{};
  append(tables, product, element_bytes(dtype));
  const ProductTable& table = tables[tables[1].count];
  if (table.blocks > 0) {
    launch_project(table, dtype, nullptr);
    launch_turn(table, dtype, nullptr);
  }
  return table.entries[0];
}

}  // namespace

EMULATED precondition(Dtype dtype, Last kind, const void* x, const void* last, const float* basis,
                      const float* core_inverse, const float* shift, float* parts, float* turned,
                      void* output, void* output_last, int64_t n, int64_t size, int64_t x_row,
                      int rank) {
  return guarded([&] {
    Combination combination{};
    combination.product = project(dtype, make_product(x, kind, last, basis, core_inverse, parts,
                                                      turned, nullptr, n, size, x_row, rank));
    combination.shift = shift;
    combination.output = output;
    combination.output_last = output_last;
    combination.wide = is_wide(combination.product, element_bytes(dtype)) && is_aligned16(output);
    if (n > 0) launch_combine(combination, dtype, nullptr);
  });
}

// Y, Y'Y, 1'Y (null without a column of ones) and ||A||_F^2.
EMULATED sketch(Dtype dtype, const void* rows, const float* basis, float* parts, float* projected,
                double* squares, float* gram_parts, float* core, float* last, float* trace,
                int64_t n, int64_t size, int64_t x_row, int rank) {
  return guarded([&] {
    const Last kind = last ? Last::kOnes : Last::kAbsent;
    const Product product = make_product(rows, kind, nullptr, basis, nullptr, parts, projected,
                                         squares, n, size, x_row, rank);
    project(dtype, product);
    Gram gram{};
    gram.projected = projected;
    gram.squares = squares;
    gram.parts = gram_parts;
    gram.core = core;
    gram.last = last;
    gram.trace = trace;
    gram.n = n;
    gram.rows = gram_rows(n);
    gram.blocks = (n + kProjectRows - 1) / kProjectRows * product.splits;
    gram.last_stride = 1;
    gram.rank = rank;
    gram.splits = static_cast<int32_t>((n + gram.rows - 1) / gram.rows);
    launch_gram(gram, nullptr);
  });
}

EMULATED add_usable(const float* fresh, float* sums, int64_t numel, int32_t* flags) {
  return guarded([&] { launch_add_usable(fresh, sums, numel, flags, nullptr); });
}
