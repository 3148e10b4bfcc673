// Y'Y, 1'Y and ||A||_F^2 for Y = A U, in two stages: a part of the rows to a block, then the parts
// in order. No float atomics, so the same rows give the same bits. Y is product.cuh's; A'Y is a
// plain dense product without anything to fuse, of at most about a thousand rows, and cuBLAS's.
#pragma once

#include "elements.cuh"
#include "product.h"
#include "sketch.h"

namespace gls_fused::cuda {

// parts[block] = Y'Y [rank, rank], then 1'Y [rank], of the block's rows.
__global__ void __launch_bounds__(kSketchThreads) gram_kernel(const __grid_constant__ Gram x) {
  __shared__ float ys[kGramRows * kMaxRank];
  const int64_t begin = blockIdx.x * x.rows;
  const int64_t end = begin + x.rows < x.n ? begin + x.rows : x.n;
  // Column j of Y'Y, every fourth row of it.
  const int j = threadIdx.x % kMaxRank, i = threadIdx.x / kMaxRank;
  constexpr int kStep = kSketchThreads / kMaxRank;
  float products[kMaxRank / kStep] = {};
  float sum = 0;
  for (int64_t first = begin; first < end; first += kGramRows) {
    for (int at = threadIdx.x; at < kGramRows * kMaxRank; at += kSketchThreads) {
      const int64_t row = first + at / kMaxRank;
      const int c = at % kMaxRank;
      ys[at] = row < end && c < x.rank ? x.projected[row * x.rank + c] : 0.0f;
    }
    __syncthreads();
    for (int row = 0; row < kGramRows; ++row) {
      const float* y = ys + row * kMaxRank;
      const float mine = y[j];
      sum += mine;
#pragma unroll
      for (int q = 0; q < kMaxRank / kStep; ++q) products[q] += y[i + q * kStep] * mine;
    }
    __syncthreads();
  }
  if (j >= x.rank) return;
  float* part = x.parts + blockIdx.x * int64_t(x.rank * x.rank + x.rank);
#pragma unroll
  for (int q = 0; q < kMaxRank / kStep; ++q) {
    const int row = i + q * kStep;
    if (row < x.rank) part[row * x.rank + j] = products[q];
  }
  if (i == 0) part[x.rank * x.rank + j] = sum;
}

__global__ void __launch_bounds__(kSketchThreads)
    finish_gram_kernel(const __grid_constant__ Gram x) {
  const int square = x.rank * x.rank, width = square + x.rank;
  const int at = blockIdx.x * kSketchThreads + threadIdx.x;
  if (at < width) {
    double sum = 0;
    for (int split = 0; split < x.splits; ++split) sum += x.parts[int64_t(split) * width + at];
    if (at < square) {
      x.core[at] = float(sum);
    } else if (x.last) {
      x.last[(at - square) * x.last_stride] = float(sum);
    }
  }
  if (blockIdx.x != 0) return;
  double squares = 0;
  for (int64_t i = threadIdx.x; i < x.blocks; i += kSketchThreads) squares += x.squares[i];
  squares = sum_block<kSketchThreads>(squares);
  if (threadIdx.x == 0) *x.trace = float(squares + (x.last ? double(x.n) : 0));
}

// flags[block] = 1 where the block's part of `fresh` has a number that is not finite.
__global__ void __launch_bounds__(kSketchThreads)
    flag_kernel(const float* fresh, int64_t numel, int32_t* flags) {
  double bad = 0;
  for (int64_t at = blockIdx.x * int64_t(kSketchThreads) + threadIdx.x; at < numel;
       at += kAddBlocks * int64_t(kSketchThreads)) {
    // Neither for a NaN nor for an infinity.
    if (!(fresh[at] - fresh[at] == 0)) bad = 1;
  }
  bad = sum_block<kSketchThreads>(bad);
  if (threadIdx.x == 0) flags[blockIdx.x] = bad != 0;
}

__global__ void __launch_bounds__(kSketchThreads)
    add_usable_kernel(const float* fresh, float* sums, int64_t numel, const int32_t* flags) {
  __shared__ bool usable;
  const double bad = sum_block<kSketchThreads>(double(flags[threadIdx.x]));
  if (threadIdx.x == 0) usable = bad == 0 && fresh[1] > 0;
  __syncthreads();
  if (!usable) return;
  for (int64_t at = blockIdx.x * int64_t(kSketchThreads) + threadIdx.x; at < numel;
       at += kAddBlocks * int64_t(kSketchThreads)) {
    sums[at] += fresh[at];
  }
}

static_assert(kAddBlocks == kSketchThreads, "a flag to a thread");

}  // namespace gls_fused::cuda
