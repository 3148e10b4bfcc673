// Launches of subspace.cuh.

#include "subspace.cuh"

namespace gls_fused::cuda {

namespace {

template <bool kSecond>
void launch_round(const MoveTable& table, cudaStream_t stream) {
  square_rows_kernel<kSecond><<<table.blocks, kMoveThreads, 0, stream>>>(table);
  factor_kernel<kSecond><<<table.count, kMoveThreads, 0, stream>>>(table);
  rotate_kernel<kSecond><<<table.blocks, kMoveThreads, 0, stream>>>(table);
}

}  // namespace

void launch_moves(const MoveTable& table, cudaStream_t stream) {
  launch_round<false>(table, stream);
  launch_round<true>(table, stream);
  move_core_kernel<<<table.count, kMoveThreads, 0, stream>>>(table);
}

}  // namespace gls_fused::cuda
