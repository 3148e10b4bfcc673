// Kernels with one fault each, which the emulator must find, and each fault mended.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace broken {

// The last thread's 16 bytes run past the end of x and y.
template <bool kMended>
__global__ void out_of_bounds_kernel(const float* x, float* y, int64_t n) {
  const int64_t at = 4 * (int64_t(blockIdx.x) * blockDim.x + threadIdx.x);
  if (at >= n) return;
  if (kMended && at + 4 > n) {
    for (int64_t i = at; i < n; ++i) y[i] = x[i];
    return;
  }
  *reinterpret_cast<float4*>(y + at) = *reinterpret_cast<const float4*>(x + at);
}

// One more element of dynamic shared memory than the launch gives.
template <bool kMended>
__global__ void out_of_shared_kernel(const float* x, float* y) {
  extern __shared__ float values[];
  const unsigned at = threadIdx.x + (kMended ? 0 : 1);
  values[at] = x[threadIdx.x];
  y[threadIdx.x] = values[at];
}

// Threads read what other warps write, without a barrier in between.
template <bool kMended>
__global__ void missing_barrier_kernel(const float* x, float* y) {
  __shared__ float values[128];
  values[threadIdx.x] = x[threadIdx.x];
  if (kMended) __syncthreads();
  y[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

// The same within a warp.
template <bool kMended>
__global__ void missing_warp_barrier_kernel(const float* x, float* y) {
  __shared__ float values[32];
  values[threadIdx.x] = x[threadIdx.x];
  __shfl_sync(~0u, 0, 0);
  if (kMended) __syncwarp();
  y[threadIdx.x] = values[31 - threadIdx.x];
}

// Overwrites what others may still be reading.
template <bool kMended>
__global__ void missing_second_barrier_kernel(const float* x, float* y) {
  __shared__ float values[128];
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    values[threadIdx.x] = x[threadIdx.x] + float(round);
    __syncthreads();
    sum += values[blockDim.x - 1 - threadIdx.x];
    if (kMended) __syncthreads();
  }
  y[threadIdx.x] = sum;
}

// Overwrites what the thread before reads; nobody reads what is written.
template <bool kMended>
__global__ void early_write_kernel(const float* x, float* y) {
  __shared__ float values[129];
  values[threadIdx.x + 1] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = values[threadIdx.x + 1];
  if (kMended) __syncthreads();
  values[threadIdx.x] = 0;
}

// Overwrites what all warps read.
template <bool kMended>
__global__ void early_write_for_all_kernel(const float* x, float* y) {
  __shared__ float value;
  if (threadIdx.x == 0) value = x[1];
  __syncthreads();
  y[threadIdx.x] = value;
  if (kMended) __syncthreads();
  if (threadIdx.x == blockDim.x - 1) value = 0;
}

// Only some threads reach the barrier.
template <bool kMended>
__global__ void divergent_barrier_kernel(const float* x, float* y, int n) {
  __shared__ float values[128];
  const int at = threadIdx.x;
  if (!kMended && at >= n) return;
  values[at] = at < n ? x[at] : 0.0f;
  __syncthreads();
  if (at < n) y[at] = values[n - 1 - at];
}

// All threads meet, but not at the same barrier.
template <bool kMended>
__global__ void two_barriers_kernel(const float* x, float* y) {
  if (kMended || threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = x[threadIdx.x];
}

// Half a warp shuffles with a mask that names all of it.
template <bool kMended>
__global__ void divergent_shuffle_kernel(const float* x, float* y) {
  float value = x[threadIdx.x];
  const unsigned mask = kMended ? 0xffffu : ~0u;
  if (threadIdx.x < 16) value += __shfl_xor_sync(mask, value, 1);
  y[threadIdx.x] = value;
}

// Two blocks add to one number by a plain load and store.
template <bool kMended>
__global__ void racing_blocks_kernel(const float* x, float* y) {
  if (threadIdx.x != 0) return;
  if (kMended) {
    atomicAdd(y, x[blockIdx.x]);
  } else {
    *y += x[blockIdx.x];
  }
}

// One block overwrites what another reads.
template <bool kMended>
__global__ void overwriting_blocks_kernel(const float* x, float* y) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    y[1] = y[0] + x[1];
  } else {
    y[kMended ? 2 : 0] = x[0];
  }
}

// An index past the end of an array in shared memory, though not of shared memory.
template <bool kMended>
__global__ void out_of_array_kernel(const float* x, float* y) {
  __shared__ float values[2][32];
  values[0][threadIdx.x] = x[threadIdx.x];
  values[1][threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = values[0][threadIdx.x + (kMended ? 0 : 1)];
}

// 16-byte accesses from an address at a multiple of 4.
template <bool kMended>
__global__ void misaligned_kernel(const float* x, float* y) {
  const int first = kMended ? 0 : 1;
  *reinterpret_cast<float4*>(y) = *reinterpret_cast<const float4*>(x + first);
}

}  // namespace broken
