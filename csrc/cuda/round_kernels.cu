// Launches of round.cuh.

#include "round.cuh"

namespace gls_fused::cuda {

void launch_round(const RoundTable& table, Dtype dtype, cudaStream_t stream) {
  if (dtype == Dtype::kBFloat16) {
    round_kernel<__nv_bfloat16><<<table.blocks, kRoundThreads, 0, stream>>>(table);
  } else {
    round_kernel<__half><<<table.blocks, kRoundThreads, 0, stream>>>(table);
  }
}

}  // namespace gls_fused::cuda
