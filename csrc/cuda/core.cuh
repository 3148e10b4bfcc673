// C and lambda' of all layers in one launch, a layer to a block:
//
//   lambda = share t,   lambda' = lambda + max(t - tr M, 0) / (d - r),
//   C = (M + lambda I)^-1 - I / lambda'
#pragma once

#include "core.h"
#include "elements.cuh"
#include "inverse.cuh"

namespace gls_fused::cuda {

template <typename T>
__global__ void __launch_bounds__(kCoreThreads)
    invert_cores_kernel(const __grid_constant__ CoreTable table) {
  // One name for both instantiations must be of one type.
  extern __shared__ double shared[];
  const CoreLayer& layer = table.entries[blockIdx.x];
  const int rank = layer.rank, pitch = rank + 1;
  T* a = reinterpret_cast<T*>(shared);
  T* row = a + rank * pitch;
  T* column = row + rank;
  const T* core = static_cast<const T*>(layer.core);
  const T trace = *static_cast<const T*>(layer.trace);
  const T damp = T(double(trace) * layer.share);

  // By every thread for itself: r numbers from the first-level cache.
  T core_trace = 0;
  for (int i = 0; i < rank; ++i) core_trace += core[i * rank + i];
  T rest = 0;
  if (layer.dim > rank) {
    rest = (trace - core_trace) / T(layer.dim - rank);
    // As clamp does, a NaN stays one.
    if (rest < 0) rest = 0;
  }
  const T shift = damp + rest;
  for (int at = threadIdx.x; at < rank * rank; at += kCoreThreads) {
    const int i = at / rank, j = at % rank;
    a[i * pitch + j] = core[at] / damp + (i == j ? T(1) : T(0));
  }
  const bool fine = invert_matrix(a, rank, pitch, row, column, column + rank);
  T* core_inverse = static_cast<T*>(layer.core_inverse);
  for (int at = threadIdx.x; at < rank * rank; at += kCoreThreads) {
    const int i = at / rank, j = at % rank;
    T x = a[i * pitch + j] / damp;
    // Rounding has left M + lambda I not positive definite.
    if (!fine) x = i == j ? 1 / (damp + core_trace / T(rank)) : T(0);
    core_inverse[at] = i == j ? x - 1 / shift : x;
  }
  if (threadIdx.x == 0) *static_cast<T*>(layer.shift) = shift;
}

}  // namespace gls_fused::cuda
