// What nvcc knows without being told and what its cuda_runtime.h declares, with their meaning on
// the host. Covers what kernels use; build.py makes <<<...>>> a call of cuda_emulation::launch.

#pragma once

#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>

// Exported, so that messages can name kernels.
#define __global__ __attribute__((visibility("default")))
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
// One copy per block: blocks run one at a time, and the runtime finds all of it in the library's
// thread-local segment. `extern __shared__` declares a symbol that build.py lets stand for the
// launch's dynamic shared memory.
#define __shared__ thread_local

#include "cuda_runtime_api.h"
#include "emulation/atomics.h"
#include "emulation/machine.h"
#include "emulation/math.h"
#include "emulation/vector_types.h"
#include "emulation/warp.h"

#define threadIdx (::cuda_emulation::thread_index())
#define blockIdx (::cuda_emulation::block_index())
#define blockDim (::cuda_emulation::block_dim())
#define gridDim (::cuda_emulation::grid_dim())
#define warpSize 32
