// Launches of core.cuh.

#include "core.cuh"

namespace gls_fused::cuda {

cudaError_t launch_invert_cores(const CoreTable& table, bool is_double, cudaStream_t stream) {
  const int bytes = core_bytes(table.most_rank, is_double);
  const auto kernel = is_double ? invert_cores_kernel<double> : invert_cores_kernel<float>;
  // More than the 48 KiB that a kernel gets unasked.
  const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (allowed != cudaSuccess) return allowed;
  kernel<<<table.count, kCoreThreads, bytes, stream>>>(table);
  return cudaSuccess;
}

}  // namespace gls_fused::cuda
