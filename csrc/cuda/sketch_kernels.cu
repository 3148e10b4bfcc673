// Launches of sketch.cuh.

#include "sketch.cuh"

namespace gls_fused::cuda {

void launch_gram(const Gram& gram, cudaStream_t stream) {
  const int width = gram.rank * gram.rank + gram.rank;
  const int blocks = (width + kSketchThreads - 1) / kSketchThreads;
  if (gram.splits > 0) gram_kernel<<<gram.splits, kSketchThreads, 0, stream>>>(gram);
  finish_gram_kernel<<<blocks < 1 ? 1 : blocks, kSketchThreads, 0, stream>>>(gram);
}

void launch_add_usable(const float* fresh, float* sums, int64_t numel, int32_t* flags,
                       cudaStream_t stream) {
  flag_kernel<<<kAddBlocks, kSketchThreads, 0, stream>>>(fresh, numel, flags);
  add_usable_kernel<<<kAddBlocks, kSketchThreads, 0, stream>>>(fresh, sums, numel, flags);
}

}  // namespace gls_fused::cuda
