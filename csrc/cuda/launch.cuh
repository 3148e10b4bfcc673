// From a dtype known at run time to a type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "dtype.h"

namespace gls_fused::cuda {

template <typename Function>
void visit(Dtype dtype, const Function& function) {
  switch (dtype) {
    case Dtype::kFloat: return function(float());
    case Dtype::kDouble: return function(double());
    case Dtype::kBFloat16: return function(__nv_bfloat16());
    case Dtype::kHalf: return function(__half());
  }
}

// The same for what computes in float32.
template <typename Function>
void visit_single(Dtype dtype, const Function& function) {
  switch (dtype) {
    case Dtype::kBFloat16: return function(__nv_bfloat16());
    case Dtype::kHalf: return function(__half());
    default: return function(float());
  }
}

}  // namespace gls_fused::cuda
