// What the kernel that rounds is told.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"
#include "table.h"

namespace gls_fused::cuda {

constexpr int kRoundThreads = 256;
// Elements of a block: 32 bytes of values to a thread.
constexpr int kRoundElements = kRoundThreads * 8;

struct Rounded {
  void* param;
  const float* values;  // as the parameter lies in memory
  const void* step;     // float or double, 0-d
  int64_t numel;
  uint32_t seed;
  uint32_t first;  // its first block in this launch
  bool double_step;
};

using RoundTable = Table<Rounded>;

void launch_round(const RoundTable& table, Dtype dtype, cudaStream_t stream);

}  // namespace gls_fused::cuda
