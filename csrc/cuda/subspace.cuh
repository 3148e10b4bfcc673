// The bases of all layers move, U+ T = Z and M+ = T (M + nu I)^-1 T', in five launches whatever
// their number: Cholesky QR, twice, in float64.
//
//   square_rows_kernel   parts of Z'Z, a block of d to a block
//   factor_kernel        R with R'R = Z'Z, and R^-1, a layer to a block
//   rotate_kernel        Q = Z R^-1, random columns in place of dependent ones, and parts of Q'Q
//   factor_kernel        the same of Q'Q; then T = R2 R1 and M+
//   rotate_kernel        U+ = Q R2^-1
//
// A column that depends on those before it gets a zero row in R. Z = Q R holds whatever stands in a
// column of Q whose row in R is zero, so the second round completes the basis without changing what
// it spans. float64, as the Gram matrix squares the condition: of float32 data it is then at most
// 1e12, which leaves Q orthogonal to 1e-4 after the first round and to float32's rounding after the
// second. It also holds the squares of every float32, so that no scale has to be taken out.
#pragma once

#include <cfloat>

#include "elements.cuh"
#include "inverse.cuh"
#include "product.h"
#include "subspace.h"

namespace gls_fused::cuda {

// A column whose part across the columns before it is below 1e-6 of its norm, some ten roundings of
// float32, is taken as dependent; this is the square.
constexpr double kDependent = 1e-12;
constexpr int kStep = 32;

// A thread's part of a sum of outer products of columns [rank], of which the block has every row
// i + 16 p and column j + 16 q, by 16 by 16 threads.
using Outer = double[4][4];

// sums += the outer products of kStep columns.
__device__ inline void add_outer(const float (&columns)[kMaxRank][kStep + 1], Outer& sums) {
  const int i = threadIdx.x / 16, j = threadIdx.x % 16;
  for (int k = 0; k < kStep; ++k) {
    double a[4], b[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      a[q] = columns[i + 16 * q][k];
      b[q] = columns[j + 16 * q][k];
    }
#pragma unroll
    for (int p = 0; p < 4; ++p) {
#pragma unroll
      for (int q = 0; q < 4; ++q) sums[p][q] += a[p] * b[q];
    }
  }
}

__device__ inline void store_outer(const Outer& sums, int rank, double* part) {
  const int i = threadIdx.x / 16, j = threadIdx.x % 16;
#pragma unroll
  for (int p = 0; p < 4; ++p) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int row = i + 16 * p, c = j + 16 * q;
      if (row < rank && c < rank) part[row * rank + c] = sums[p][q];
    }
  }
}

// parts[block] = the sum over the block's columns of outer products of Z' [rank, dim].
__global__ void __launch_bounds__(kMoveThreads)
    square_rows_kernel(const __grid_constant__ MoveTable table) {
  // One column longer, so that neighbouring rows lie in different banks.
  __shared__ float xs[kMaxRank][kStep + 1];
  const Move& x = table.entries[find_entry(table, blockIdx.x)];
  const uint32_t block = blockIdx.x - x.first;
  const int64_t begin = int64_t(block) * kMoveColumns;
  Outer sums = {};
  for (int64_t column = begin; column < begin + kMoveColumns; column += kStep) {
    for (int at = threadIdx.x; at < kMaxRank * kStep; at += kMoveThreads) {
      const int row = at / kStep;
      const int64_t c = column + at % kStep;
      xs[row][at % kStep] = row < x.rank && c < x.dim ? x.sketch[row * x.dim + c] : 0.0f;
    }
    __syncthreads();
    add_outer(xs, sums);
    __syncthreads();
  }
  store_outer(sums, x.rank, x.parts + int64_t(block) * x.rank * x.rank);
}

// M+ = T (M + nu I)^-1 T' for T = R2 R1, nu = 4 eps tr M, of R1 = x.triangles and R2 [rank, rank].
// `m` [rank, rank + 1] is in shared memory, and so are `row` and `column`; the parts have done their
// work.
__device__ inline void move_core(const Move& x, const double* twice, double* m, double* row,
                                 double* column, double* fine) {
  const int rank = x.rank, square = rank * rank, pitch = rank + 1;
  const double* once = x.triangles;
  double* t = x.triangles + 2 * square;
  double* turned = x.parts;
  double trace = 0;
  for (int i = 0; i < rank; ++i) trace += x.core[i * rank + i];
  // A core of zeros has M+ = 0 whatever nu is.
  double nu = 4 * trace * FLT_EPSILON;
  if (!(nu > 1e-300)) nu = 1e-300;
  for (int at = threadIdx.x; at < square; at += kMoveThreads) {
    const int i = at / rank, j = at % rank;
    const double symmetric = 0.5 * (double(x.core[at]) + double(x.core[j * rank + i]));
    m[i * pitch + j] = symmetric / nu + (i == j ? 1 : 0);
    double sum = 0;
    for (int k = i; k <= j; ++k) sum += twice[i * rank + k] * once[k * rank + j];
    t[at] = sum;
  }
  // Also orders the writes to t.
  invert_matrix(m, rank, pitch, row, column, fine);
  for (int at = threadIdx.x; at < square; at += kMoveThreads) {
    const int i = at / rank, j = at % rank;
    double sum = 0;
    for (int k = i; k < rank; ++k) sum += t[i * rank + k] * m[k * pitch + j];
    turned[at] = sum;
  }
  __syncthreads();
  for (int at = threadIdx.x; at < square; at += kMoveThreads) {
    // One half, twice, so that M+ is symmetric to the last bit.
    const int a = at / rank, b = at % rank;
    const int i = a < b ? a : b, j = a < b ? b : a;
    double sum = 0;
    for (int k = j; k < rank; ++k) sum += turned[i * rank + k] * t[j * rank + k];
    x.core_out[at] = float(sum / nu);
  }
}

// R and R^-1 by elimination on [G, I]. In one matrix: row k of G above the diagonal becomes R's,
// and what is below it, which G's symmetry makes spare, the rows of L^-1 = (R^-1)'.
template <bool kSecond>
__global__ void __launch_bounds__(kMoveThreads)
    factor_kernel(const __grid_constant__ MoveTable table) {
  __shared__ double g[kMaxRank][kMaxRank + 1];
  __shared__ double norms[kMaxRank], roots[kMaxRank], row[kMaxRank];
  [[maybe_unused]] __shared__ double fine;
  const Move& x = table.entries[blockIdx.x];
  const int rank = x.rank, square = rank * rank;
  for (int at = threadIdx.x; at < square; at += kMoveThreads) {
    double sum = 0;
    for (uint32_t block = 0; block < x.blocks; ++block) {
      sum += x.parts[int64_t(block) * square + at];
    }
    g[at / rank][at % rank] = sum;
    if (at / rank == at % rank) norms[at / rank] = sum;
  }
  for (int k = 0; k < rank; ++k) {
    __syncthreads();
    const double pivot = g[k][k];
    const bool sound = pivot > kDependent * norms[k];
    const double root = sound ? 1 / sqrt(pivot) : 0;
    // R's row right of the diagonal, L^-1's left of it, and R's diagonal.
    for (int j = threadIdx.x; j < rank; j += kMoveThreads) row[j] = g[k][j] * root;
    if (threadIdx.x == 0) roots[k] = root;
    __syncthreads();
    for (int at = threadIdx.x; at < (rank - k) * rank; at += kMoveThreads) {
      const int i = k + at / rank, j = at % rank;
      if (i == k) {
        g[k][j] = row[j];
      } else if (j == k) {
        g[i][k] = -row[i] * root;
      } else if (j < k || j >= i) {
        g[i][j] -= row[i] * row[j];
      }
    }
  }
  __syncthreads();
  // The parts have been added up, and hold the second round's R.
  double* triangle = kSecond ? x.parts : x.triangles;
  double* inverse = x.triangles + square;
  for (int at = threadIdx.x; at < square; at += kMoveThreads) {
    const int i = at / rank, j = at % rank;
    triangle[at] = j >= i ? g[i][j] : 0;
    inverse[at] = j > i ? g[j][i] : j == i ? roots[i] : 0;
  }
  if constexpr (kSecond) {
    __syncthreads();
    move_core(x, triangle, &g[0][0], row, norms, &fine);
  }
}

// Uniform in [-1, 1), a function of `index` alone: Steele et al., 2014, SplitMix64.
__device__ inline double scatter(uint64_t index) {
  uint64_t z = (index + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  z ^= z >> 31;
  return double(z >> 11) * 0x1p-52 - 1;
}

// to = (R^-1)' from, [rank, dim] each; in the first round also parts[block] = the sum over the
// block's columns of their outer products.
template <bool kSecond>
__global__ void __launch_bounds__(kMoveThreads)
    rotate_kernel(const __grid_constant__ MoveTable table) {
  __shared__ double turn[kMaxRank * kMaxRank];
  __shared__ float xs[kMaxRank][kStep + 1];
  const Move& x = table.entries[find_entry(table, blockIdx.x)];
  const float* from = kSecond ? x.rough : x.sketch;
  float* to = kSecond ? x.basis : x.rough;
  const int rank = x.rank, square = rank * rank;
  for (int at = threadIdx.x; at < square; at += kMoveThreads) turn[at] = x.triangles[square + at];
  const uint32_t block = blockIdx.x - x.first;
  const int64_t begin = int64_t(block) * kMoveColumns;
  const int lane = threadIdx.x % kStep, own = threadIdx.x / kStep;
  constexpr int kRows = kMoveThreads / kStep;
  // Entries of variance 1 / dim: about as long as the columns beside them.
  const double spread = sqrt(3 / double(x.dim));
  Outer sums = {};
  for (int64_t first = begin; first < begin + kMoveColumns && first < x.dim; first += kStep) {
    const int64_t column = first + lane;
    __syncthreads();
#pragma unroll
    for (int row = own; row < kMaxRank; row += kRows) {
      xs[row][lane] = row < rank && column < x.dim ? from[row * x.dim + column] : 0.0f;
    }
    __syncthreads();
    float turned[kMaxRank / kRows];
#pragma unroll
    for (int q = 0; q < kMaxRank / kRows; ++q) {
      const int c = own + q * kRows;
      turned[q] = 0;
      if (c >= rank || column >= x.dim) continue;
      double sum = 0;
      for (int k = 0; k <= c; ++k) sum += turn[k * rank + c] * xs[k][lane];
      if (turn[c * rank + c] == 0) sum = scatter(uint64_t(column) * kMaxRank + c) * spread;
      turned[q] = float(sum);
      to[c * x.dim + column] = turned[q];
    }
    if constexpr (!kSecond) {
      __syncthreads();
#pragma unroll
      for (int q = 0; q < kMaxRank / kRows; ++q) xs[own + q * kRows][lane] = turned[q];
      __syncthreads();
      add_outer(xs, sums);
    }
  }
  if constexpr (!kSecond) store_outer(sums, rank, x.parts + int64_t(block) * square);
}

}  // namespace gls_fused::cuda
