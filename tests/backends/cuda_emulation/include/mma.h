// nvcuda::wmma: a fragment is spread over the 32 lanes of a warp, each of which holds 1/32 of its
// elements in row-major order. CUDA leaves the layout open (and may hold an element twice), so a
// kernel that treats all of a fragment's elements alike cannot tell.
//
// Products are exact in float and summed in order of k; the tensor cores' order is their own.

#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace nvcuda::wmma {

struct row_major;
struct col_major;
struct matrix_a;
struct matrix_b;
struct accumulator;
enum layout_t { mem_row_major, mem_col_major };

namespace precision {
struct tf32;
}

namespace detail {

template <typename T>
struct Stored {
  using type = T;
};
template <>
struct Stored<precision::tf32> {
  using type = float;
};

template <typename Use, int m, int n, int k>
constexpr int kRows = std::is_same_v<Use, matrix_b> ? k : m;
template <typename Use, int m, int n, int k>
constexpr int kColumns = std::is_same_v<Use, matrix_a> ? k : n;

template <int m, int n, int k, typename T>
constexpr bool kShapeExists =
    std::is_same_v<T, precision::tf32> ? (m == 16 && n == 16 && k == 8)
    : std::is_same_v<T, float>         ? (k == 8 || k == 16)
                                       : (k == 16 && m * n == 256 && m >= 8 && n >= 8);

}  // namespace detail

template <typename Use, int m, int n, int k, typename T, typename Layout = void>
struct fragment {
  static_assert(detail::kShapeExists<m, n, k, T>, "no such shape for this type");
  using element_type = typename detail::Stored<T>::type;
  static constexpr int rows = detail::kRows<Use, m, n, k>;
  static constexpr int columns = detail::kColumns<Use, m, n, k>;
  static constexpr int num_elements = rows * columns / 32;

  element_type x[num_elements];
};

template <typename Use, int m, int n, int k, typename T, typename Layout>
void fill_fragment(fragment<Use, m, n, k, T, Layout>& f,
                   const std::common_type_t<typename detail::Stored<T>::type>& value) {
  for (auto& x : f.x) x = value;
}

namespace detail {

template <typename Fragment, typename Visit>
void for_each_of_lane(unsigned stride, bool by_rows, Visit visit) {
  const int first = static_cast<int>(cuda_emulation::lane()) * Fragment::num_elements;
  for (int i = 0; i < Fragment::num_elements; ++i) {
    const int row = (first + i) / Fragment::columns, column = (first + i) % Fragment::columns;
    visit(i, by_rows ? size_t(row) * stride + column : size_t(column) * stride + row);
  }
}

inline void check_pointer(const void* pointer, unsigned stride, size_t element) {
  if (reinterpret_cast<uintptr_t>(pointer) % 32 != 0) {
    cuda_emulation::fail("wmma: pointer not aligned to 32 bytes");
  }
  if (stride * element % 16 != 0) cuda_emulation::fail("wmma: stride not a multiple of 16 bytes");
}

inline void meet(const char* what, void* data, cuda_emulation::Combine combine, const char* file,
                 int line) {
  cuda_emulation::meet_warp(0xffffffffu, data, combine, false, {what, file, line});
}

}  // namespace detail

#define CUDA_EMULATION_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

template <typename Use, int m, int n, int k, typename T, typename Layout>
void load_matrix_sync(fragment<Use, m, n, k, T, Layout>& f,
                      const typename detail::Stored<T>::type* from, unsigned stride,
                      CUDA_EMULATION_HERE) {
  static_assert(!std::is_same_v<Use, accumulator>, "an accumulator's layout is an argument");
  detail::meet("wmma::load_matrix_sync", nullptr, nullptr, file, line);
  detail::check_pointer(from, stride, sizeof(*from));
  detail::for_each_of_lane<fragment<Use, m, n, k, T, Layout>>(
      stride, std::is_same_v<Layout, row_major>, [&](int i, size_t at) { f.x[i] = from[at]; });
}

template <int m, int n, int k, typename T>
void load_matrix_sync(fragment<accumulator, m, n, k, T>& f, const T* from, unsigned stride,
                      layout_t layout, CUDA_EMULATION_HERE) {
  detail::meet("wmma::load_matrix_sync", nullptr, nullptr, file, line);
  detail::check_pointer(from, stride, sizeof(*from));
  detail::for_each_of_lane<fragment<accumulator, m, n, k, T>>(
      stride, layout == mem_row_major, [&](int i, size_t at) { f.x[i] = from[at]; });
}

template <int m, int n, int k, typename T>
void store_matrix_sync(T* to, const fragment<accumulator, m, n, k, T>& f, unsigned stride,
                       layout_t layout, CUDA_EMULATION_HERE) {
  detail::meet("wmma::store_matrix_sync", nullptr, nullptr, file, line);
  detail::check_pointer(to, stride, sizeof(*to));
  detail::for_each_of_lane<fragment<accumulator, m, n, k, T>>(
      stride, layout == mem_row_major, [&](int i, size_t at) { to[at] = f.x[i]; });
}

// Keeps the 10 upper bits of the mantissa, rounding ties away from zero, as cvt.rna.tf32 does.
inline float __float_to_tf32(float x) {
  if (!isfinite(x)) return x;
  return __uint_as_float((__float_as_uint(x) + 0x1000u) & ~0x1fffu);
}

namespace detail {

// What the tensor cores read of an operand: of a tf32 one, not the lower 13 bits.
template <typename T, typename Element>
float operand(Element x) {
  if constexpr (std::is_same_v<T, precision::tf32>) {
    return __uint_as_float(__float_as_uint(x) & ~0x1fffu);
  } else {
    return float(x);
  }
}

template <int m, int n, int k, typename T, typename LayoutA, typename LayoutB, typename C>
struct Product {
  using A = fragment<matrix_a, m, n, k, T, LayoutA>;
  using B = fragment<matrix_b, m, n, k, T, LayoutB>;
  using Sum = fragment<accumulator, m, n, k, C>;
  Sum* d;
  const A* a;
  const B* b;
  const Sum* c;

  __attribute__((no_sanitize("thread"))) static void multiply(void* const data[32], unsigned) {
    const auto of = [data](int lane) __attribute__((no_sanitize("thread"))) {
      return static_cast<Product*>(data[lane]);
    };
    float a[m * k], b[k * n], d[m * n];
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < A::num_elements; ++i) {
        a[lane * A::num_elements + i] = operand<T>(of(lane)->a->x[i]);
      }
      for (int i = 0; i < B::num_elements; ++i) {
        b[lane * B::num_elements + i] = operand<T>(of(lane)->b->x[i]);
      }
      for (int i = 0; i < Sum::num_elements; ++i) {
        d[lane * Sum::num_elements + i] = float(of(lane)->c->x[i]);
      }
    }
    for (int row = 0; row < m; ++row) {
      for (int inner = 0; inner < k; ++inner) {
        for (int column = 0; column < n; ++column) {
          d[row * n + column] += a[row * k + inner] * b[inner * n + column];
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < Sum::num_elements; ++i) {
        of(lane)->d->x[i] = C(d[lane * Sum::num_elements + i]);
      }
    }
  }
};

}  // namespace detail

template <int m, int n, int k, typename T, typename LayoutA, typename LayoutB, typename C>
void mma_sync(fragment<accumulator, m, n, k, C>& d,
              const fragment<matrix_a, m, n, k, T, LayoutA>& a,
              const fragment<matrix_b, m, n, k, T, LayoutB>& b,
              const fragment<accumulator, m, n, k, C>& c, CUDA_EMULATION_HERE) {
  using Product = detail::Product<m, n, k, T, LayoutA, LayoutB, C>;
  Product product{&d, &a, &b, &c};
  detail::meet("wmma::mma_sync", &product, Product::multiply, file, line);
}

#undef CUDA_EMULATION_HERE

}  // namespace nvcuda::wmma
