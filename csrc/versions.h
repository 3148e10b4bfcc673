// Tells autograd of tensors that an op has written to, whose memory may be saved for a backward.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>

namespace gls_fused {
#ifdef CPU_CAPABILITY
inline namespace CPU_CAPABILITY {
#endif

inline void advance_versions(std::initializer_list<at::TensorList> written) {
  for (const at::TensorList tensors : written) {
    for (const at::Tensor& tensor : tensors) {
      if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
    }
  }
}

#ifdef CPU_CAPABILITY
}  // namespace CPU_CAPABILITY
#endif
}  // namespace gls_fused
