// Products with a few long rows: the basis is kept as U' [r, d], so that both directions of
// X -> X U -> (X U) C U' run along contiguous memory.
//
// Register tiles of 4 x kTile vectors: with AVX-512 16 accumulators hide the latency of a
// multiply-add, and 8 loads feed 16 of them.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>

namespace gls_fused {
inline namespace CPU_CAPABILITY {

constexpr int64_t kTileRows = 4;

template <typename T>
constexpr int64_t tile_vectors() {
  return sizeof(at::vec::Vectorized<T>) >= 64 ? 4 : 2;
}

// A matrix whose element (i, j) lies at data[i * row + j * column].
template <typename T>
struct Strided {
  const T* data;
  int64_t row;
  int64_t column;

  T operator()(int64_t i, int64_t j) const { return data[i * row + j * column]; }
};

template <typename T>
inline T reduce_sum(const at::vec::Vectorized<T>& x) {
  using Vec = at::vec::Vectorized<T>;
  return at::vec::vec_reduce_all<T>([](Vec& a, Vec& b) { return a + b; }, x);
}

template <typename T, int kRows, int kColumns>
inline void dot_tile(const T* x, int64_t x_row, const T* b, int64_t b_row, int64_t size, T* out,
                     int64_t out_row) {
  using Vec = at::vec::Vectorized<T>;
  Vec sums[kRows][kColumns];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) sums[i][j] = Vec(T(0));
  }
  int64_t k = 0;
  for (; k + Vec::size() <= size; k += Vec::size()) {
    Vec right[kColumns];
    for (int j = 0; j < kColumns; ++j) right[j] = Vec::loadu(b + j * b_row + k);
    for (int i = 0; i < kRows; ++i) {
      const Vec left = Vec::loadu(x + i * x_row + k);
      for (int j = 0; j < kColumns; ++j) sums[i][j] = at::vec::fmadd(left, right[j], sums[i][j]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) {
      T total = reduce_sum(sums[i][j]);
      for (int64_t rest = k; rest < size; ++rest) {
        total += x[i * x_row + rest] * b[j * b_row + rest];
      }
      out[i * out_row + j] = total;
    }
  }
}

// out[i, j] = sum_k x[i, k] b[j, k]
template <typename T>
void dot_rows(const T* x, int64_t x_row, int64_t rows, const T* b, int64_t b_row, int64_t columns,
              int64_t size, T* out, int64_t out_row) {
  constexpr int kRows = kTileRows, kColumns = tile_vectors<T>();
  for (int64_t i = 0; i < rows;) {
    const T* left = x + i * x_row;
    T* to = out + i * out_row;
    const bool whole = i + kRows <= rows;
    int64_t j = 0;
    for (; j + kColumns <= columns; j += kColumns) {
      const T* right = b + j * b_row;
      if (whole) {
        dot_tile<T, kRows, kColumns>(left, x_row, right, b_row, size, to + j, out_row);
      } else {
        dot_tile<T, 1, kColumns>(left, x_row, right, b_row, size, to + j, out_row);
      }
    }
    for (; j < columns; ++j) {
      const T* right = b + j * b_row;
      if (whole) {
        dot_tile<T, kRows, 1>(left, x_row, right, b_row, size, to + j, out_row);
      } else {
        dot_tile<T, 1, 1>(left, x_row, right, b_row, size, to + j, out_row);
      }
    }
    i += whole ? kRows : 1;
  }
}

// `scale` of 0 leaves `x` unread.
template <typename T, int kRows, int kVectors>
inline void sum_tile(const T* x, int64_t x_row, T scale, Strided<T> weights, const T* b,
                     int64_t b_row, int64_t terms, T* out, int64_t out_row) {
  using Vec = at::vec::Vectorized<T>;
  Vec sums[kRows][kVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      sums[i][v] = scale == 0 ? Vec(T(0))
                              : Vec::loadu(x + i * x_row + v * Vec::size()) * Vec(scale);
    }
  }
  for (int64_t j = 0; j < terms; ++j) {
    Vec right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = Vec::loadu(b + j * b_row + v * Vec::size());
    for (int i = 0; i < kRows; ++i) {
      const Vec weight(weights(i, j));
      for (int v = 0; v < kVectors; ++v) sums[i][v] = at::vec::fmadd(weight, right[v], sums[i][v]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v) sums[i][v].store(out + i * out_row + v * Vec::size());
  }
}

template <typename T, int kVectors>
inline void sum_panel(const T* x, int64_t x_row, T scale, Strided<T> weights, int64_t rows,
                      const T* b, int64_t b_row, int64_t terms, T* out, int64_t out_row) {
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows) {
    const Strided<T> from{weights.data + i * weights.row, weights.row, weights.column};
    sum_tile<T, kTileRows, kVectors>(x + i * x_row, x_row, scale, from, b, b_row, terms,
                                     out + i * out_row, out_row);
  }
  for (; i < rows; ++i) {
    const Strided<T> from{weights.data + i * weights.row, weights.row, weights.column};
    sum_tile<T, 1, kVectors>(x + i * x_row, x_row, scale, from, b, b_row, terms, out + i * out_row,
                             out_row);
  }
}

// out[i, c] = scale x[i, c] + sum_j weights(i, j) b[j, c];  with scale 0, x is not read.
template <typename T>
void sum_rows(const T* x, int64_t x_row, T scale, Strided<T> weights, int64_t rows, const T* b,
              int64_t b_row, int64_t terms, int64_t columns, T* out, int64_t out_row) {
  using Vec = at::vec::Vectorized<T>;
  constexpr int64_t kVectors = tile_vectors<T>(), kPanel = kVectors * Vec::size();
  int64_t c = 0;
  for (; c + kPanel <= columns; c += kPanel) {
    sum_panel<T, kVectors>(x + c, x_row, scale, weights, rows, b + c, b_row, terms, out + c,
                           out_row);
  }
  for (; c + Vec::size() <= columns; c += Vec::size()) {
    sum_panel<T, 1>(x + c, x_row, scale, weights, rows, b + c, b_row, terms, out + c, out_row);
  }
  for (; c < columns; ++c) {
    for (int64_t i = 0; i < rows; ++i) {
      T total = scale == 0 ? T(0) : scale * x[i * x_row + c];
      for (int64_t j = 0; j < terms; ++j) total += weights(i, j) * b[j * b_row + c];
      out[i * out_row + c] = total;
    }
  }
}

// Partial sums of 4096 elements, added up in float64, keep the rounding below the elements' own.
template <typename T>
double sum_squares(const T* x, int64_t n) {
  using Vec = at::vec::Vectorized<T>;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += 4096) {
    const int64_t end = std::min(n, begin + 4096);
    Vec sums[4] = {Vec(T(0)), Vec(T(0)), Vec(T(0)), Vec(T(0))};
    int64_t i = begin;
    for (; i + 4 * Vec::size() <= end; i += 4 * Vec::size()) {
      for (int j = 0; j < 4; ++j) {
        const Vec value = Vec::loadu(x + i + j * Vec::size());
        sums[j] = at::vec::fmadd(value, value, sums[j]);
      }
    }
    T sum = reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < end; ++i) sum += x[i] * x[i];
    total += sum;
  }
  return total;
}

}  // namespace CPU_CAPABILITY
}  // namespace gls_fused
