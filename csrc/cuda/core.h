// What the kernel that makes C and lambda' is told; see core.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace gls_fused::cuda {

constexpr int kCoreThreads = 256;
// M in shared memory: 65 KiB in float32; in float64 the same at half the rank's square.
constexpr int kMaxCoreRank = 128;
constexpr int kMaxDoubleCoreRank = 88;
constexpr int kMaxCores = 64;

struct CoreLayer {
  const void* core;    // M [rank, rank], contiguous
  const void* trace;   // t, 0-d
  void* core_inverse;  // C [rank, rank], contiguous
  void* shift;         // lambda', 0-d
  int64_t dim;
  double share;  // lambda / t
  int32_t rank;
};

struct CoreTable {
  CoreLayer entries[kMaxCores];
  int32_t count;
  int32_t most_rank;
};

// Bytes of shared memory for a matrix of this rank, its pivot row and column, and a flag.
inline int core_bytes(int rank, bool is_double) {
  return (rank * (rank + 1) + 2 * rank + 1) * (is_double ? 8 : 4);
}

cudaError_t launch_invert_cores(const CoreTable& table, bool is_double, cudaStream_t stream);

}  // namespace gls_fused::cuda
