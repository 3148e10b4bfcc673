// What the kernels of X P = X / lambda' + T U', T = (X U) C, are told; see product.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"
#include "table.h"

namespace gls_fused::cuda {

// At rank 64 X U takes 128 flop per 4 bytes of X, past the 20 flop per byte at which an H100's
// float32 units (67 Tflop/s, 3.35 TB/s) are the bound. Beyond it cuBLAS has the better kernels.
constexpr int kMaxRank = 64;

constexpr int kProductThreads = 256;
// Of X U: rows and columns of X that a block holds at a time.
constexpr int kProjectRows = 32;
constexpr int kProjectColumns = 64;

// What stands in the column of X beyond `size`.
enum class Last { kAbsent, kOnes, kColumn };

struct Product {
  const void* x;              // [n, size], a row's elements adjacent
  const void* last;           // [n], where the last column is given
  const float* basis;         // U' [rank, size (+ 1)], a row's elements adjacent
  const float* core_inverse;  // C [rank, rank], contiguous; null where Y = X U is wanted, not T
  float* parts;               // [splits, n, rank]: T, or Y, over a part of the columns
  double* squares;            // of X, one number per block of the projection; or null
  int64_t n;
  int64_t size;
  int64_t x_row;
  int64_t basis_row;
  int64_t last_stride;
  int64_t columns;  // of a part, a multiple of kProjectColumns
  int32_t rank;
  int32_t splits;
  Last kind;
  bool wide;       // whether every row of X begins at 16 bytes and ends there
  uint32_t first;  // its first block in this launch
};

using ProductTable = Table<Product>;

// T, or Y, [n, rank]: the sum of its parts, in their order.
struct Turned {
  const float* parts;
  int64_t pitch;  // from one part to the next
  int32_t rank;
  int32_t splits;
};

inline Turned turned_of(const Product& p) { return {p.parts, p.n * p.rank, p.rank, p.splits}; }

// Where P is applied to a matrix by itself.
struct Combination {
  Product product;
  const float* shift;
  void* output;       // [n, size], contiguous
  void* output_last;  // [n]
  bool wide;          // whether every row of X and of the output begins at 16 bytes and ends there
};

void launch_project(const ProductTable& table, Dtype dtype, cudaStream_t stream);
void launch_combine(const Combination& combination, Dtype dtype, cudaStream_t stream);

}  // namespace gls_fused::cuda
