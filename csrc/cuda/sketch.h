// What the kernels of a sketch are told; see sketch.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace gls_fused::cuda {

constexpr int kSketchThreads = 256;
constexpr int kGramRows = 32;
// Blocks of add_sketch_: each looks at the flags of all, a flag to a thread.
constexpr int kAddBlocks = 256;

struct Gram {
  const float* projected;  // Y [n, rank]
  const double* squares;   // of A, a number to each of `blocks`
  float* parts;            // [splits, rank rank + rank]: Y'Y and 1'Y of a part of the rows
  float* core;             // Y'Y [rank, rank]
  float* last;             // 1'Y, `last_stride` apart; null without a column of ones
  float* trace;            // ||A||_F^2, the column of ones included
  int64_t n;
  int64_t rows;  // of a part, a multiple of kGramRows
  int64_t blocks;
  int64_t last_stride;
  int32_t rank;
  int32_t splits;
};

void launch_gram(const Gram& gram, cudaStream_t stream);
// sums [numel] += fresh [numel], unless fresh has a number that is not finite, or fresh[1] is not
// above zero. `flags` [kAddBlocks].
void launch_add_usable(const float* fresh, float* sums, int64_t numel, int32_t* flags,
                       cudaStream_t stream);

}  // namespace gls_fused::cuda
