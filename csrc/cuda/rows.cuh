// A P = A / lambda' + ((A U) C) U' for rows, or for a gradient, as a matrix of its own.
//
// Two launches, so that 128 rows of 3072 make 24 and 48 blocks; one block to 32 rows, which needs only
// one launch, would leave 128 of an H100's 132 SMs idle.
// Bytes per float32 element: 12, of which the second 4 come from L2 where A fits there (50 MB).
#pragma once

#include "product.cuh"

namespace gls_fused::cuda {

template <typename T, bool kWide>
__global__ void __launch_bounds__(kProductThreads, 2)
    combine_kernel(const __grid_constant__ Combination x) {
  __shared__ __align__(16) TileMemory<T> memory;
  const Product& p = x.product;
  const Turned turned{p.parts, p.n * p.rank, p.rank, p.splits};
  const T* input = static_cast<const T*>(p.x);
  T* output = static_cast<T*>(x.output);
  const uint32_t across = uint32_t((p.size + kTileColumns<T> - 1) / kTileColumns<T>);
  // Without columns there is still the last one.
  const auto place = find_place<T, kWide>(blockIdx.x, across ? across : 1, p.n, p.size);
  const float scale = 1.0f / *x.shift;
  float d[kTileThreadRows<T>][kWidth<T>];
#pragma unroll
  for (int r = 0; r < kTileThreadRows<T>; ++r) {
    load_row(place, input, place.row + r, p.x_row, d[r]);
#pragma unroll
    for (int k = 0; k < kWidth<T>; ++k) d[r][k] *= scale;
  }
  form_tile(place, turned, p.basis, p.basis_row, memory, d);
#pragma unroll
  for (int r = 0; r < kTileThreadRows<T>; ++r) {
    store_row(place, d[r], output, place.row + r, p.size);
  }
  if (p.kind == Last::kAbsent || place.column != 0 || threadIdx.x >= kTileRows<T>) return;
  const int64_t i = place.row - threadIdx.x / 32 * kTileThreadRows<T> + threadIdx.x;
  if (i >= p.n) return;
  const float last = last_element<T>(p, i) * scale +
                     turn_last(turned, p.basis, p.basis_row, p.size, i);
  narrow(last, static_cast<T*>(x.output_last)[i]);
}

}  // namespace gls_fused::cuda
