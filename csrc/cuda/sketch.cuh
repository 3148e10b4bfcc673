// Y, Y'Y, 1'Y and ||A||_F^2 for Y = A U, in two stages: a part of the rows to a block, then the parts
// in order. No float atomics, so the same rows give the same bits. Y is product.cuh's; A'Y is a
// plain dense product without anything to fuse, of at most about a thousand rows, and cuBLAS's.
#pragma once

#include <cfloat>

#include "product.cuh"
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
      float y = 0;
      if (row < end && c < x.rank) {
        y = sum_parts(x.turned, x.turned.parts + row * x.rank + c);
        if (x.projected) x.projected[row * x.rank + c] = y;
      }
      ys[at] = y;
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

// ||A||_F^2, the column of ones included; valid in thread 0.
__device__ inline double sum_squares(const Gram& x) {
  double squares = 0;
  for (int64_t i = threadIdx.x; i < x.blocks; i += kSketchThreads) squares += x.squares[i];
  return sum_block<kSketchThreads>(squares) + (x.ones ? double(x.n) : 0);
}

// An element of Y'Y, or, beyond its rank rank, of 1'Y.
__device__ inline float sum_gram(const Gram& x, int at) {
  const int width = x.rank * x.rank + x.rank;
  double sum = 0;
  for (int split = 0; split < x.splits; ++split) sum += x.parts[int64_t(split) * width + at];
  return float(sum);
}

__global__ void __launch_bounds__(kSketchThreads)
    finish_gram_kernel(const __grid_constant__ Gram x, float* core, float* last, float* trace) {
  const int square = x.rank * x.rank, width = square + x.rank;
  const int at = blockIdx.x * kSketchThreads + threadIdx.x;
  if (at < square) {
    core[at] = sum_gram(x, at);
  } else if (at < width && last) {
    last[(at - square) * x.dim] = sum_gram(x, at);
  }
  if (blockIdx.x != 0) return;
  const double squares = sum_squares(x);
  if (threadIdx.x == 0) *trace = float(squares);
}

// An element to a thread. The trace tells whether the sums are usable: as U is orthonormal, no
// number of the others is larger.
__global__ void __launch_bounds__(kSketchThreads)
    add_sketch_kernel(const __grid_constant__ Gram x, const float* transposed, float* sums) {
  __shared__ float trace;
  const double squares = sum_squares(x);
  if (threadIdx.x == 0) trace = float(squares);
  __syncthreads();
  // Neither for a NaN nor for an infinity.
  if (!(trace > 0 && trace < FLT_MAX / 4)) return;
  const int square = x.rank * x.rank;
  int64_t at = blockIdx.x * int64_t(kSketchThreads) + threadIdx.x;
  if (at < 2) {
    sums[at] += at == 0 ? float(x.n) : trace;
    return;
  }
  sums += at;
  at -= 2;
  if (at < square) {
    *sums += sum_gram(x, int(at));
    return;
  }
  at -= square;
  if (at >= x.rank * x.dim) return;
  const bool is_last = x.ones && at % x.dim == x.dim - 1;
  *sums += is_last ? sum_gram(x, int(square + at / x.dim)) : transposed[at];
}

}  // namespace gls_fused::cuda
