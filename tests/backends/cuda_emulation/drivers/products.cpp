// A P, A U and its sums, by the launchers of rows_kernels.cu and sketch_kernels.cu.

#include "products.h"

#include <emulation/driver.h>

using namespace gls_fused::cuda;
using cuda_emulation::guarded;

EMULATED precondition(Dtype dtype, Last kind, const void* x, const void* last, const float* basis,
                      const float* core_inverse, const float* shift, float* parts, void* output, void* output_last, int64_t n, int64_t size, int64_t x_row,
                      int rank) {
  return guarded([&] {
    Combination combination{};
    combination.product =
        make_product(x, kind, last, basis, core_inverse, parts, nullptr, n, size, x_row, rank);
    combination.shift = shift;
    combination.output = output;
    combination.output_last = output_last;
    launch_combination(combination, dtype, nullptr);
  });
}

namespace {

Gram plan_sketch(Dtype dtype, const void* rows, bool ones, const float* basis, float* parts,
                 float* projected, double* squares, float* gram_parts, int64_t n, int64_t size,
                 int64_t x_row, int rank) {
  const Last kind = ones ? Last::kOnes : Last::kAbsent;
  const Product product = make_product(rows, kind, nullptr, basis, nullptr, parts, squares, n, size,
                                       x_row, rank);
  ProductPlan plan(dtype);
  plan.add(product);
  Gram gram = make_gram(product);
  gram.projected = projected;
  gram.parts = gram_parts;
  gram.ones = ones;
  gram.dim = size + ones;
  plan.launch(nullptr);
  launch_gram(gram, nullptr);
  return gram;
}

}  // namespace

// Y, Y'Y, 1'Y (null without a column of ones) and ||A||_F^2; 1'Y has its elements side by side.
EMULATED sketch(Dtype dtype, const void* rows, const float* basis, float* parts, float* projected,
                double* squares, float* gram_parts, float* core, float* last, float* trace,
                int64_t n, int64_t size, int64_t x_row, int rank) {
  return guarded([&] {
    Gram gram = plan_sketch(dtype, rows, last, basis, parts, projected, squares, gram_parts, n, size,
                            x_row, rank);
    gram.dim = 1;
    launch_finish_gram(gram, core, last, trace, nullptr);
  });
}

// With A'Y given by columns.
EMULATED add_sketch(const float* rows, bool ones, const float* basis, const float* transposed,
                    float* parts, float* projected, double* squares, float* gram_parts, float* sums,
                    int64_t n, int64_t size, int rank) {
  return guarded([&] {
    const Gram gram = plan_sketch(Dtype::kFloat, rows, ones, basis, parts, projected, squares,
                                  gram_parts, n, size, size, rank);
    launch_add_sketch(gram, transposed, sums, nullptr);
  });
}
