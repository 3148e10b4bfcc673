// Launches of update.cuh. Free of torch's headers, which nvcc reads once per architecture.

#include "update.cuh"

#include "launch.cuh"

namespace gls_fused::cuda {

void launch_square_flat(const FlatTable& table, Dtype dtype, bool both, double2* squares,
                        cudaStream_t stream) {
  visit(dtype, [&](auto element) {
    using T = decltype(element);
    square_flat_kernel<T><<<table.blocks, kUpdateThreads, 0, stream>>>(table, both, squares);
  });
}

void launch_finish_layers(const LayerTable& table, const FinishOptions& options,
                          const double2* squares, LayerStep* steps, cudaStream_t stream) {
  finish_layers_kernel<<<table.count, kFinishThreads, 0, stream>>>(table, options, squares, steps);
}

void launch_update_flat(const FlatTable& table, Dtype dtype, const LayerStep* steps,
                        const Decays& decays, cudaStream_t stream) {
  const bool momentum = table.entries[0].exp_avg, elementwise = table.entries[0].exp_avg_sq;
  visit(dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel = momentum ? (elementwise ? update_flat_kernel<T, true, true>
                                                : update_flat_kernel<T, true, false>)
                                 : (elementwise ? update_flat_kernel<T, false, true>
                                                : update_flat_kernel<T, false, false>);
    kernel<<<table.blocks, kUpdateThreads, 0, stream>>>(table, steps, decays);
  });
}

}  // namespace gls_fused::cuda
