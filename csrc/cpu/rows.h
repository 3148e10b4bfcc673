// D = D0 P of layers, on the CPU, and what products with rows share; see rows.cpp and sketch.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../check.h"

namespace gls_fused {
inline namespace CPU_CAPABILITY {

// Whether a matrix lies in memory by columns, as a weight [k, m] does that is seen as [m, k].
inline bool is_turned(const at::Tensor& x) {
  return x.dim() == 2 && !x.is_contiguous() && x.t().is_contiguous();
}

// 16 rows of 3072 float32 take 192 KiB and U' of rank 32 takes 384 KiB: within 1 MiB.
constexpr int64_t kBlockRows = 16;
// Flops below which waking another thread takes longer than it saves, about 20 microseconds.
constexpr int64_t kSerialFlops = 1 << 20;

inline int64_t grain(int64_t count, int64_t flops) {
  return flops < kSerialFlops ? std::max<int64_t>(count, 1) : 1;
}

inline at::Tensor in_rows(const at::Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) < 2 ? x : x.contiguous();
}

// D = D0 P of every layer that has a P, in the gradients' place and dtype: of layer_sizes[i]
// consecutive gradients, a weight's and maybe a bias's, by the i-th of bases, core_inverses, shifts.
void precondition_layers(std::vector<at::Tensor>& gradients, at::IntArrayRef layer_sizes,
                         const OptionalTensors& bases, const OptionalTensors& core_inverses,
                         const OptionalTensors& shifts);

}  // namespace CPU_CAPABILITY
}  // namespace gls_fused
