"""The sums over a layer's rows, the same to the last bit each time: no float atomics.

    _project_rows_kernel   Y = A U, and per block of rows its part of Y'Y, of 1'Y and of ||A||_F^2
    _sum_rows_kernel       A'Y, a block of A's columns to a program, per part of the rows; then all
                           parts, added in order, and what there is already

Y is kept, n r numbers where A has n d, so A is read twice: 8 n d bytes in float32. Rows are those
of a matrix or patches of images, or a sample of them, see `sample.py`. The last of the programs of
a block of columns adds what the others have left.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gls_fused import reference
from gls_fused.backends.triton.configs import (
    CURVATURE_PRECISION,
    MAX_RANK,
    pad_rank,
    row_blocks,
    row_tile,
    sketch_splits,
    sketch_tile,
)
from gls_fused.backends.triton.launch import launch, needs_reference, traceable, upload
from gls_fused.backends.triton.sample import (
    Geometry,
    _load_tile,
    _locate,
    geometry_of_images,
    geometry_of_rows,
)
from gls_fused.reference import Window, split_sums

# Parts of Y'Y and elements of it that one program adds at a time.
SUM_PARTS, SUM_WIDTH = 16, 64
# Parts of ||A||_F^2 that are added at a time.
TRACE_PARTS = tl.constexpr(256)
# Beyond it a sum of squares has overflown, or is about to.
MOST = tl.constexpr(torch.finfo(torch.float32).max / 4)


@triton.jit
def _project_rows_kernel(
    rows,
    basis,  # [size (+ 1), rank]
    projections,  # [n, RANK]
    heads,  # [programs, RANK RANK + RANK + 16]: parts of Y'Y, 1'Y and, once, ||A||_F^2
    counters,  # [columns]: set to 0 for what follows
    draw,
    window,
    n,
    size,
    rank,
    total,
    taken,
    row_stride,
    column_stride,
    basis_row_stride,
    basis_column_stride,
    columns,
    blocks_each,
    ONES: tl.constexpr,
    SAMPLED: tl.constexpr,
    DRAWN: tl.constexpr,
    IMAGES: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    if program == 0:
        for start in range(0, columns, BLOCK_D):
            k = start + tl.arange(0, BLOCK_D)
            tl.store(counters + k, tl.zeros([BLOCK_D], dtype=tl.int32), mask=k < columns)
    c = tl.arange(0, RANK)
    in_rank = c < rank
    u_last = tl.zeros([RANK], dtype=tl.float32)
    if ONES:
        bottom = basis + size * basis_row_stride
        u_last = tl.load(bottom + c * basis_column_stride, mask=in_rank, other=0.0)
    gram = tl.zeros([RANK, RANK], dtype=tl.float32)
    ones = tl.zeros([RANK], dtype=tl.float32)
    trace = tl.zeros([BLOCK_N], dtype=tl.float32)
    for block in range(blocks_each):
        i = (program * blocks_each + block) * BLOCK_N + tl.arange(0, BLOCK_N)
        in_rows = i < n
        where = _locate(i, total, taken, draw, row_stride, window, SAMPLED, DRAWN, IMAGES)
        y = tl.zeros([BLOCK_N, RANK], dtype=tl.float32)
        squares = tl.zeros([BLOCK_N], dtype=tl.float32)
        for start in range(0, size, BLOCK_D):
            j = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
            mask = in_rows[:, None] & (j < size)[None, :]
            x = _load_tile(rows, where, j, mask, column_stride, window, IMAGES)
            u = tl.load(
                basis + j[:, None] * basis_row_stride + c[None, :] * basis_column_stride,
                mask=(j < size)[:, None] & in_rank[None, :],
                other=0.0,
            )
            y = tl.dot(x, u, acc=y, input_precision=PRECISION)
            squares += tl.sum(x * x, axis=1)
        if ONES:
            y = tl.where(in_rows[:, None], y + u_last[None, :], 0.0)
            squares = tl.where(in_rows, squares + 1.0, 0.0)
        tl.store(projections + i[:, None] * RANK + c[None, :], y, mask=in_rows[:, None])
        gram = tl.dot(tl.trans(y), y, acc=gram, input_precision=PRECISION)
        ones += tl.sum(y, axis=0)
        trace += squares

    head = heads + program * (RANK * RANK + RANK + 16)
    tl.store(head + c[:, None] * RANK + c[None, :], gram)
    tl.store(head + RANK * RANK + c, ones)
    # 16 words, so that every program's part begins at 16 bytes; the sum is in the first of them.
    lane = tl.arange(0, 16)
    tl.store(head + RANK * RANK + RANK + lane, tl.where(lane == 0, tl.sum(trace, axis=0), 0.0))


@triton.jit
def _sum_squares(heads, count, width):
    """||A||_F^2, which ends each part."""
    trace = tl.zeros([TRACE_PARTS], dtype=tl.float32)
    for start in range(0, count, TRACE_PARTS):
        i = (start + tl.arange(0, TRACE_PARTS)).to(tl.int64)
        trace += tl.load(heads + i * width + width - 16, mask=i < count, other=0.0)
    return tl.sum(trace, axis=0)


@triton.jit
def _store_sums(sums, earlier, at, value, mask, squares, weight,
                GUARDS: tl.constexpr, ADDS: tl.constexpr):  # fmt: skip
    """A value over rows, each of which stands for so many, to its place in the sums."""
    value *= weight
    if GUARDS:
        # The trace tells: as U is orthonormal, no entry of the moments is larger.
        value = tl.where((squares > 0.0) & (squares < MOST), value, 0.0)
    if ADDS:
        value += tl.load(earlier + at, mask=mask, other=0.0)
    tl.store(sums + at, value, mask=mask)


@triton.jit
def _sum_rows_kernel(
    rows,
    projections,  # [n, RANK]
    parts,  # [splits, size, RANK], where there are several
    heads,
    counters,
    earlier,  # as `sums`, added where ADDS
    sums,  # [2 + r r + r d]: n, ||A||_F^2, Y'Y, and A'Y by columns
    draw,
    window,
    n,
    size,
    rank,
    total,
    taken,
    row_stride,
    column_stride,
    columns,
    rows_per_split,
    head_count,
    weight,
    ONES: tl.constexpr,
    SAMPLED: tl.constexpr,
    DRAWN: tl.constexpr,
    IMAGES: tl.constexpr,
    SPLIT: tl.constexpr,
    GUARDS: tl.constexpr,
    ADDS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block of columns of A'Y; the programs beyond those add up blocks of Y'Y and 1'Y."""
    column, split = tl.program_id(0), tl.program_id(1)
    width = RANK * RANK + RANK + 16
    dim = tl.cast(size, tl.int64) + ONES
    sketch = 2 + rank * rank
    if column < columns:
        c = tl.arange(0, RANK)
        j = column.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
        first = split.to(tl.int64) * rows_per_split
        end = tl.minimum(first + rows_per_split, n)
        z = tl.zeros([BLOCK_D, RANK], dtype=tl.float32)
        for start in range(first, end, BLOCK_N):
            i = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
            in_rows = i < end
            where = _locate(i, total, taken, draw, row_stride, window, SAMPLED, DRAWN, IMAGES)
            mask = in_rows[:, None] & (j < size)[None, :]
            x = _load_tile(rows, where, j, mask, column_stride, window, IMAGES)
            at = projections + i[:, None] * RANK + c[None, :]
            y = tl.load(at, mask=in_rows[:, None], other=0.0)
            z = tl.dot(tl.trans(x), y, acc=z, input_precision=PRECISION)
        in_columns = (j < size)[:, None]
        at = sketch + c[None, :] * dim + j[:, None]
        mask = in_columns & (c < rank)[None, :]
        if SPLIT:
            each = tl.cast(size, tl.int64) * RANK
            own = parts + j[:, None] * RANK + c[None, :]
            tl.store(own + split * each, z, mask=in_columns)
            # The count is one thread's, who must not be ahead of the others.
            tl.debug_barrier()
            done = tl.atomic_add(counters + column, 1, sem="acq_rel", scope="gpu")
            if done == tl.num_programs(1) - 1:
                z = tl.zeros([BLOCK_D, RANK], dtype=tl.float32)
                for part in range(tl.num_programs(1)):
                    z += tl.load(own + part * each, mask=in_columns, other=0.0)
                squares = _sum_squares(heads, head_count, width)
                _store_sums(sums, earlier, at, z, mask, squares, weight, GUARDS, ADDS)
        else:
            squares = _sum_squares(heads, head_count, width)
            _store_sums(sums, earlier, at, z, mask, squares, weight, GUARDS, ADDS)
    elif split == 0:
        k = (column - columns) * WIDTH + tl.arange(0, WIDTH)
        found = tl.zeros([PARTS, WIDTH], dtype=tl.float32)
        for start in range(0, head_count, PARTS):
            i = (start + tl.arange(0, PARTS)).to(tl.int64)
            mask = (i < head_count)[:, None] & (k < RANK * RANK + RANK)[None, :]
            found += tl.load(heads + i[:, None] * width + k[None, :], mask=mask, other=0.0)
        squares = _sum_squares(heads, head_count, width)
        # Y'Y, and of 1'Y, which follows it, A'Y's last row.
        down, across = k // RANK, k % RANK
        last = (down == RANK) & ONES
        at = tl.where(last, sketch + across * dim + size, 2 + down * rank + across)
        mask = ((down < rank) | last) & (across < rank)
        found = tl.sum(found, axis=0)
        _store_sums(sums, earlier, at, found, mask, squares, weight, GUARDS, ADDS)
        if column == columns:
            lane = tl.arange(0, 2)
            pair = tl.where(lane == 0, tl.cast(n, tl.float32), squares)
            _store_sums(sums, earlier, lane, pair, lane < 2, squares, weight, GUARDS, ADDS)


def sketch_rows(rows: Tensor, basis: Tensor, *, ones: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See `gls_fused.reference.sketch_rows`.

    Numerics: float32 throughout, with "ieee" products; the same bits for the same shapes. A basis
        in float64 and ranks above 64 take the reference's ops.
    """
    if needs_reference(basis.dtype, basis.shape[1], MAX_RANK):
        return reference.sketch_rows(rows, basis, ones=ones)
    sums = _sum_rows(rows, basis, None, None, ones, len(rows), False)
    _, trace, core, sketch = split_sums(sums, *basis.shape)
    return core, sketch, trace


def sum_rows(
    rows: Tensor,
    basis: Tensor,
    earlier: Tensor | None,
    *,
    ones: bool,
    most: int,
    draw: Tensor | int,
) -> Tensor | None:
    """The sums of `gls_fused.curvature.estimate` over a sample of rows [n, k], with earlier ones.

    Args:
        basis: U [d, r].
        most, draw: see `gls_fused.capture.rows.take_sample`.
    Returns:
        A new tensor; None where there are no kernels, as in `sketch_rows`.
    """
    if needs_reference(basis.dtype, basis.shape[1], MAX_RANK):
        return None
    drawn = draw if isinstance(draw, Tensor) else None
    assert drawn is not None or draw == 0
    found: Tensor = _sum_rows(rows, basis, earlier, drawn, ones, most, True)
    return found


def sum_images(
    images: Tensor,
    basis: Tensor,
    earlier: Tensor | None,
    window: Window,
    *,
    groups: int,
    ones: bool,
    most: int,
    draw: Tensor | int,
) -> Tensor | None:
    """`sum_rows` over the rows that `gls_fused.reference.take_patches` would give.

    Args:
        images: [N, g c, h, w] or [N, g c, w].
    Returns:
        None also for other dimensions and transposed convolutions.
    """
    if needs_reference(basis.dtype, basis.shape[1], MAX_RANK):
        return None
    if images.ndim not in (3, 4) or window.output_padding is not None:
        return None
    drawn = draw if isinstance(draw, Tensor) else None
    assert drawn is not None or draw == 0
    found: Tensor = _sum_images(images, basis, earlier, drawn, ones, most, groups, *window[:4])
    return found


def _empty_sums(_inputs: Tensor, basis: Tensor, *_others: Any) -> Tensor:
    dim, rank = basis.shape
    return basis.new_empty(2 + rank * (rank + dim))


@traceable(
    "sum_rows(Tensor rows, Tensor basis, Tensor? earlier, Tensor? draw, bool ones, SymInt most,"
    " bool guards) -> Tensor",
    _empty_sums,
)
def _sum_rows(
    rows: Tensor,
    basis: Tensor,
    earlier: Tensor | None,
    draw: Tensor | None,
    ones: bool,
    most: int,
    guards: bool,
) -> Tensor:
    return _sum(rows, geometry_of_rows(rows, most), basis, earlier, draw, ones, guards)


@traceable(
    "sum_images(Tensor images, Tensor basis, Tensor? earlier, Tensor? draw, bool ones, int most,"
    " int groups, int[] kernel_size, int[] stride, int[] padding, int[] dilation) -> Tensor",
    _empty_sums,
)
def _sum_images(
    images: Tensor,
    basis: Tensor,
    earlier: Tensor | None,
    draw: Tensor | None,
    ones: bool,
    most: int,
    groups: int,
    *window: tuple[int, ...],
) -> Tensor:
    geometry = geometry_of_images(images, Window(*window), groups, most)
    return _sum(images, geometry, basis, earlier, draw, ones, True)


def _sum(
    inputs: Tensor,
    geometry: Geometry,
    basis: Tensor,
    earlier: Tensor | None,
    draw: Tensor | None,
    ones: bool,
    guards: bool,
) -> Tensor:
    rank, n, size = basis.shape[1], geometry.taken, geometry.size
    sums = _empty_sums(inputs, basis)
    if n == 0:
        return sums.zero_() if earlier is None else sums.copy_(earlier)
    padded = pad_rank(rank)
    tile, cross = row_tile(padded), sketch_tile()
    each, splits = row_blocks(n, tile.rows), sketch_splits(n)
    programs, columns = triton.cdiv(n, tile.rows * each), triton.cdiv(size, cross.columns)
    width = padded * padded + padded
    projections = basis.new_empty(n, padded)
    heads = basis.new_empty(programs, width + 16)
    counters = torch.empty(columns, dtype=torch.int32, device=basis.device)
    parts = basis.new_empty(splits if splits > 1 else 0, size, padded)
    shared: dict[str, Any] = {
        "rows": inputs,
        "projections": projections,
        "heads": heads,
        "counters": counters,
        "draw": inputs if draw is None else draw,
        "window": upload(geometry.window, inputs.device) if geometry.window else inputs,
        "n": n,
        "size": size,
        "rank": rank,
        "total": geometry.total,
        "taken": geometry.taken,
        "row_stride": geometry.row_stride,
        "column_stride": geometry.column_stride,
        "columns": columns,
        "ONES": ones,
        "SAMPLED": geometry.taken < geometry.total,
        "DRAWN": draw is not None,
        "IMAGES": bool(geometry.window),
        "RANK": padded,
        "PRECISION": CURVATURE_PRECISION,
    }
    launch(
        _project_rows_kernel,
        (programs,),
        inputs.device,
        basis=basis,
        basis_row_stride=basis.stride(0),
        basis_column_stride=basis.stride(1),
        blocks_each=each,
        BLOCK_N=tile.rows,
        BLOCK_D=tile.columns,
        num_warps=tile.warps,
        num_stages=1 if geometry.window else tile.stages,
        **shared,
    )
    launch(
        _sum_rows_kernel,
        (columns + triton.cdiv(width, SUM_WIDTH), splits),
        inputs.device,
        parts=parts,
        earlier=sums if earlier is None else earlier,
        sums=sums,
        rows_per_split=triton.cdiv(n, splits),
        head_count=programs,
        weight=geometry.weight,
        SPLIT=splits > 1,
        GUARDS=guards,
        ADDS=earlier is not None,
        BLOCK_N=cross.rows,
        BLOCK_D=cross.columns,
        PARTS=SUM_PARTS,
        WIDTH=SUM_WIDTH,
        num_warps=cross.warps,
        num_stages=1 if geometry.window else cross.stages,
        **shared,
    )
    return sums
