// Launches of core.cuh.

#include "core.cuh"

namespace gls_fused::cuda {

namespace {

// More than the 48 KiB that a kernel gets unasked.
template <typename Kernel>
cudaError_t allow(Kernel kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

}  // namespace

cudaError_t launch_invert_cores(const CoreTable& table, bool is_double, int quarters,
                                cudaStream_t stream) {
  const int rank = table.most_rank;
  if (quarters == 4) {
    const int bytes = core_bytes(rank, is_double);
    const auto kernel = is_double ? invert_cores_kernel<double> : invert_cores_kernel<float>;
    const cudaError_t allowed = allow(kernel, bytes);
    if (allowed != cudaSuccess) return allowed;
    kernel<<<table.count, kCoreThreads, bytes, stream>>>(table);
    return cudaSuccess;
  }
  const int bytes = root_bytes(rank, is_double), pitch = root_pitch(rank);
  const auto kernel = is_double ? root_cores_kernel<double> : root_cores_kernel<float>;
  const cudaError_t allowed = allow(kernel, bytes);
  if (allowed != cudaSuccess) return allowed;
  kernel<<<table.count, kCoreThreads, bytes, stream>>>(table, quarters, pitch);
  return cudaSuccess;
}

}  // namespace gls_fused::cuda
