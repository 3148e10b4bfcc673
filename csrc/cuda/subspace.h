// What the kernels that move the bases are told; see subspace.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "table.h"

namespace gls_fused::cuda {

constexpr int kMoveThreads = 256;
// Columns of Z' to a block: d = 3072 makes 24 of them.
constexpr int kMoveColumns = 128;

struct Move {
  const float* sketch;  // Z' [rank, dim], contiguous
  const float* core;    // M [rank, rank], contiguous
  float* rough;         // Q' [rank, dim], of the first round
  float* basis;         // U+' [rank, dim]
  float* core_out;      // M+ [rank, rank]
  double* parts;        // [blocks, rank, rank] of Z'Z, then of Q'Q
  double* triangles;    // [3, rank, rank]: R of the first round, R^-1 of either, T
  int64_t dim;
  int32_t rank;
  uint32_t blocks;
  uint32_t first;  // its first block in the launches over dim
};

using MoveTable = Table<Move>;

// All five launches.
void launch_moves(const MoveTable& table, cudaStream_t stream);

}  // namespace gls_fused::cuda
