// Elements and their arithmetic: 16-byte accesses, conversions, sums over a block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "ptx.cuh"

namespace gls_fused::cuda {

// The dtype of the arithmetic, and of the state beside parameters of type T.
template <typename T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <typename T>
using Wide = typename WideOf<T>::type;

// Elements in 16 bytes.
template <typename T>
constexpr int kWidth = 16 / sizeof(T);

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(double x, double& to) { to = x; }
__device__ inline void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16(x); }
__device__ inline void narrow(float x, __half& to) { to = __float2half(x); }

// N consecutive elements from an address at a multiple of 16 bytes; N a multiple of kWidth.
template <int N, typename T>
__device__ inline void load_elements(const T* from, Wide<T> (&to)[N]) {
#pragma unroll
  for (int v = 0; v < N; v += kWidth<T>) {
    const uint4 bits = *reinterpret_cast<const uint4*>(from + v);
    T x[kWidth<T>];
    std::memcpy(x, &bits, sizeof(bits));
#pragma unroll
    for (int k = 0; k < kWidth<T>; ++k) to[v + k] = widen(x[k]);
  }
}

template <int N, typename T>
__device__ inline void store_elements(const Wide<T> (&from)[N], T* to) {
#pragma unroll
  for (int v = 0; v < N; v += kWidth<T>) {
    T x[kWidth<T>];
#pragma unroll
    for (int k = 0; k < kWidth<T>; ++k) narrow(from[v + k], x[k]);
    uint4 bits;
    std::memcpy(&bits, x, sizeof(bits));
    store_16(to + v, bits);
  }
}

__device__ inline bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// The sum of x over a block of kThreads, in the same order each time; valid in thread 0.
template <int kThreads>
__device__ inline double sum_block(double x) {
  __shared__ double warps[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_down_sync(0xffffffffu, x, offset);
  // Whoever calls this twice must not overwrite what thread 0 still reads.
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kThreads / 32; ++warp) total += warps[warp];
  }
  return total;
}

// The entry of a table, sorted by `first`, that block `block` of the launch belongs to.
template <typename Table>
__device__ inline int find_entry(const Table& table, uint32_t block) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.entries[middle].first <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

}  // namespace gls_fused::cuda
