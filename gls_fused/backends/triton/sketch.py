"""Y'Y, A'Y and ||A||_F^2 of a step's rows, the same to the last bit each time: no float atomics.

    _project_rows_kernel   Y = A U, and per block of rows its part of Y'Y, of 1'Y and of ||A||_F^2
    _sketch_kernel         A'Y, a block of A's columns to a program, per part of the rows
    _sum_parts_kernel      the parts, added in order

Y is kept, n r numbers where A has n d, so A is read twice: 8 n d bytes in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gls_fused import reference
from gls_fused.backends.triton.configs import (
    CURVATURE_PRECISION,
    MAX_RANK,
    pad_rank,
    row_tile,
    sketch_splits,
    sketch_tile,
)
from gls_fused.backends.triton.launch import launch, needs_reference, traceable

# Parts and elements that one program of the last stage adds at a time.
SUM_PARTS, SUM_WIDTH = 16, 64


@triton.jit
def _project_rows_kernel(
    rows,  # [n, size]
    basis,  # [size (+ 1), rank]
    projections,  # [n, RANK]
    heads,  # [blocks, RANK RANK + RANK + 16]: parts of Y'Y, 1'Y and, once, ||A||_F^2
    n,
    size,
    rank,
    row_stride,
    column_stride,
    basis_row_stride,
    basis_column_stride,
    ONES: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    i = block * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, RANK)
    in_rows, in_rank = i < n, c < rank
    row = rows + i[:, None] * row_stride
    y = tl.zeros([BLOCK_N, RANK], dtype=tl.float32)
    squares = tl.zeros([BLOCK_N], dtype=tl.float32)
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
        squares += tl.sum(x * x, axis=1)
    if ONES:
        bottom = basis + size * basis_row_stride
        u_last = tl.load(bottom + c * basis_column_stride, mask=in_rank, other=0.0)
        y = tl.where(in_rows[:, None], y + u_last[None, :], 0.0)
        squares = tl.where(in_rows, squares + 1.0, 0.0)
    tl.store(projections + i[:, None] * RANK + c[None, :], y, mask=in_rows[:, None])

    head = heads + block * (RANK * RANK + RANK + 16)
    gram = tl.dot(tl.trans(y), y, input_precision=PRECISION)
    tl.store(head + c[:, None] * RANK + c[None, :], gram)
    tl.store(head + RANK * RANK + c, tl.sum(y, axis=0))
    # 16 words, so that every block's part begins at 16 bytes; the sum is in the first of them.
    lane = tl.arange(0, 16)
    tl.store(head + RANK * RANK + RANK + lane, tl.where(lane == 0, tl.sum(squares, axis=0), 0.0))


@triton.jit
def _sketch_kernel(
    rows,  # [n, size]
    projections,  # [n, RANK]
    parts,  # [splits, size, rank]
    n,
    size,
    rank,
    rows_per_split,
    row_stride,
    column_stride,
    RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    j = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, RANK)
    first = split * rows_per_split
    end = tl.minimum(first + rows_per_split, n)
    z = tl.zeros([BLOCK_D, RANK], dtype=tl.float32)
    for start in range(first, end, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        in_rows = i < end
        x = tl.load(
            rows + i[:, None] * row_stride + j[None, :] * column_stride,
            mask=in_rows[:, None] & (j < size)[None, :],
            other=0.0,
        ).to(tl.float32)
        y = tl.load(projections + i[:, None] * RANK + c[None, :], mask=in_rows[:, None], other=0.0)
        z = tl.dot(tl.trans(x), y, acc=z, input_precision=PRECISION)
    out = parts + (split * size + j[:, None]) * rank + c[None, :]
    tl.store(out, z, mask=(j < size)[:, None] & (c < rank)[None, :])


@triton.jit
def _sum_parts_kernel(
    parts,  # [count, width]
    total,  # [width]
    count,
    width,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    j = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    found = tl.zeros([PARTS, WIDTH], dtype=tl.float32)
    for start in range(0, count, PARTS):
        i = (start + tl.arange(0, PARTS)).to(tl.int64)
        mask = (i < count)[:, None] & (j < width)[None, :]
        found += tl.load(parts + i[:, None] * width + j[None, :], mask=mask, other=0.0)
    tl.store(total + j, tl.sum(found, axis=0), mask=j < width)


def launch_sum_parts(parts: Tensor, total: Tensor) -> None:
    """Total [width] = the sum over the first dimension of parts [count, ...], in order."""
    width = total.numel()
    launch(
        _sum_parts_kernel,
        (triton.cdiv(width, SUM_WIDTH),),
        parts.device,
        parts=parts,
        total=total,
        count=len(parts),
        width=width,
        PARTS=SUM_PARTS,
        WIDTH=SUM_WIDTH,
    )


def sketch_rows(rows: Tensor, basis: Tensor, *, ones: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See `gls_fused.reference.sketch_rows`.

    Numerics: float32 throughout, with "ieee" products; the same bits for the same shapes. A basis
        in float64 and ranks above 64 take the reference's ops.
    """
    if needs_reference(basis.dtype, basis.shape[1], MAX_RANK):
        return reference.sketch_rows(rows, basis, ones=ones)
    core, sketch, trace = _sketch(rows, basis, ones)
    return core, sketch, trace


def _empty_sketch(rows: Tensor, basis: Tensor, ones: bool) -> tuple[Tensor, Tensor, Tensor]:
    dim, rank = basis.shape
    return basis.new_empty(rank, rank), basis.new_empty(dim, rank), basis.new_empty(())


@traceable(
    "sketch_rows(Tensor rows, Tensor basis, bool ones) -> (Tensor, Tensor, Tensor)", _empty_sketch
)
def _sketch(rows: Tensor, basis: Tensor, ones: bool) -> tuple[Tensor, Tensor, Tensor]:
    (n, size), (dim, rank) = rows.shape, basis.shape
    if n == 0:
        return basis.new_zeros(rank, rank), basis.new_zeros(dim, rank), basis.new_zeros(())
    padded = pad_rank(rank)
    tile, cross = row_tile(padded), sketch_tile()
    blocks, splits = triton.cdiv(n, tile.rows), sketch_splits(n)
    shapes = {
        "n": n,
        "size": size,
        "rank": rank,
        "row_stride": rows.stride(0),
        "column_stride": rows.stride(1),
        "RANK": padded,
        "PRECISION": CURVATURE_PRECISION,
    }

    projections = basis.new_empty(n, padded)
    heads = basis.new_empty(blocks, padded * padded + padded + 16)
    launch(
        _project_rows_kernel,
        (blocks,),
        rows.device,
        rows=rows,
        basis=basis,
        projections=projections,
        heads=heads,
        basis_row_stride=basis.stride(0),
        basis_column_stride=basis.stride(1),
        ONES=ones,
        BLOCK_N=tile.rows,
        BLOCK_D=tile.columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **shapes,
    )
    head = basis.new_empty(heads.shape[1])
    launch_sum_parts(heads, head)

    sketch = basis.new_empty(dim, rank)
    parts = sketch[None, :size] if splits == 1 else basis.new_empty(splits, size, rank)
    launch(
        _sketch_kernel,
        (triton.cdiv(size, cross.columns), splits),
        rows.device,
        rows=rows,
        projections=projections,
        parts=parts,
        rows_per_split=triton.cdiv(n, splits),
        BLOCK_N=cross.rows,
        BLOCK_D=cross.columns,
        num_warps=cross.warps,
        num_stages=cross.stages,
        **shapes,
    )
    if splits > 1:
        launch_sum_parts(parts, sketch[:size])
    square = padded * padded
    if ones:
        sketch[size].copy_(head[square : square + rank])
    core = head[:square].view(padded, padded)[:rank, :rank].contiguous()
    return core, sketch, head[square + padded].clone()
