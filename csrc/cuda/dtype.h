// Element types, as a launcher is told of them.
#pragma once

namespace gls_fused::cuda {

enum class Dtype { kFloat, kDouble, kBFloat16, kHalf };

constexpr int element_bytes(Dtype dtype) {
  return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2;
}

}  // namespace gls_fused::cuda
