// Products with a few long rows: the basis is kept as U' [r, d], so that both directions of
// X -> X U -> (X U) C U' run along contiguous memory.
//
// Register tiles of 4 x kTile vectors, or of 8 rows of one or two: with AVX-512 16 accumulators hide
// the latency of a multiply-add, and 8 loads feed 16 of them. What is left of a row is masked.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace gls_fused {
inline namespace CPU_CAPABILITY {

constexpr int64_t kTileRows = 4, kNarrowRows = 8;

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

// The length of a row in memory: an odd number of cache lines, as rows that are a power of two
// apart share few places of the caches.
template <typename T>
inline int64_t row_of(int64_t n) {
  constexpr int64_t line = 64 / sizeof(T);
  return (((n + line - 1) / line) | 1) * line;
}

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
  if (k < size) {
    Vec right[kColumns];
    for (int j = 0; j < kColumns; ++j) right[j] = Vec::loadu(b + j * b_row + k, size - k);
    for (int i = 0; i < kRows; ++i) {
      const Vec left = Vec::loadu(x + i * x_row + k, size - k);
      for (int j = 0; j < kColumns; ++j) sums[i][j] = at::vec::fmadd(left, right[j], sums[i][j]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) out[i * out_row + j] = reduce_sum(sums[i][j]);
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

// `scale` of 0 leaves `x` unread; it is added last, so that sums taken in stretches round less.
// Unless kWhole, `count` elements of a single vector are there.
template <typename T, int kRows, int kVectors, bool kWhole>
inline void sum_tile(const T* x, int64_t x_row, T scale, Strided<T> weights, const T* b,
                     int64_t b_row, int64_t terms, int64_t count, T* out, int64_t out_row) {
  using Vec = at::vec::Vectorized<T>;
  static_assert(kWhole || kVectors == 1);
  const auto load = [count](const T* from, int v) {
    if constexpr (kWhole) return Vec::loadu(from + v * Vec::size());
    return Vec::loadu(from, count);
  };
  Vec sums[kRows][kVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v) sums[i][v] = Vec(T(0));
  }
  for (int64_t j = 0; j < terms; ++j) {
    Vec right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + j * b_row, v);
    for (int i = 0; i < kRows; ++i) {
      const Vec weight(weights(i, j));
      for (int v = 0; v < kVectors; ++v) sums[i][v] = at::vec::fmadd(weight, right[v], sums[i][v]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      if (scale != 0) sums[i][v] = at::vec::fmadd(load(x + i * x_row, v), Vec(scale), sums[i][v]);
      if constexpr (kWhole) sums[i][v].store(out + i * out_row + v * Vec::size());
      else sums[i][v].store(out + i * out_row, count);
    }
  }
}

// Tiles of kRows rows, and of half as many what they leave.
template <typename T, int kRows, int kVectors, bool kWhole = true>
inline void sum_panel(const T* x, int64_t x_row, T scale, Strided<T> weights, int64_t rows,
                      const T* b, int64_t b_row, int64_t terms, int64_t count, T* out,
                      int64_t out_row) {
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    const Strided<T> from{weights.data + i * weights.row, weights.row, weights.column};
    sum_tile<T, kRows, kVectors, kWhole>(x + i * x_row, x_row, scale, from, b, b_row, terms, count,
                                         out + i * out_row, out_row);
  }
  if constexpr (kRows > 1) {
    if (i == rows) return;
    const Strided<T> from{weights.data + i * weights.row, weights.row, weights.column};
    sum_panel<T, kRows / 2, kVectors, kWhole>(x + i * x_row, x_row, scale, from, rows - i, b,
                                              b_row, terms, count, out + i * out_row, out_row);
  }
}

// out[i, c] = scale x[i, c] + sum_j weights(i, j) b[j, c];  with scale 0, x is not read.
template <typename T>
void sum_rows(const T* x, int64_t x_row, T scale, Strided<T> weights, int64_t rows, const T* b,
              int64_t b_row, int64_t terms, int64_t columns, T* out, int64_t out_row) {
  constexpr int64_t kVectors = tile_vectors<T>(), kSize = at::vec::Vectorized<T>::size();
  int64_t c = 0;
  const auto run = [&](auto tile_rows, auto vectors, auto whole) {
    sum_panel<T, decltype(tile_rows)::value, decltype(vectors)::value, decltype(whole)::value>(
        x + c, x_row, scale, weights, rows, b + c, b_row, terms, columns - c, out + c, out_row);
    c += decltype(vectors)::value * kSize;
  };
  using std::integral_constant;
  while (c + kVectors * kSize <= columns) {
    run(integral_constant<int, kTileRows>{}, integral_constant<int, kVectors>{}, std::true_type{});
  }
  const integral_constant<int, kNarrowRows> narrow;
  if constexpr (kVectors > 2) {
    if (c + 2 * kSize <= columns) run(narrow, integral_constant<int, 2>{}, std::true_type{});
  }
  if (c + kSize <= columns) run(narrow, integral_constant<int, 1>{}, std::true_type{});
  if (c < columns) run(narrow, integral_constant<int, 1>{}, std::false_type{});
}

// Terms that are summed at once: what they are taken from stays in the first-level cache, and long
// sums round as short ones do. 128 rows of 64 float32 take 32 KiB.
constexpr int64_t kTerms = 128;

// sum_rows without x, some terms at a time.
template <typename T>
void sum_terms(Strided<T> weights, int64_t rows, const T* b, int64_t b_row, int64_t terms,
               int64_t columns, T* out, int64_t out_row) {
  for (int64_t k = 0; k == 0 || k < terms; k += kTerms) {
    const Strided<T> from{weights.data + k * weights.column, weights.row, weights.column};
    sum_rows<T>(out, out_row, k > 0, from, rows, b + k * b_row, b_row, std::min(kTerms, terms - k),
                columns, out, out_row);
  }
}

// Of a row of U as `pack` makes it: whole vectors.
template <typename T>
inline int64_t packed_width(int64_t rank) {
  constexpr int64_t size = at::vec::Vectorized<T>::size();
  return (rank + size - 1) / size * size;
}

// Rows `begin` to `end` of U [d, width] from U' [r, d], with zeros from r on.
template <typename T>
void pack(const T* u, int64_t u_row, int64_t rank, int64_t begin, int64_t end, int64_t width,
          T* packed) {
  constexpr int64_t kBlock = 16;
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t last = std::min(end, first + kBlock);
    for (int64_t j = 0; j < width; ++j) {
      for (int64_t k = first; k < last; ++k) {
        packed[k * width + j] = j < rank ? u[j * u_row + k] : T(0);
      }
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

// In another dtype, such as the state's of parameters that are stored in 16 bits.
template <typename state_t, typename param_t>
double sum_squares_as(const param_t* x, int64_t n) {
  if constexpr (std::is_same_v<param_t, state_t>) {
    return sum_squares(x, n);
  } else {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double value = static_cast<state_t>(x[i]);
      total += value * value;
    }
    return total;
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace gls_fused
