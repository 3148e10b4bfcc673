// Launches of sketch.cuh.

#include "sketch.cuh"

namespace gls_fused::cuda {

void launch_gram(const Gram& gram, cudaStream_t stream) {
  if (gram.splits > 0) gram_kernel<<<gram.splits, kSketchThreads, 0, stream>>>(gram);
}

void launch_finish_gram(const Gram& gram, float* core, float* last, float* trace,
                        cudaStream_t stream) {
  const int width = gram.rank * gram.rank + gram.rank;
  const int blocks = (width + kSketchThreads - 1) / kSketchThreads;
  finish_gram_kernel<<<blocks < 1 ? 1 : blocks, kSketchThreads, 0, stream>>>(gram, core, last,
                                                                            trace);
}

void launch_add_sketch(const Gram& gram, const float* transposed, float* sums,
                       cudaStream_t stream) {
  const int64_t numel = 2 + gram.rank * (gram.rank + gram.dim);
  const auto blocks = uint32_t((numel + kSketchThreads - 1) / kSketchThreads);
  add_sketch_kernel<<<blocks, kSketchThreads, 0, stream>>>(gram, transposed, sums);
}

}  // namespace gls_fused::cuda
