// What the kernels of a sketch are told; see sketch.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "product.h"

namespace gls_fused::cuda {

constexpr int kSketchThreads = 256;
constexpr int kGramRows = 32;

struct Gram {
  Turned turned;           // Y in parts
  float* projected;        // Y [n, rank]; null where that is its only part
  const double* squares;   // of A, a number to each of `blocks`
  float* parts;            // [splits, rank rank + rank]: Y'Y and 1'Y of a part of the rows
  int64_t n;
  int64_t rows;  // of a part, a multiple of kGramRows
  int64_t blocks;
  int64_t dim;  // of A, the column of ones included
  int32_t rank;
  int32_t splits;
  bool ones;
};

void launch_gram(const Gram& gram, cudaStream_t stream);
// Y'Y [rank, rank], 1'Y, dim apart, unless `last` is null, and ||A||_F^2, the column of ones
// included, from their parts.
void launch_finish_gram(const Gram& gram, float* core, float* last, float* trace,
                        cudaStream_t stream);
// sums [2 + rank rank + rank dim] += [n, ||A||_F^2, Y'Y, (A'Y)'], unless the rows are all zero or hold
// a NaN or an infinity. Of (A'Y)' [rank, dim] the last column is not read where it is that of ones.
void launch_add_sketch(const Gram& gram, const float* transposed, float* sums,
                       cudaStream_t stream);

}  // namespace gls_fused::cuda
