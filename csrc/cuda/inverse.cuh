// The inverse of a small positive definite matrix in shared memory, by one block.
//
// In place, by Gauss-Jordan without pivoting: for a positive definite matrix its pivots are the
// squared diagonal of the Cholesky factor, so that a pivot that is not positive tells what Cholesky
// would, and half the memory of a factor beside its inverse does.
#pragma once

#include <cuda_runtime.h>

namespace gls_fused::cuda {

// a [rank, rank] with rows `pitch` apart; row, column [rank] and fine are the block's scratch.
// All threads come here, after a barrier; all leave after one, with the same answer: whether every
// pivot was positive and finite.
template <typename T>
__device__ inline bool invert_matrix(T* a, int rank, int pitch, T* row, T* column, T* fine) {
  if (threadIdx.x == 0) *fine = 1;
  for (int k = 0; k < rank; ++k) {
    __syncthreads();
    const T pivot = a[k * pitch + k];
    for (int i = threadIdx.x; i < rank; i += blockDim.x) {
      row[i] = a[k * pitch + i] / pivot;
      column[i] = a[i * pitch + k];
    }
    // Also not for a NaN, nor for an infinity.
    if (threadIdx.x == 0 && !(pivot > 0 && pivot - pivot == 0)) *fine = 0;
    __syncthreads();
    for (int at = threadIdx.x; at < rank * rank; at += blockDim.x) {
      const int i = at / rank, j = at % rank;
      T& x = a[i * pitch + j];
      if (i == k) {
        x = j == k ? T(1) / pivot : row[j];
      } else {
        x = j == k ? -column[i] / pivot : x - column[i] * row[j];
      }
    }
  }
  __syncthreads();
  return *fine != 0;
}

}  // namespace gls_fused::cuda
