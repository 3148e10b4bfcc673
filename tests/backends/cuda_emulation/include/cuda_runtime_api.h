// What launchers call.

#pragma once

#include <cstddef>

#include "emulation/vector_types.h"

// One whose kernels have 4 KiB of arguments, which the tests can fill.
#define CUDART_VERSION 12000

using cudaStream_t = struct CUstream_st*;

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace cuda_emulation {

bool allow_dynamic_shared(const void* kernel, size_t bytes);

}  // namespace cuda_emulation

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  const bool allowed =
      cuda_emulation::allow_dynamic_shared(reinterpret_cast<const void*>(kernel), size_t(bytes));
  return allowed ? cudaSuccess : cudaErrorInvalidValue;
}
