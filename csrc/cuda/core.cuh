// C and lambda'^p of all layers in one launch, a layer to a block:
//
//   lambda = damping t / min(d, s),   lambda' = lambda + max(t - tr M, 0) / (d - r),
//   C = (M + lambda I)^-p - I / lambda'^p
//
// p = 1 by elimination, the other powers from the inverse fourth root, by products, which need a
// barrier each: eigenvalues would come of some hundred rounds of rotations that wait for one another.
#pragma once

#include <cfloat>

#include "core.h"
#include "elements.cuh"
#include "fourth_root.cuh"
#include "inverse.cuh"

namespace gls_fused::cuda {

// lambda, lambda' and tr M. By every thread for itself: r numbers from the first-level cache.
template <typename T>
struct CoreNumbers {
  T damp, shift, trace;
};

template <typename T>
__device__ inline CoreNumbers<T> number_core(const CoreLayer& layer, double damping) {
  const T* core = static_cast<const T*>(layer.core);
  const T trace = *static_cast<const T*>(layer.trace);
  double rows = double(layer.dim);
  if (layer.samples != nullptr) rows = fmin(rows, double(*static_cast<const T*>(layer.samples)));
  // The reference's bound: 32 units of rounding.
  const double least = 32 * (sizeof(T) == 4 ? double(FLT_EPSILON) : DBL_EPSILON);
  const T damp = T(double(trace) * fmax(damping / rows, least));
  T core_trace = 0;
  for (int i = 0; i < layer.rank; ++i) core_trace += core[i * layer.rank + i];
  T rest = 0;
  if (layer.dim > layer.rank) {
    rest = (trace - core_trace) / T(layer.dim - layer.rank);
    // As clamp does, a NaN stays one.
    if (rest < 0) rest = 0;
  }
  return {damp, damp + rest, core_trace};
}

template <typename T>
__global__ void __launch_bounds__(kCoreThreads)
    invert_cores_kernel(const __grid_constant__ CoreTable table) {
  // One name for all instantiations must be of one type; tiles are read in accesses of 16 bytes.
  extern __shared__ __align__(16) double shared[];
  const CoreLayer& layer = table.entries[blockIdx.x];
  const int rank = layer.rank, pitch = rank + 1;
  T* a = reinterpret_cast<T*>(shared);
  T* row = a + rank * pitch;
  T* column = row + rank;
  const T* core = static_cast<const T*>(layer.core);
  const auto [damp, shift, core_trace] = number_core<T>(layer, table.damping);
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

// x^(quarters / 4), quarters 1 to 3.
template <typename T>
__device__ inline T raise(T x, int quarters) {
  const T root = sqrt(x);
  if (quarters == 2) return root;
  return quarters == 1 ? sqrt(root) : root * sqrt(root);
}

// The same for p = quarters / 4, quarters 1 to 3; rows in shared memory are `pitch` apart.
template <typename T>
__global__ void __launch_bounds__(kCoreThreads)
    root_cores_kernel(const __grid_constant__ CoreTable table, int quarters, int pitch) {
  extern __shared__ __align__(16) double shared[];
  constexpr int kTiles = (sizeof(T) == 4 ? kMaxRootRank : kMaxDoubleRootRank) / kRootTile;
  static_assert(kTiles * (kTiles + 1) / 2 <= kCoreThreads);
  const CoreLayer& layer = table.entries[blockIdx.x];
  const int rank = layer.rank, tiles = (rank + kRootTile - 1) / kRootTile;
  const int width = tiles * kRootTile;
  T* b = reinterpret_cast<T*>(shared);
  T* x = b + width * pitch;
  T* t = x + width * pitch;
  const T* core = static_cast<const T*>(layer.core);
  const auto [damp, shift, core_trace] = number_core<T>(layer, table.damping);
  // The trace of M + lambda I, which no eigenvalue of it exceeds.
  const T bound = core_trace + T(rank) * damp;
  for (int at = threadIdx.x; at < width * width; at += kCoreThreads) {
    const int i = at / width, j = at % width;
    T element = 0;
    if (i < rank && j < rank) {
      element = (core[i * rank + j] + core[j * rank + i]) / 2 + (i == j ? damp : T(0));
    }
    b[i * pitch + j] = element / bound;
  }
  const Tile mine = find_tile(tiles);
  const bool found = find_fourth_root(b, x, t, rank, pitch, mine);
  const T* power = x;
  if (quarters > 1) {
    multiply_symmetric(x, x, t, tiles, pitch, mine);
    power = t;
  }
  if (quarters > 2) multiply_symmetric(x, t, t, tiles, pitch, mine);
  const T scale = raise(bound, quarters), raised = raise(shift, quarters);
  // Where rounding has left M + lambda I not positive definite.
  const T even = raise(damp + core_trace / T(rank), quarters);
  T* core_inverse = static_cast<T*>(layer.core_inverse);
  for (int at = threadIdx.x; at < rank * rank; at += kCoreThreads) {
    const int i = at / rank, j = at % rank;
    const T one = i == j ? T(1) : T(0);
    core_inverse[at] = (found ? power[i * pitch + j] / scale : one / even) - one / raised;
  }
  if (threadIdx.x == 0) *static_cast<T*>(layer.shift) = raised;
}

}  // namespace gls_fused::cuda
