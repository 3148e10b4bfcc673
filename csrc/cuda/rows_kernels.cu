// Launches of product.cuh and rows.cuh.

#include "rows.cuh"

#include "launch.cuh"

namespace gls_fused::cuda {

void launch_project(const ProductTable& table, Dtype dtype, cudaStream_t stream) {
  visit_single(dtype, [&](auto element) {
    using T = decltype(element);
    project_kernel<T><<<table.blocks, kProductThreads, 0, stream>>>(table);
  });
}

void launch_combine(const Combination& combination, Dtype dtype, cudaStream_t stream) {
  visit_single(dtype, [&](auto element) {
    using T = decltype(element);
    const Product& p = combination.product;
    const int64_t down = (p.n + kTileRows<T> - 1) / kTileRows<T>;
    const int64_t across = p.size ? (p.size + kTileColumns<T> - 1) / kTileColumns<T> : 1;
    const auto kernel = combination.wide ? combine_kernel<T, true> : combine_kernel<T, false>;
    kernel<<<uint32_t(down * across), kProductThreads, 0, stream>>>(combination);
  });
}

}  // namespace gls_fused::cuda
