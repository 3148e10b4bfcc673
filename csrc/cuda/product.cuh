// X U of some matrices, a step on the way to X P = X / lambda' + T U' with T = (X U) C:
//
//   project_kernel   T over a part of the columns, a block of rows and such a part to a block
//   form_tile        a tile of X / lambda' + T U', for whoever needs it
//
// As T is linear in X, each part is multiplied by C where it is made, which is 2 r flop to the 2 x 512
// or more of a row of it, and who reads T adds the parts up in their order: no launch between. The
// column of ones, or the bias's gradient, is the first part's and never stands beside X.
//
// Tensor cores are not used. At rank 32 the products are 64 flop per element and pass: forming D
// for the update is 64 flop per 16 to 24 bytes of float32 traffic, 2.7 to 4 flop per byte, where an
// H100 has 20 flop of float32 FMA per byte of memory; for bfloat16 with float32 averages (8 to 16
// bytes) 4 to 8. So float32's own rounding costs no time, and tf32 would cost 13 bits of it. At
// rank 64 these numbers double and stay below 20. Reading X for X U alone is 64 flop per 4 bytes,
// 16 per byte; for bfloat16, and at rank 64, FMA is the bound there, by 1.6 times each.
//
// cuBLAS would do X U as well for one matrix. It is not used as it takes a launch per layer, a
// float32 copy of every 16-bit matrix, and TF32 where the user has allowed it for his model.
#pragma once

#include "elements.cuh"
#include "product.h"

namespace gls_fused::cuda {

// Rows of shared tiles are 4 floats longer, so that the same four columns of 8 rows lie in 8
// different groups of banks.
constexpr int kProjectPitch = kProjectColumns + 4;
constexpr int kProjectWarps = kProductThreads / 32;
constexpr int kXLoads = kProjectRows * kProjectColumns / kProductThreads;
constexpr int kULoads = kMaxRank * kProjectColumns / kProductThreads;

// Four floats of a shared tile, at a multiple of four.
__device__ inline float4 load4(const float* from) { return *reinterpret_cast<const float4*>(from); }

__device__ inline float dot4(float4 x, float4 y, float sum) {
  return sum + x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
}

// Where the thread's i-th element of X stands in a tile: 16 bytes to a thread where rows allow it,
// neighbouring elements to neighbouring threads where not.
template <typename T, bool kWide>
__device__ inline int x_place(int i) {
  if (!kWide) return i * kProductThreads + threadIdx.x;
  return (i / kWidth<T> * kProductThreads + threadIdx.x) * kWidth<T> + i % kWidth<T>;
}

// A tile's `columns` columns of X and of U', `x` and `basis` pointing to the first, on their way to
// shared memory. Addresses are stepped from one to the next: a register pair for each would spill.
template <typename T, bool kWide>
__device__ inline void fetch_columns(const Product& p, const T* x, const float* basis, int rows,
                                     int columns, float (&to)[kXLoads], float (&u)[kULoads]) {
  const int place = x_place<T, kWide>(0);
  int r = place / kProjectColumns;
  // No row of a part without columns is inside.
  if (place % kProjectColumns >= columns) rows = 0;
  x += r * p.x_row + place % kProjectColumns;
  if constexpr (kWide) {
    constexpr int kStep = kProductThreads * kWidth<T> / kProjectColumns;
#pragma unroll
    for (int i = 0; i < kXLoads; i += kWidth<T>) {
      float values[kWidth<T>] = {};
      if (r < rows) load_elements(x, values);
#pragma unroll
      for (int k = 0; k < kWidth<T>; ++k) to[i + k] = values[k];
      r += kStep;
      x += kStep * p.x_row;
    }
  } else {
    constexpr int kStep = kProductThreads / kProjectColumns;
#pragma unroll
    for (int i = 0; i < kXLoads; ++i) {
      to[i] = r < rows ? widen(*x) : 0.0f;
      r += kStep;
      x += kStep * p.x_row;
    }
  }
  // Rows of U' have k + 1 elements with a bias, so they begin anywhere.
  constexpr int kStep = kProductThreads / kProjectColumns;
  int c = threadIdx.x / kProjectColumns;
  const int ranks = int(threadIdx.x % kProjectColumns) < columns ? p.rank : 0;
  basis += c * p.basis_row + threadIdx.x % kProjectColumns;
#pragma unroll
  for (int i = 0; i < kULoads; ++i) {
    u[i] = c < ranks ? *basis : 0.0f;
    c += kStep;
    basis += kStep * p.basis_row;
  }
}

// The i-th number of the column beyond `size`.
template <typename T>
__device__ inline float last_element(const Product& p, int64_t i) {
  if (p.kind == Last::kColumn) return widen(static_cast<const T*>(p.last)[i * p.last_stride]);
  return 1.0f;
}

template <typename T, bool kWide>
__device__ inline void project_part(const Product& p, uint32_t block, float* xs, float* us) {
  const int64_t row = int64_t(block / p.splits) * kProjectRows;
  const int split = block % p.splits;
  const int rows = p.n - row < kProjectRows ? int(p.n - row) : kProjectRows;
  const int64_t begin = split * p.columns;
  const T* from = static_cast<const T*>(p.x) + row * p.x_row + begin;
  const float* basis = p.basis + begin;
  // Columns that are left of the part.
  int64_t left = p.size - begin < p.columns ? p.size - begin : p.columns;

  // A warp forms a [32, 32] tile of Y from a slice of the columns, 8 rows and 4 columns of it to a
  // thread: 12 shared loads of 16 bytes feed 128 FMA.
  const int groups = p.rank > 32 ? 2 : 1, slices = kProjectWarps / groups;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int width = kProjectColumns / slices, first = warp / groups * width;
  const int my_row = lane % 4, my_rank = warp % groups * 32 + lane / 4;
  float y[8][4] = {};
  float x[kXLoads], u[kULoads];
  float squares = 0;
  const auto fetch = [&] {
    const int columns = left < kProjectColumns ? int(left) : kProjectColumns;
    fetch_columns<T, kWide>(p, from, basis, rows, columns, x, u);
    from += kProjectColumns;
    basis += kProjectColumns;
  };
  fetch();
  while (left > 0) {
#pragma unroll
    for (int i = 0; i < kXLoads; ++i) {
      const int at = x_place<T, kWide>(i);
      xs[at / kProjectColumns * kProjectPitch + at % kProjectColumns] = x[i];
      squares += x[i] * x[i];
    }
#pragma unroll
    for (int i = 0; i < kULoads; ++i) {
      const int at = i * kProductThreads + threadIdx.x;
      us[at / kProjectColumns * kProjectPitch + at % kProjectColumns] = u[i];
    }
    __syncthreads();
    left -= kProjectColumns;
    if (left > 0) fetch();
    // Not unrolled, which would take the registers of the columns on their way.
#pragma unroll 1
    for (int k = first; k < first + width; k += 4) {
      float4 b[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) b[j] = load4(us + (my_rank + 8 * j) * kProjectPitch + k);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float4 a = load4(xs + (my_row + 4 * i) * kProjectPitch + k);
#pragma unroll
        for (int j = 0; j < 4; ++j) y[i][j] = dot4(a, b[j], y[i][j]);
      }
    }
    __syncthreads();
  }

  // The slices' sums, one after the other.
  float* sums = us;
  for (int s = 0; s < slices; ++s) {
    if (warp / groups == s) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float& sum = sums[(my_row + 4 * i) * kMaxRank + my_rank + 8 * j];
          sum = s == 0 ? y[i][j] : sum + y[i][j];
        }
      }
    }
    __syncthreads();
  }
  if (split == 0 && p.kind != Last::kAbsent) {
    for (int at = threadIdx.x; at < rows * p.rank; at += kProductThreads) {
      const int i = at / p.rank, c = at % p.rank;
      sums[i * kMaxRank + c] += last_element<T>(p, row + i) * p.basis[c * p.basis_row + p.size];
    }
    __syncthreads();
  }
  float* part = p.parts + (split * p.n + row) * p.rank;
  for (int at = threadIdx.x; at < rows * p.rank; at += kProductThreads) {
    const float* y = sums + at / p.rank * kMaxRank;
    const int c = at % p.rank;
    float t = y[c];
    if (p.core_inverse) {
      t = 0;
      for (int k = 0; k < p.rank; ++k) t += y[k] * p.core_inverse[k * p.rank + c];
    }
    part[at] = t;
  }
  if (p.squares) {
    const double sum = sum_block<kProductThreads>(double(squares));
    if (threadIdx.x == 0) p.squares[block] = sum;
  }
}

template <typename T>
__global__ void __launch_bounds__(kProductThreads, 2)
    project_kernel(const __grid_constant__ ProductTable table) {
  __shared__ __align__(16) float xs[kProjectRows * kProjectPitch];
  __shared__ __align__(16) float us[kMaxRank * kProjectPitch];
  const Product& p = table.entries[find_entry(table, blockIdx.x)];
  const uint32_t block = blockIdx.x - p.first;
  if (p.wide) {
    project_part<T, true>(p, block, xs, us);
  } else {
    project_part<T, false>(p, block, xs, us);
  }
}

// Columns of U' that a tile holds in shared memory at a time.
constexpr int kTileRanks = 16;
// 64 rows of 128 float32, or 32 of 256 16-bit columns: 32 elements to a thread.
template <typename T>
constexpr int kTileColumns = 32 * kWidth<T>;
template <typename T>
constexpr int kTileThreadRows = 32 / kWidth<T>;
template <typename T>
constexpr int kTileRows = kProductThreads / 32 * kTileThreadRows<T>;

// A thread's part of a tile: kTileThreadRows rows, kWidth columns of each; kWide where all rows of
// all arrays begin at 16 bytes and end there.
template <typename T, bool kWide>
struct Place {
  int64_t row;     // the thread's first
  int64_t column;  // the tile's first
  int64_t n, size;

  __device__ int64_t column_of(int k) const {
    const int lane = threadIdx.x % 32;
    return column + (kWide ? lane * kWidth<T> + k : lane + 32 * k);
  }
};

template <typename T, bool kWide>
__device__ inline Place<T, kWide> find_place(uint32_t tile, uint32_t across, int64_t n,
                                             int64_t size) {
  const int64_t row = int64_t(tile / across) * kTileRows<T> + threadIdx.x / 32 * kTileThreadRows<T>;
  return {row, int64_t(tile % across) * kTileColumns<T>, n, size};
}

// The thread's elements of its row `row` of an array whose rows begin `pitch` apart; zeros outside.
template <typename T, bool kWide, typename Element>
__device__ inline void load_row(const Place<T, kWide>& place, const Element* from, int64_t row,
                                int64_t pitch, Wide<Element> (&to)[kWidth<T>]) {
#pragma unroll
  for (int k = 0; k < kWidth<T>; ++k) to[k] = 0;
  if (row >= place.n) return;
  from += row * pitch;
  if constexpr (kWide) {
    if (place.column_of(0) < place.size) load_elements(from + place.column_of(0), to);
  } else {
#pragma unroll
    for (int k = 0; k < kWidth<T>; ++k) {
      if (place.column_of(k) < place.size) to[k] = widen(from[place.column_of(k)]);
    }
  }
}

template <typename T, bool kWide, typename Element>
__device__ inline void store_row(const Place<T, kWide>& place,
                                 const Wide<Element> (&from)[kWidth<T>], Element* to, int64_t row,
                                 int64_t pitch) {
  if (row >= place.n) return;
  to += row * pitch;
  if constexpr (kWide) {
    if (place.column_of(0) < place.size) store_elements(from, to + place.column_of(0));
  } else {
#pragma unroll
    for (int k = 0; k < kWidth<T>; ++k) {
      if (place.column_of(k) < place.size) narrow(from[k], to[place.column_of(k)]);
    }
  }
}

// Consecutive floats that one access brings.
template <int N>
struct alignas(4 * N) Floats {
  float values[N];
};

// An element of T, of whose parts the first is at `at`.
__device__ inline float sum_parts(const Turned& turned, const float* at) {
  float sum = *at;
  for (int split = 1; split < turned.splits; ++split) sum += at[split * turned.pitch];
  return sum;
}

// What form_tile keeps of U' and T. A thread's elements 4 h to 4 h + 3 are at h * 128 + lane * 4,
// which no two lanes share banks for.
template <typename T>
struct TileMemory {
  float us[kTileRanks * kTileColumns<T>];
  float ts[kTileRows<T> * kTileRanks];
};

// d += T U' on the thread's part of the tile. All threads of the block must come here.
template <typename T, bool kWide>
__device__ inline void form_tile(const Place<T, kWide>& place, const Turned& turned,
                                 const float* basis, int64_t basis_row, TileMemory<T>& memory,
                                 float (&d)[kTileThreadRows<T>][kWidth<T>]) {
  float *us = memory.us, *ts = memory.ts;
  const int rank = turned.rank;
  // Columns of U' in a thread's registers at a time, 16 numbers.
  constexpr int kAtOnce = 16 / kWidth<T>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // A thread brings in one column of the tile, and one of T; addresses are stepped.
  constexpr int kRankStep = kProductThreads / kTileColumns<T>;
  constexpr int kRowStep = kProductThreads / kTileRanks;
  const int column = threadIdx.x % kTileColumns<T>, first_rank = threadIdx.x / kTileColumns<T>;
  const int owner = kWide ? column / kWidth<T> : column % 32;
  const int k = kWide ? column % kWidth<T> : column / 32;
  const int u_ranks = place.column + column < place.size ? rank : 0;
  float* u_to = us + first_rank * kTileColumns<T> + k / 4 * 128 + owner * 4 + k % 4;
  basis += first_rank * basis_row + place.column + column;
  const int t_rank = threadIdx.x % kTileRanks, t_row = threadIdx.x / kTileRanks;
  const int64_t tile_row = place.row - warp * kTileThreadRows<T>;
  const int rows = place.n - tile_row < kTileRows<T> ? int(place.n - tile_row) : kTileRows<T>;
  const float* parts = turned.parts + (tile_row + t_row) * rank + t_rank;
  for (int begin = 0; begin < rank; begin += kTileRanks) {
#pragma unroll
    for (int c = 0; c < kTileRanks; c += kRankStep) {
      u_to[c * kTileColumns<T>] = begin + first_rank + c < u_ranks ? *basis : 0.0f;
      basis += kRankStep * basis_row;
    }
    const int t_rows = begin + t_rank < rank ? rows : 0;
    float t[kTileRows<T> / kRowStep] = {};
    const float* part = parts;
    // Not unrolled, which would take the registers of the tile.
#pragma unroll 1
    for (int split = 0; split < turned.splits; ++split) {
#pragma unroll
      for (int i = 0; i < kTileRows<T>; i += kRowStep) {
        if (t_row + i < t_rows) t[i / kRowStep] += part[i * rank];
      }
      part += turned.pitch;
    }
#pragma unroll
    for (int i = 0; i < kTileRows<T>; i += kRowStep) {
      ts[(t_row + i) * kTileRanks + t_rank] = t[i / kRowStep];
    }
    parts += kTileRanks;
    __syncthreads();
    for (int c = 0; c < kTileRanks; c += kAtOnce) {
      float u[kAtOnce][kWidth<T>];
#pragma unroll
      for (int q = 0; q < kAtOnce; ++q) {
#pragma unroll
        for (int k = 0; k < kWidth<T>; k += 4) {
          const float4 four = load4(us + (c + q) * kTileColumns<T> + k / 4 * 128 + lane * 4);
          u[q][k] = four.x;
          u[q][k + 1] = four.y;
          u[q][k + 2] = four.z;
          u[q][k + 3] = four.w;
        }
      }
#pragma unroll
      for (int r = 0; r < kTileThreadRows<T>; ++r) {
        const float* from = ts + (warp * kTileThreadRows<T> + r) * kTileRanks + c;
        const Floats<kAtOnce> t = *reinterpret_cast<const Floats<kAtOnce>*>(from);
#pragma unroll
        for (int q = 0; q < kAtOnce; ++q) {
#pragma unroll
          for (int k = 0; k < kWidth<T>; ++k) d[r][k] += t.values[q] * u[q][k];
        }
      }
    }
    __syncthreads();
  }
}

// Row i of T times U's last row.
__device__ inline float turn_last(const Turned& turned, const float* basis, int64_t basis_row,
                                  int64_t size, int64_t i) {
  float sum = 0;
  for (int c = 0; c < turned.rank; ++c) {
    sum += sum_parts(turned, turned.parts + i * turned.rank + c) * basis[c * basis_row + size];
  }
  return sum;
}

}  // namespace gls_fused::cuda
