// sketch_rows and add_sketch_ on CUDA devices.

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "../check.h"
#include "../sums.h"
#include "plan.h"
#include "projection.h"

namespace gls_fused::cuda {
namespace {

using at::Tensor;

// In float64, and beyond the kernels' ranks.
void sketch_dense(const Tensor& rows, const Tensor& basis, bool ones, const Sketch& sketch) {
  const int64_t size = rows.size(1);
  const at::ScalarType type = dense_type(basis);
  const Tensor inputs = rows.to(type), u = basis.to(type);
  Tensor y = inputs.mm(u.narrow(0, 0, size));
  if (ones) y.add_(u.select(0, size));
  sketch.core.copy_(y.t().mm(y));
  sketch.transposed.narrow(1, 0, size).copy_(y.t().mm(inputs));
  if (ones) sketch.transposed.select(1, size).copy_(y.sum(0));
  sketch.trace.copy_(inputs.square().sum().add_(ones ? rows.size(0) : 0));
}

// Whether the kernels make the sketch; where not, torch's products do.
bool is_fused(const Tensor& rows, const Tensor& basis) {
  return has_kernels(basis) && rows.scalar_type() != at::kDouble && rows.size(0) > 0 &&
         basis.size(1) > 0 && dense_type(basis) == basis.scalar_type();
}

// Y, parts of Y'Y, 1'Y and ||A||_F^2, and A'Y, which is cuBLAS's: see sketch.cuh. Its kernels add the
// parts up.
class FusedSketch {
 public:
  FusedSketch(const Tensor& rows, const Tensor& basis, bool ones, const Sketch& sketch)
      : projection_(make_projection(rows, std::nullopt, basis, std::nullopt, true)),
        gram_(make_gram(projection_.product)) {
    const int64_t n = rows.size(0), size = rows.size(1), rank = basis.size(1);
    const bool whole = projection_.product.splits == 1;
    y_ = whole ? projection_.parts.select(0, 0) : at::empty({n, rank}, basis.options());
    parts_ = at::empty({gram_.splits, rank * rank + rank}, basis.options());
    gram_.projected = whole ? nullptr : y_.mutable_data_ptr<float>();
    gram_.parts = parts_.mutable_data_ptr<float>();
    gram_.ones = ones;
    gram_.dim = basis.size(0);
    ProductPlan plan(dtype_of(rows.scalar_type()));
    plan.add(projection_.product);
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    plan.launch(stream);
    launch_gram(gram_, stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    // TF32 would be too coarse for curvature.
    const at::NoTF32Guard no_tf32;
    Tensor top = sketch.transposed.narrow(1, 0, size);
    at::mm_out(top, y_.t(), rows.to(at::kFloat));
  }

  const Gram& gram() const { return gram_; }

 private:
  Projection projection_;
  Gram gram_;
  Tensor y_, parts_;
};

void sketch_into(const Tensor& rows, const Tensor& basis, bool ones, const Sketch& sketch) {
  if (!is_fused(rows, basis)) {
    const at::NoTF32Guard no_tf32;
    sketch_dense(rows, basis, ones, sketch);
    return;
  }
  const FusedSketch fused(rows, basis, ones, sketch);
  float* last = ones ? sketch.transposed.mutable_data_ptr<float>() + rows.size(1) : nullptr;
  launch_finish_gram(fused.gram(), sketch.core.mutable_data_ptr<float>(), last,
                     sketch.trace.mutable_data_ptr<float>(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor, Tensor> sketch_rows(const Tensor& rows, const Tensor& basis,
                                               bool ones) {
  check_rows("sketch_rows", rows, basis, ones);
  const c10::cuda::CUDAGuard guard(rows.device());
  const Sketch sketch = make_sketch(basis);
  sketch_into(rows, basis, ones, sketch);
  return {sketch.core, sketch.transposed.t(), sketch.trace};
}

// sums [2 + r r + r d] += [n, ||A||_F^2, Y'Y, (A'Y)'], unless these are not finite or all zero.
void add_sketch_(const Tensor& rows, const Tensor& basis, bool ones, Tensor& sums) {
  check_sums(rows, basis, ones, sums);
  const c10::cuda::CUDAGuard guard(rows.device());
  const Tensor fresh = at::empty(sums.sizes(), sums.options());
  const Sketch sketch = view_sketch(fresh, basis);
  if (!is_fused(rows, basis)) {
    sketch_into(rows, basis, ones, sketch);
    fresh[0].fill_(rows.size(0));
    const Tensor usable = fresh.sum().isfinite().logical_and_(fresh[1] > 0);
    sums.add_(at::where(usable, fresh, at::zeros_like(fresh)));
    return;
  }
  const FusedSketch fused(rows, basis, ones, sketch);
  const Tensor target = sums.contiguous();
  launch_add_sketch(fused.gram(), sketch.transposed.const_data_ptr<float>(),
                    target.mutable_data_ptr<float>(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  if (!target.is_same(sums)) sums.copy_(target);
}

}  // namespace

TORCH_LIBRARY_IMPL(gls_fused, CUDA, m) {
  m.impl("sketch_rows", &sketch_rows);
  m.impl("add_sketch_", &add_sketch_);
}

}  // namespace gls_fused::cuda
