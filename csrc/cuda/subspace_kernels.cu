// Launches of subspace.cuh.

#include "subspace.cuh"

namespace gls_fused::cuda {

void launch_moves(const MoveTable& table, cudaStream_t stream) {
  square_rows_kernel<<<table.blocks, kMoveThreads, 0, stream>>>(table);
  factor_kernel<false><<<table.count, kMoveThreads, 0, stream>>>(table);
  rotate_kernel<false><<<table.blocks, kMoveThreads, 0, stream>>>(table);
  factor_kernel<true><<<table.count, kMoveThreads, 0, stream>>>(table);
  rotate_kernel<true><<<table.blocks, kMoveThreads, 0, stream>>>(table);
}

}  // namespace gls_fused::cuda
