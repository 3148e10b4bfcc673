#include "projection.h"

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <tuple>

#include "plan.h"

namespace gls_fused::cuda {

using at::Tensor;

Dtype dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return Dtype::kDouble;
    case at::kBFloat16: return Dtype::kBFloat16;
    case at::kHalf: return Dtype::kHalf;
    case at::kFloat: return Dtype::kFloat;
    default: TORCH_CHECK(false, "gls_fused: expected Float, Double, BFloat16 or Half, got ", type);
  }
}

bool has_kernels(const Tensor& basis) {
  return basis.scalar_type() == at::kFloat && basis.size(1) <= kMaxRank;
}

at::ScalarType dense_type(const Tensor& basis) {
  const bool guarded = at::globalContext().blasPreferredBackend() != at::BlasBackend::Cublaslt;
  return guarded ? basis.scalar_type() : at::kDouble;
}

namespace {

Tensor in_rows(const Tensor& x) { return x.stride(-1) == 1 || x.size(-1) < 2 ? x : x.contiguous(); }

// X P by cuBLAS: in float64, and beyond the kernels' ranks.
std::tuple<Tensor, Tensor> multiply_dense(const Tensor& x, const std::optional<Tensor>& last,
                                          const Tensor& basis, const Tensor& core_inverse,
                                          const Tensor& shift) {
  const at::NoTF32Guard no_tf32;
  const int64_t size = x.size(1);
  const bool extended = basis.size(0) > size;
  const at::ScalarType type = dense_type(basis);
  const Tensor inputs = x.to(type), u = basis.to(type), top = u.narrow(0, 0, size);
  const Tensor core = core_inverse.to(type), scale = shift.to(type);
  Tensor y = inputs.mm(top);
  if (!extended) {
    return {(inputs / scale).addmm_(y.mm(core), top.t()).to(x.scalar_type()), x.new_empty({0})};
  }
  const Tensor bottom = u.select(0, size);
  const Tensor end = last ? last->to(type) : inputs.new_ones({x.size(0)});
  const Tensor t = y.addr_(end, bottom).mm(core);
  return {(inputs / scale).addmm_(t, top.t()).to(x.scalar_type()),
          (end / scale).add_(t.mv(bottom)).to(x.scalar_type())};
}

}  // namespace

Projection make_projection(const Tensor& x, const std::optional<Tensor>& last, const Tensor& basis,
                           const std::optional<Tensor>& core_inverse, bool with_squares) {
  const int64_t n = x.size(0), size = x.size(1), rank = basis.size(1);
  const bool extended = basis.size(0) > size;
  const Tensor inputs = in_rows(x), transposed = in_rows(basis.t());
  Projection result{};
  Product& p = result.product;
  p.n = n;
  p.size = size;
  p.rank = int32_t(rank);
  split_columns(p);
  p.x = inputs.const_data_ptr();
  p.x_row = inputs.stride(0);
  p.basis = transposed.const_data_ptr<float>();
  p.basis_row = transposed.stride(0);
  p.kind = !extended ? Last::kAbsent : last ? Last::kColumn : Last::kOnes;
  p.last = last ? last->const_data_ptr() : nullptr;
  p.last_stride = last ? last->stride(0) : 0;
  result.parts = at::empty({p.splits, n, rank}, basis.options());
  p.parts = result.parts.mutable_data_ptr<float>();
  result.kept = {inputs, transposed};
  if (last) result.kept.push_back(*last);
  if (core_inverse) {
    result.kept.push_back(core_inverse->contiguous());
    p.core_inverse = result.kept.back().const_data_ptr<float>();
  }
  if (with_squares) {
    result.squares = at::empty({project_blocks(p)}, basis.options().dtype(at::kDouble));
    p.squares = result.squares.mutable_data_ptr<double>();
  }
  return result;
}

std::tuple<Tensor, Tensor> multiply_inverse(const Tensor& x, const std::optional<Tensor>& last,
                                            const Tensor& basis, const Tensor& core_inverse,
                                            const Tensor& shift) {
  if (!has_kernels(basis) || x.scalar_type() == at::kDouble) {
    return multiply_dense(x, last, basis, core_inverse, shift);
  }
  const bool extended = basis.size(0) > x.size(1);
  const Tensor output = at::empty(x.sizes(), x.options());
  const Tensor output_last = at::empty({extended ? x.size(0) : 0}, x.options());
  const Projection projection = make_projection(x, last, basis, core_inverse, false);
  Combination combination{};
  combination.product = projection.product;
  combination.shift = shift.const_data_ptr<float>();
  combination.output = output.mutable_data_ptr();
  combination.output_last = output_last.mutable_data_ptr();
  launch_combination(combination, dtype_of(x.scalar_type()), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {output, output_last};
}

}  // namespace gls_fused::cuda
