// The inverse fourth root of a small positive definite matrix in shared memory, by one block, from
// products alone: Newton's coupled iteration, Guo and Higham, 2006, "A Schur-Newton method for the
// matrix pth root and its inverse".
//
//   X = I;   T = (5 I - B) / 4,   X <- X T,   B <- T^4 B   until B = I;   then X = B0^(-1/4)
//
// All are polynomials in B0, so they commute and are symmetric, and half of each product suffices.
// An eigenvalue b of B goes to b ((5 - b) / 4)^4: in (0, 1] it grows to 1, by 2.44 where it is small
// and by squares at the end. One that is not positive never gets there.
#pragma once

#include <cuda_runtime.h>

#include <cfloat>

namespace gls_fused::cuda {

// Rows and columns of a thread's tile.
constexpr int kRootTile = 4;

// Four neighbours in a row of shared memory, in accesses of 16 bytes.
template <typename T>
struct __align__(16) Four {
  T values[kRootTile];
};

template <typename T>
__device__ inline Four<T> load_four(const T* from) {
  return *reinterpret_cast<const Four<T>*>(from);
}

template <typename T>
__device__ inline void store_four(const Four<T>& from, T* to) {
  *reinterpret_cast<Four<T>*>(to) = from;
}

// How far from I each element of B may be when a last factor T ends the iteration. It leaves X off
// by 5/32 e^2, where no eigenvalue of B - I exceeds e, 88 or 60 times that at the greatest ranks:
// by half a rounding.
template <typename T>
constexpr double kNear = sizeof(T) == 4 ? 8e-6 : 4e-10;

// Steps that the least eigenvalue takes. Damping makes it 32 eps of the trace, of which rounding
// may take three quarters.
template <typename T>
constexpr int count_steps() {
  double b = 8 * (sizeof(T) == 4 ? double(FLT_EPSILON) : DBL_EPSILON);
  int steps = 1;
  for (; 1 - b > kNear<T>; ++steps) {
    const double t = (5 - b) / 4;
    b *= t * t * t * t;
  }
  return steps;
}
template <typename T>
constexpr int kRootSteps = count_steps<T>();
static_assert(kRootSteps<float> == 20 && kRootSteps<double> == 44);

// One of the tiles on and above the diagonal, the thread's own where there are no more tiles than
// threads; first column -1 where it has none.
struct Tile {
  int row, column;
};

__device__ inline Tile find_tile(int tiles) {
  int i = 0, left = threadIdx.x;
  while (i < tiles && left >= tiles - i) left -= tiles - i++;
  return i < tiles ? Tile{i * kRootTile, (i + left) * kRootTile} : Tile{0, -1};
}

// to = a b for symmetric a, b that commute, all [tiles, tiles] tiles; `to` may be either of them.
// All threads come here, after a barrier; all leave after one.
template <typename T>
__device__ inline void multiply_symmetric(const T* a, const T* b, T* to, int tiles, int pitch,
                                          Tile mine) {
  T sums[kRootTile][kRootTile] = {};
  if (mine.column >= 0) {
    // A column of the left factor is a row of it.
    for (int k = 0; k < tiles * kRootTile; ++k) {
      const Four<T> x = load_four(a + k * pitch + mine.row);
      const Four<T> y = load_four(b + k * pitch + mine.column);
#pragma unroll
      for (int p = 0; p < kRootTile; ++p) {
#pragma unroll
        for (int q = 0; q < kRootTile; ++q) sums[p][q] += x.values[p] * y.values[q];
      }
    }
  }
  __syncthreads();
  if (mine.column >= 0) {
    // In a tile on the diagonal the half above it counts.
    const bool diagonal = mine.row == mine.column;
#pragma unroll
    for (int p = 0; p < kRootTile; ++p) {
      Four<T> across, down;
#pragma unroll
      for (int q = 0; q < kRootTile; ++q) {
        across.values[q] = diagonal && q < p ? sums[q][p] : sums[p][q];
        down.values[q] = sums[q][p];
      }
      store_four(across, to + (mine.row + p) * pitch + mine.column);
      if (!diagonal) store_four(down, to + (mine.column + p) * pitch + mine.row);
    }
  }
  __syncthreads();
}

// x = b^(-1/4); b and `t` are used up. [rank, rank] each, rows `pitch` apart; b with zeros up to the
// next multiple of kRootTile. A thread has the same elements of all three here as its caller of b.
// All threads come here, and leave after a barrier with the same answer: whether it has converged.
template <typename T>
__device__ inline bool find_fourth_root(T* b, T* x, T* t, int rank, int pitch, Tile mine) {
  const int tiles = (rank + kRootTile - 1) / kRootTile, width = tiles * kRootTile;
  for (int at = threadIdx.x; at < width * width; at += blockDim.x) {
    const int i = at / width, j = at % width;
    x[i * pitch + j] = i == j && i < rank ? T(1) : T(0);
  }
  for (int step = 0; step < kRootSteps<T>; ++step) {
    bool far = false;
    for (int at = threadIdx.x; at < width * width; at += blockDim.x) {
      const int i = at / width, j = at % width;
      const T one = i == j && i < rank ? T(1) : T(0);
      const T off = b[i * pitch + j] - one;
      // Also for a NaN.
      if (!(off <= T(kNear<T>) && off >= -T(kNear<T>))) far = true;
      t[i * pitch + j] = one - off / 4;
    }
    far = __syncthreads_or(far);
    multiply_symmetric(x, t, x, tiles, pitch, mine);
    if (!far) return true;
    multiply_symmetric(t, t, t, tiles, pitch, mine);
    multiply_symmetric(t, t, t, tiles, pitch, mine);
    multiply_symmetric(t, b, b, tiles, pitch, mine);
  }
  return false;
}

}  // namespace gls_fused::cuda
