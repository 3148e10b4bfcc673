// What the kernels that make C and lambda'^p are told; see core.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "table.h"

namespace gls_fused::cuda {

constexpr int kCoreThreads = 256;
// M in shared memory: 65 KiB in float32; in float64 the same at half the rank's square.
constexpr int kMaxCoreRank = 128;
constexpr int kMaxDoubleCoreRank = 88;
// Where p is not 1: three matrices, which at these ranks fill the 99 KiB that a block has on the
// smallest device; and a 4 by 4 tile of a half to each thread, which holds a product in registers.
constexpr int kMaxRootRank = 88;
constexpr int kMaxDoubleRootRank = 60;

struct CoreLayer {
  const void* core;    // M [rank, rank], contiguous
  const void* trace;   // t, 0-d
  void* core_inverse;  // C [rank, rank], contiguous
  void* shift;         // lambda'^p, 0-d
  const void* samples;  // s, 0-d; null: no fewer than dim
  int64_t dim;
  int32_t rank;
};

struct CoreTable : Table<CoreLayer> {
  int32_t most_rank = 0;
  double damping = 0;
};

// Bytes of shared memory for a matrix of this rank, its pivot row and column, and a flag.
inline int core_bytes(int rank, bool is_double) {
  return (rank * (rank + 1) + 2 * rank + 1) * (is_double ? 8 : 4);
}

// Of rows in shared memory where p is not 1: an odd multiple of 4, which spreads columns of a
// matrix over twice the banks.
inline int root_pitch(int rank) { return ((rank + 3) / 4 | 1) * 4; }

inline int root_bytes(int rank, bool is_double) {
  return 3 * ((rank + 3) / 4 * 4) * root_pitch(rank) * (is_double ? 8 : 4);
}

// `quarters`: 4 p, 1 to 4.
cudaError_t launch_invert_cores(const CoreTable& table, bool is_double, int quarters,
                                cudaStream_t stream);

}  // namespace gls_fused::cuda
