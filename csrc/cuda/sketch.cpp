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

void sketch_into(const Tensor& rows, const Tensor& basis, bool ones, const Sketch& sketch) {
  // The products here are cuBLAS's, see sketch.cuh; TF32 would be too coarse for curvature.
  const at::NoTF32Guard no_tf32;
  const int64_t n = rows.size(0), size = rows.size(1), rank = basis.size(1);
  if (!has_kernels(basis) || rows.scalar_type() == at::kDouble || n == 0 || rank == 0 ||
      dense_type(basis) != basis.scalar_type()) {
    sketch_dense(rows, basis, ones, sketch);
    return;
  }
  const Projection projection = make_projection(rows, std::nullopt, basis, std::nullopt, true);
  ProductPlan plan(dtype_of(rows.scalar_type()));
  plan.add(projection.product);
  Gram gram = make_gram(projection.product);
  const Tensor parts = at::empty({gram.splits, rank * rank + rank}, basis.options());
  gram.parts = parts.mutable_data_ptr<float>();
  gram.core = sketch.core.mutable_data_ptr<float>();
  gram.last = ones ? sketch.transposed.mutable_data_ptr<float>() + size : nullptr;
  gram.last_stride = basis.size(0);
  gram.trace = sketch.trace.mutable_data_ptr<float>();
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  plan.launch(stream);
  launch_gram(gram, stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  Tensor top = sketch.transposed.narrow(1, 0, size);
  at::mm_out(top, projection.turned.t(), rows.to(at::kFloat));
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
  sketch_into(rows, basis, ones, view_sketch(fresh, basis));
  fresh[0].fill_(rows.size(0));
  if (sums.scalar_type() == at::kDouble) {
    const Tensor usable = fresh.sum().isfinite().logical_and_(fresh[1] > 0);
    sums.add_(at::where(usable, fresh, at::zeros_like(fresh)));
    return;
  }
  const Tensor flags = at::empty({kAddBlocks}, sums.options().dtype(at::kInt));
  const Tensor target = sums.contiguous();
  launch_add_usable(fresh.const_data_ptr<float>(), target.mutable_data_ptr<float>(),
                    fresh.numel(), flags.mutable_data_ptr<int32_t>(),
                    c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  if (!target.is_same(sums)) sums.copy_(target);
}

}  // namespace

TORCH_LIBRARY_IMPL(gls_fused, CUDA, m) {
  m.impl("sketch_rows", &sketch_rows);
  m.impl("add_sketch_", &add_sketch_);
}

}  // namespace gls_fused::cuda
