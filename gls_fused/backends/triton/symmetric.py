"""Orthogonal steps: both symmetric products of an iteration in a kernel of their own.

A = X X' and b A + c A A are symmetric, so a program computes a tile on or below the diagonal, and
writes it and its mirror image: half of the flops and of the loads. The last product, a X + R X, has
nothing to save and is torch's. All matrices of one shape share a launch: fifteen for five steps.

Operands are of `factor_dtype`, bfloat16 most often, and sums float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gls_fused.backends import factors
from gls_fused.backends.factors import factor_dtype, iterate, scale_to_norm, updates_by_shape
from gls_fused.backends.triton.configs import product_precision, symmetric_tile
from gls_fused.backends.triton.launch import launch


@triton.jit
def _symmetric_product_kernel(
    x,  # [matrices, s, b], contiguous
    out,  # [matrices, s, s], contiguous
    s,
    b,
    alpha,  # float32
    beta,  # float32
    ADDS: tl.constexpr,  # beta X is added, which is symmetric then
    BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Tiles of the lower triangle by rows: row i begins at i (i + 1) / 2.
    tile = tl.program_id(0)
    i = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    # Where the root was rounded across a whole number.
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    j = tile - i * (i + 1) // 2
    matrix = tl.program_id(1).to(tl.int64)
    x += matrix * s * b
    out += matrix * s * s
    rows = i.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns = j.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_B)
    left = x + rows[:, None] * b + k[None, :]
    right = x + columns[:, None] * b + k[None, :]
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, b, BLOCK_B):
        inside = (start + k < b)[None, :]
        one = tl.load(left + start, mask=(rows < s)[:, None] & inside, other=0.0)
        other = tl.load(right + start, mask=(columns < s)[:, None] & inside, other=0.0)
        total = tl.dot(one, tl.trans(other), total, input_precision=PRECISION)
    total *= alpha
    within = (rows < s)[:, None] & (columns < s)[None, :]
    if ADDS:
        given = tl.load(x + rows[:, None] * b + columns[None, :], mask=within, other=0.0)
        total += beta * given.to(tl.float32)
    found = total.to(out.dtype.element_ty)
    tl.store(out + rows[:, None] * s + columns[None, :], found, mask=within)
    if i > j:
        mirrored = out + columns[:, None] * s + rows[None, :]
        tl.store(mirrored, tl.trans(found), mask=(columns < s)[:, None] & (rows < s)[None, :])


def symmetric_product(x: Tensor, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """Alpha X X' of matrices [matrices, s, b]; with beta, plus beta X of symmetric ones.

    Returns:
        [matrices, s, s] in the dtype of x, summed in float32.
    Numerics: products of float32 matrices as `torch.get_float32_matmul_precision()` has them.
    """
    matrices, s, b = x.shape
    out = x.new_empty(matrices, s, s)
    tile = symmetric_tile(s, x.dtype)
    blocks = triton.cdiv(s, tile.rows)
    launch(
        _symmetric_product_kernel,
        (blocks * (blocks + 1) // 2, matrices),
        x.device,
        x=x.contiguous(),
        out=out,
        s=s,
        b=b,
        alpha=alpha,
        beta=beta,
        ADDS=beta != 0,
        BLOCK=tile.rows,
        BLOCK_B=tile.columns,
        PRECISION=product_precision(),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def orthogonal_updates(matrices: Sequence[Tensor], split: int = 1) -> list[Tensor]:
    """See `gls_fused.reference.orthogonal_updates`.

    Numerics: in the dtype of `factor_dtype`; float64 takes torch's products.
    """
    return updates_by_shape(matrices, split, _orthogonalize)


def _orthogonalize(x: Tensor, length: float) -> Tensor:
    """orth(X) times a length, of matrices [layers, s, b], s <= b."""
    dtype = factor_dtype(x)
    if dtype == torch.float64:
        return factors.orthogonalize(x, length)
    return iterate(scale_to_norm(x).to(dtype), length, symmetric_product).to(x.dtype)
