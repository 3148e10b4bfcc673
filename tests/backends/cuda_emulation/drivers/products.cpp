// A P, A U and its sums, by the launchers of rows_kernels.cu and sketch_kernels.cu.

#include "products.h"

#include <emulation/driver.h>

using namespace gls_fused::cuda;
using cuda_emulation::guarded;

EMULATED precondition(Dtype dtype, Last kind, const void* x, const void* last, const float* basis,
                      const float* core_inverse, const float* shift, float* parts, float* turned,
                      void* output, void* output_last, int64_t n, int64_t size, int64_t x_row,
                      int rank) {
  return guarded([&] {
    Combination combination{};
    combination.product = make_product(x, kind, last, basis, core_inverse, parts, turned, nullptr,
                                       n, size, x_row, rank);
    combination.shift = shift;
    combination.output = output;
    combination.output_last = output_last;
    launch_combination(combination, dtype, nullptr);
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
    ProductPlan plan(dtype);
    plan.add(product);
    Gram gram = make_gram(product);
    gram.parts = gram_parts;
    gram.core = core;
    gram.last = last;
    gram.last_stride = 1;
    gram.trace = trace;
    plan.launch(nullptr);
    launch_gram(gram, nullptr);
  });
}

EMULATED add_usable(const float* fresh, float* sums, int64_t numel, int32_t* flags) {
  return guarded([&] { launch_add_usable(fresh, sums, numel, flags, nullptr); });
}
