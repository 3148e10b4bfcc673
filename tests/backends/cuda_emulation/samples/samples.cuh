// Kernels that use what the emulator gives; tests of the emulator know their results.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <mma.h>

#include <cstdint>

namespace samples {

// z = x + y by 16-byte accesses, the rest one by one.
__global__ void add_kernel(const float* x, const float* y, float* z, int64_t n) {
  const int64_t at = 4 * (int64_t(blockIdx.x) * blockDim.x + threadIdx.x);
  if (at + 4 <= n) {
    const float4 a = *reinterpret_cast<const float4*>(x + at);
    const float4 b = *reinterpret_cast<const float4*>(y + at);
    *reinterpret_cast<float4*>(z + at) = make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
  } else {
    for (int64_t i = at; i < n; ++i) z[i] = x[i] + y[i];
  }
}

template <typename From, typename To>
__global__ void convert_kernel(const From* from, To* to, int64_t n) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at < n) to[at] = To(float(from[at]));
}

// One sum per block: shuffles within warps, shared memory between them.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) sum_kernel(const float* x, float* sums, int64_t n) {
  __shared__ float warps[kThreads / 32];
  float sum = 0;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < n; i += kThreads * gridDim.x) {
    sum += x[i];
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(~0u, sum, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kThreads / 32; ++i) sum += warps[i];
    sums[blockIdx.x] = sum;
  }
}

// The block that finishes last adds up what the others have left: fences, atomics, a vote.
__global__ void sum_once_kernel(const float* x, float* partial, unsigned* finished, float* total,
                                int64_t n) {
  float sum = 0;
  if (threadIdx.x == 0) {
    for (int64_t i = blockIdx.x; i < n; i += gridDim.x) sum += x[i];
    partial[blockIdx.x] = sum;
    __threadfence();
  }
  bool last = false;
  if (threadIdx.x == 0) last = atomicInc(finished, gridDim.x - 1) == gridDim.x - 1;
  if (!__syncthreads_or(last) || threadIdx.x != 0) return;
  sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += partial[i];
  *total = sum;
}

// C = A B, [m, k] by [k, n], in square tiles of dynamic shared memory.
template <int kTile>
__global__ void multiply_kernel(const float* a, const float* b, float* c, int m, int n, int k) {
  extern __shared__ float tiles[];
  float* tile_a = tiles;
  float* tile_b = tiles + kTile * kTile;
  const int x = threadIdx.x, y = threadIdx.y;
  const int row = blockIdx.y * kTile + y, column = blockIdx.x * kTile + x;
  float sum = 0;
  for (int begin = 0; begin < k; begin += kTile) {
    tile_a[y * kTile + x] = row < m && begin + x < k ? a[row * k + begin + x] : 0.0f;
    tile_b[y * kTile + x] = column < n && begin + y < k ? b[(begin + y) * n + column] : 0.0f;
    __syncthreads();
    for (int i = 0; i < kTile; ++i) {
      sum = __fmaf_rn(tile_a[y * kTile + i], tile_b[i * kTile + x], sum);
    }
    __syncthreads();
  }
  if (row < m && column < n) c[row * n + column] = sum;
}

// C = A B', [16, k] by [n, k], a warp per 16 columns; k and n multiples of the tensor cores' shape.
template <typename T, typename Stored, int kDepth>
__global__ void tensor_core_kernel(const Stored* a, const Stored* b, float* c, int n, int k) {
  namespace wmma = nvcuda::wmma;
  const int column = 16 * blockIdx.x;
  wmma::fragment<wmma::matrix_a, 16, 16, kDepth, T, wmma::row_major> left;
  wmma::fragment<wmma::matrix_b, 16, 16, kDepth, T, wmma::col_major> right;
  wmma::fragment<wmma::accumulator, 16, 16, kDepth, float> sum;
  wmma::fill_fragment(sum, 0.0f);
  for (int i = 0; i < k; i += kDepth) {
    wmma::load_matrix_sync(left, a + i, k);
    wmma::load_matrix_sync(right, b + column * k + i, k);
    wmma::mma_sync(sum, left, right, sum);
  }
  wmma::store_matrix_sync(c + column, sum, n, wmma::mem_row_major);
}

// Per lane: ballot, three shuffles, any, all, of one warp whose lanes vote for `votes`.
__global__ void warp_kernel(unsigned votes, int* results) {
  const int lane = threadIdx.x;
  const bool mine = votes >> lane & 1;
  int* out = results + 7 * lane;
  out[0] = static_cast<int>(__ballot_sync(~0u, mine));
  out[1] = __shfl_up_sync(~0u, lane, 3, 16);
  out[2] = __shfl_down_sync(~0u, lane, 3, 16);
  out[3] = __shfl_xor_sync(~0u, lane, 5);
  out[4] = __shfl_sync(~0u, lane, 9, 8);
  out[5] = __any_sync(~0u, mine);
  out[6] = __all_sync(~0u, mine);
}

// Lanes hand values to their neighbours through shared memory, ordered by __syncwarp alone.
__global__ void rotate_kernel(const int* x, int* y) {
  __shared__ int values[64];
  const int warp = threadIdx.x / 32 * 32, lane = threadIdx.x % 32;
  values[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  y[threadIdx.x] = values[warp + (lane + 1) % 32];
}

}  // namespace samples
