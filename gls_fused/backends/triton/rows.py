"""X P for rows and for gradients: one kernel, a program owns a block of rows and walks d twice.

    Y = X U,   T = Y C,   X P = X / lambda' + T U'

The first walk leaves Y in registers, the second writes; the block of X comes from L2 again where it
is larger than that, and U stays there for all programs. 8 n d bytes in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gls_fused import reference
from gls_fused.backends.triton.configs import MAX_RANK, pad_rank, product_precision, row_tile
from gls_fused.backends.triton.launch import launch, needs_reference, traceable
from gls_fused.reference import DenseInverse, Inverse, SubspaceInverse

# What a row's last element is.
ABSENT, ONES, COLUMN = 0, 1, 2


@triton.jit
def _precondition_kernel(
    rows,  # [n, size]
    last,  # [n], read where LAST is COLUMN
    basis,  # [size (+ 1), rank]
    core_inverse,  # [rank, rank]
    shift,  # [1]
    product,  # [n, size], contiguous
    product_last,  # [n], written unless LAST is ABSENT
    n,
    size,
    rank,
    row_stride,
    column_stride,
    last_stride,
    basis_row_stride,
    basis_column_stride,
    core_row_stride,
    core_column_stride,
    LAST: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, RANK)
    in_rows, in_rank = i < n, c < rank
    row = rows + i[:, None] * row_stride
    y = tl.zeros([BLOCK_N, RANK], dtype=tl.float32)
    for start in range(0, size, BLOCK_D):
        j = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask = in_rows[:, None] & (j < size)[None, :]
        x = tl.load(row + j[None, :] * column_stride, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(
            basis + j[:, None] * basis_row_stride + c[None, :] * basis_column_stride,
            mask=(j < size)[:, None] & in_rank[None, :],
            other=0.0,
        )
        y = tl.dot(x, u, acc=y, input_precision=PRECISION)

    end = tl.full([1], 1.0, dtype=tl.float32)
    u_last = tl.zeros([RANK], dtype=tl.float32)
    if LAST != 0:
        end = tl.full([BLOCK_N], 1.0, dtype=tl.float32)
        if LAST == 2:
            end = tl.load(last + i * last_stride, mask=in_rows, other=0.0).to(tl.float32)
        bottom = basis + size * basis_row_stride
        u_last = tl.load(bottom + c * basis_column_stride, mask=in_rank, other=0.0)
        y += end[:, None] * u_last[None, :]

    core = tl.load(
        core_inverse + c[:, None] * core_row_stride + c[None, :] * core_column_stride,
        mask=in_rank[:, None] & in_rank[None, :],
        other=0.0,
    )
    t = tl.dot(y, core, input_precision=PRECISION)
    scale = 1.0 / tl.load(shift)

    for start in range(0, size, BLOCK_D):
        j = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask = in_rows[:, None] & (j < size)[None, :]
        x = tl.load(row + j[None, :] * column_stride, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(
            basis + j[:, None] * basis_row_stride + c[None, :] * basis_column_stride,
            mask=(j < size)[:, None] & in_rank[None, :],
            other=0.0,
        )
        x = tl.dot(t, tl.trans(u), acc=x * scale, input_precision=PRECISION)
        out = product + i[:, None] * size + j[None, :]
        tl.store(out, x.to(product.dtype.element_ty), mask=mask)
    if LAST != 0:
        end = end * scale + tl.sum(t * u_last[None, :], axis=1)
        tl.store(product_last + i, end.to(product_last.dtype.element_ty), mask=in_rows)


def _empty_products(
    rows: Tensor,
    last: Tensor | None,
    basis: Tensor,
    core_inverse: Tensor,
    shift: Tensor,
    ones: bool,
) -> tuple[Tensor, Tensor]:
    n, size = rows.shape
    dtype = rows.dtype if last is None else last.dtype
    extended = ones or last is not None
    return rows.new_empty(n, size), rows.new_empty(n if extended else 0, dtype=dtype)


@traceable(
    "precondition(Tensor rows, Tensor? last, Tensor basis, Tensor core_inverse, Tensor shift,"
    " bool ones) -> (Tensor, Tensor)",
    _empty_products,
)
def _precondition(
    rows: Tensor,
    last: Tensor | None,
    basis: Tensor,
    core_inverse: Tensor,
    shift: Tensor,
    ones: bool,
) -> tuple[Tensor, Tensor]:
    """[rows, last] P, where `last` [n] is a tensor, or ones, or absent, and the result's empty."""
    (n, size), rank = rows.shape, basis.shape[1]
    product, product_last = _empty_products(rows, last, basis, core_inverse, shift, ones)
    tile = row_tile(pad_rank(rank))
    launch(
        _precondition_kernel,
        (triton.cdiv(n, tile.rows),),
        rows.device,
        rows=rows,
        last=rows if last is None else last,
        basis=basis,
        core_inverse=core_inverse,
        shift=shift,
        product=product,
        product_last=product_last,
        n=n,
        size=size,
        rank=rank,
        row_stride=rows.stride(0),
        column_stride=rows.stride(1),
        last_stride=1 if last is None else last.stride(0),
        basis_row_stride=basis.stride(0),
        basis_column_stride=basis.stride(1),
        core_row_stride=core_inverse.stride(0),
        core_column_stride=core_inverse.stride(1),
        LAST=COLUMN if last is not None else ONES if ones else ABSENT,
        RANK=pad_rank(rank),
        BLOCK_N=tile.rows,
        BLOCK_D=tile.columns,
        PRECISION=product_precision(),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return product, product_last


def precondition_rows(
    rows: Tensor, inverse: Inverse, *, ones: bool
) -> tuple[Tensor, Tensor | None]:
    """See `gls_fused.reference.precondition_rows`.

    Numerics: accumulated in float32. A dense P, float64 statistics and ranks above 64 take the
        reference's ops.
    """
    if _is_reference(inverse):
        return reference.precondition_rows(rows, inverse, ones=ones)
    assert isinstance(inverse, SubspaceInverse)
    product, last = _precondition(rows, None, *inverse, ones)
    return product, last if ones else None


def precondition_gradient(
    weight_gradient: Tensor, bias_gradient: Tensor | None, inverse: Inverse
) -> tuple[Tensor, Tensor | None]:
    """See `gls_fused.reference.precondition_gradient`; numerics as `precondition_rows`."""
    if _is_reference(inverse):
        return reference.precondition_gradient(weight_gradient, bias_gradient, inverse)
    assert isinstance(inverse, SubspaceInverse)
    product, last = _precondition(weight_gradient, bias_gradient, *inverse, False)
    return product, None if bias_gradient is None else last


def _is_reference(inverse: Inverse) -> bool:
    if isinstance(inverse, DenseInverse):
        return True
    return needs_reference(inverse.basis.dtype, inverse.basis.shape[1], MAX_RANK)
