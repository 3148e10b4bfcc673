// Element types, as a launcher is told of them.
#pragma once

namespace gls_fused::cuda {

enum class Dtype { kFloat, kDouble, kBFloat16, kHalf };

}  // namespace gls_fused::cuda
