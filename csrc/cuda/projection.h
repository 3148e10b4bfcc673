// From tensors to the tables of product.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "product.h"

namespace gls_fused::cuda {

Dtype dtype_of(at::ScalarType type);

// Whether the kernels take P, or a sketch, with this basis; where not, cuBLAS's products do.
bool has_kernels(const at::Tensor& basis);

// The dtype of products by cuBLAS, under at::NoTF32Guard. cuBLAS's handle keeps to it (ATen's
// CublasHandlePool.cpp); cublasLt, where the user prefers it, asks for the global setting alone
// (CublasLtUtils.h), which has no say in float64.
at::ScalarType dense_type(const at::Tensor& basis);

// X [n, k] on its way to T [n, r], and the tensors that the table's addresses belong to.
struct Projection {
  Product product;
  std::vector<at::Tensor> kept;
  at::Tensor parts;    // [splits, n, r] of T, or of Y without a core
  at::Tensor squares;  // of X, a number to a block; undefined where not asked for
};

// `last` [n] is X's last column where U has a row more than X columns; ones where it is not given.
Projection make_projection(const at::Tensor& x, const std::optional<at::Tensor>& last,
                           const at::Tensor& basis, const std::optional<at::Tensor>& core_inverse,
                           bool with_squares);

// X P and, where U has a row more than X columns, its last column; of X's dtype.
std::tuple<at::Tensor, at::Tensor> multiply_inverse(const at::Tensor& x,
                                                    const std::optional<at::Tensor>& last,
                                                    const at::Tensor& basis,
                                                    const at::Tensor& core_inverse,
                                                    const at::Tensor& shift);

}  // namespace gls_fused::cuda
