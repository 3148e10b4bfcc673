#include "projection.h"

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <tuple>

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

bool is_wide(const Tensor& x, int64_t row, int64_t size) {
  const int64_t width = 16 / x.element_size();
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 && row % width == 0 &&
         size % width == 0;
}

bool has_kernels(const Tensor& basis) {
  return basis.scalar_type() == at::kFloat && basis.size(1) <= kMaxRank;
}

namespace {

Tensor in_rows(const Tensor& x) { return x.stride(-1) == 1 || x.size(-1) < 2 ? x : x.contiguous(); }

int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }

// X P by cuBLAS: in float64, and beyond the kernels' ranks.
std::tuple<Tensor, Tensor> multiply_dense(const Tensor& x, const std::optional<Tensor>& last,
                                          const Tensor& basis, const Tensor& core_inverse,
                                          const Tensor& shift) {
  const at::NoTF32Guard no_tf32;
  const int64_t size = x.size(1);
  const bool extended = basis.size(0) > size;
  const Tensor inputs = x.to(basis.scalar_type()), top = basis.narrow(0, 0, size);
  Tensor y = inputs.mm(top);
  if (!extended) return {(inputs / shift).addmm_(y.mm(core_inverse), top.t()).to(x.scalar_type()),
                         x.new_empty({0})};
  const Tensor bottom = basis.select(0, size);
  const Tensor end = last ? last->to(basis.scalar_type()) : inputs.new_ones({x.size(0)});
  const Tensor t = y.addr_(end, bottom).mm(core_inverse);
  return {(inputs / shift).addmm_(t, top.t()).to(x.scalar_type()),
          (end / shift).add_(t.mv(bottom)).to(x.scalar_type())};
}

}  // namespace

Projection make_projection(const Tensor& x, const std::optional<Tensor>& last, const Tensor& basis,
                           const std::optional<Tensor>& core_inverse, bool with_squares) {
  const int64_t n = x.size(0), size = x.size(1), rank = basis.size(1);
  const bool extended = basis.size(0) > size;
  const Tensor inputs = in_rows(x), transposed = in_rows(basis.t());
  Projection result;
  Product& p = result.product;
  p.n = n;
  p.size = size;
  p.rank = int32_t(rank);
  p.splits = count_splits(n, size);
  p.columns = divide_up(divide_up(size, p.splits), kProjectColumns) * kProjectColumns;
  p.first = 0;
  p.x = inputs.const_data_ptr();
  p.x_row = inputs.stride(0);
  p.basis = transposed.const_data_ptr<float>();
  p.basis_row = transposed.stride(0);
  p.kind = !extended ? Last::kAbsent : last ? Last::kColumn : Last::kOnes;
  p.last = last ? last->const_data_ptr() : nullptr;
  p.last_stride = last ? last->stride(0) : 0;
  const Tensor parts = at::empty({p.splits, n, rank}, basis.options());
  p.parts = parts.mutable_data_ptr<float>();
  result.turned = at::empty({n, rank}, basis.options());
  p.turned = result.turned.mutable_data_ptr<float>();
  result.kept = {inputs, transposed, parts};
  if (last) result.kept.push_back(*last);
  p.core_inverse = nullptr;
  if (core_inverse) {
    result.kept.push_back(core_inverse->contiguous());
    p.core_inverse = result.kept.back().const_data_ptr<float>();
  }
  p.squares = nullptr;
  if (with_squares) {
    const int64_t blocks = divide_up(n, kProjectRows) * p.splits;
    result.squares = at::empty({blocks}, basis.options().dtype(at::kDouble));
    p.squares = result.squares.mutable_data_ptr<double>();
  }
  result.wide = is_wide(inputs, p.x_row, size);
  return result;
}

void run_projections(const std::vector<Projection>& projections, at::ScalarType type) {
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  for (const bool wide : {true, false}) {
    ProductTable table{};
    table.wide = wide;
    const auto launch = [&] {
      if (table.count == 0) return;
      launch_project(table, dtype_of(type), stream);
      launch_turn(table, dtype_of(type), stream);
      table.count = table.blocks = table.most_rows = 0;
    };
    for (const Projection& projection : projections) {
      if (projection.wide != wide || projection.product.n == 0) continue;
      Product& entry = table.entries[table.count++] = projection.product;
      const uint32_t down = uint32_t(divide_up(entry.n, kProjectRows));
      entry.first = table.blocks;
      table.blocks += down * entry.splits;
      table.most_rows = std::max(table.most_rows, down);
      if (table.count == kMaxProducts) launch();
    }
    launch();
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
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
  if (x.size(0) == 0) return {output, output_last};
  const std::vector<Projection> projections = {
      make_projection(x, last, basis, core_inverse, false)};
  run_projections(projections, x.scalar_type());
  Combination combination{};
  combination.product = projections[0].product;
  combination.shift = shift.const_data_ptr<float>();
  combination.output = output.mutable_data_ptr();
  combination.output_last = output_last.mutable_data_ptr();
  combination.wide = projections[0].wide && is_wide(output, x.size(1), x.size(1));
  launch_combine(combination, dtype_of(x.scalar_type()), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {output, output_last};
}

}  // namespace gls_fused::cuda
