// What CUDA C++ cannot say, and its plain meaning for the emulator of the tests.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace gls_fused::cuda {

// 16 bytes to global memory, in one instruction: nvcc 13.0 splits an assignment of a uint4 in four
// where the values come from a loop.
__device__ inline void store_16(void* to, uint4 bits) {
#ifdef GLS_FUSED_EMULATED
  *static_cast<uint4*>(to) = bits;
#else
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(to), "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
               : "memory");
#endif
}

// x, of which the compiler does not know that it is x: what follows from it is computed anew where it
// would have been kept in registers.
__device__ inline int64_t forget(int64_t x) {
#ifndef GLS_FUSED_EMULATED
  asm volatile("" : "+l"(x));
#endif
  return x;
}

}  // namespace gls_fused::cuda
