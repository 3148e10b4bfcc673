"""C and lambda' from M and t, for all layers in one launch per padded rank.

A program holds a layer's M in registers, or above rank 64 in memory, its L1 or L2.

The inverse is made in place, in registers, by Gauss-Jordan without pivoting. For a positive
definite matrix its pivots are the squared diagonal of the Cholesky factor, so a pivot that is not
positive tells what `cholesky_ex` tells, and half the registers of a factor beside its inverse do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gls_fused import reference
from gls_fused.backends.triton.configs import (
    MAX_CORE_RANK,
    MAX_RANK,
    SWEEP_ROWS,
    SWEEP_WARPS,
    core_warps,
    pad_rank,
)
from gls_fused.backends.triton.launch import ELEMENTS, bits, launch, upload

# Words of a layer's line in the table.
LINE = 10


@triton.jit
def invert_tile(x, floor, count, RANK: tl.constexpr):
    """The inverse of the positive definite tile x [RANK, RANK], by its first `count` pivots.

    Returns:
        The inverse, and whether all pivots were above `floor` and finite.
    """
    i, j = tl.arange(0, RANK)[:, None], tl.arange(0, RANK)[None, :]
    fine = floor == floor
    for k in range(count):
        row = tl.sum(tl.where(i == k, x, 0.0), axis=0)[None, :]
        column = tl.sum(tl.where(j == k, x, 0.0), axis=1)[:, None]
        pivot = tl.sum(tl.where((i == k) & (j == k), x, 0.0))
        # Also false for a NaN, and for an infinity.
        fine = fine & (pivot > floor) & (pivot - pivot == 0)
        row = row / pivot
        x = tl.where(i == k, row, x - column * row)
        x = tl.where(j == k, tl.where(i == k, 1.0 / pivot, -column / pivot), x)
    return x, fine


@triton.jit
def _dampings(line, core_trace, trace, rank):
    """Lambda and lambda'."""
    dim = tl.load(line + 5)
    damp = trace.to(tl.float64) * tl.load(line + 6).to(tl.float64, bitcast=True)
    damp = damp.to(trace.dtype)
    rest = trace - core_trace
    # As clamp does, a NaN stays one.
    rest = tl.where(rest < 0.0, 0.0, rest)
    others = tl.maximum(dim - rank, 1).to(trace.dtype)
    return damp, damp + tl.where(dim > rank, rest / others, 0.0)


@triton.jit
def _finish(inverse, eye, fine, damp, shift, core_trace, rank):
    """C from the inverse of M / lambda + I."""
    fallback = eye / (damp + core_trace / rank.to(damp.dtype))
    return tl.where(fine, inverse / damp, fallback) - eye / shift


@triton.jit
def _invert_core_kernel(
    table,  # int64 [layers, 10]: M, t, C, lambda' (addresses), r, d, lambda / t, strides of M, row
    DTYPE: tl.constexpr,
    RANK: tl.constexpr,
    LINE: tl.constexpr,
):
    line = table + tl.program_id(0) * LINE
    core = tl.load(line).to(tl.pointer_type(DTYPE))
    trace = tl.load(tl.load(line + 1).to(tl.pointer_type(DTYPE)))
    core_inverse = tl.load(line + 2).to(tl.pointer_type(DTYPE))
    rank = tl.load(line + 4).to(tl.int32)
    i, j = tl.arange(0, RANK)[:, None], tl.arange(0, RANK)[None, :]
    inside = (i < rank) & (j < rank)
    m = tl.load(core + i * tl.load(line + 7) + j * tl.load(line + 8), mask=inside, other=0.0)
    core_trace = tl.sum(tl.where(i == j, m, 0.0))
    damp, shift = _dampings(line, core_trace, trace, rank)
    eye = tl.where(i == j, 1.0, 0.0).to(DTYPE)
    inverse, fine = invert_tile(m / damp + eye, damp * 0.0, rank, RANK)
    inverse = _finish(inverse, eye, fine, damp, shift, core_trace, rank)
    tl.store(core_inverse + i * rank + j, inverse, mask=inside)
    tl.store(tl.load(line + 3).to(tl.pointer_type(DTYPE)), shift)


@triton.jit
def _sweep_core_kernel(
    table,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    LINE: tl.constexpr,
):
    """The same in memory, float32: each pivot is swept through C, ROWS of its rows at a time.

    A sweep keeps the matrix symmetric, so the pivot's row, which is set aside first, is its column.
    """
    line = table + tl.program_id(0) * LINE
    core = tl.load(line).to(tl.pointer_type(tl.float32))
    trace = tl.load(tl.load(line + 1).to(tl.pointer_type(tl.float32)))
    out = tl.load(line + 2).to(tl.pointer_type(tl.float32))
    aside = tl.load(line + 9).to(tl.pointer_type(tl.float32))
    rank = tl.load(line + 4).to(tl.int32)
    down, across = tl.load(line + 7), tl.load(line + 8)
    j = tl.arange(0, RANK)
    core_trace = tl.sum(tl.load(core + j * (down + across), mask=j < rank, other=0.0), axis=0)
    damp, shift = _dampings(line, core_trace, trace, rank)
    tl.store(tl.load(line + 3).to(tl.pointer_type(tl.float32)), shift)

    for first in range(0, rank, ROWS):
        i = first + tl.arange(0, ROWS)
        inside = (i < rank)[:, None] & (j < rank)[None, :]
        eye = tl.where(i[:, None] == j[None, :], 1.0, 0.0)
        m = tl.load(core + i[:, None] * down + j[None, :] * across, mask=inside, other=0.0)
        tl.store(out + i[:, None] * rank + j[None, :], m / damp + eye, mask=inside)
    fine = damp == damp
    for k in range(rank):
        # What one thread wrote others read: all have to be there.
        tl.debug_barrier()
        pivot = tl.load(out + k * rank + k)
        row = tl.load(out + k * rank + j, mask=j < rank, other=0.0)
        tl.store(aside + j, row, mask=j < rank)
        tl.debug_barrier()
        fine = fine & (pivot > 0.0) & (pivot - pivot == 0)
        row = row / pivot
        for first in range(0, rank, ROWS):
            i = first + tl.arange(0, ROWS)
            inside = (i < rank)[:, None] & (j < rank)[None, :]
            at = out + i[:, None] * rank + j[None, :]
            column = tl.load(aside + i, mask=i < rank, other=0.0)
            x = tl.load(at, mask=inside, other=0.0) - column[:, None] * row[None, :]
            x = tl.where((j == k)[None, :], (column / pivot)[:, None], x)
            edge = tl.where(j == k, -1.0 / pivot, row)
            x = tl.where((i == k)[:, None], edge[None, :], x)
            tl.store(at, x, mask=inside)
    tl.debug_barrier()
    for first in range(0, rank, ROWS):
        i = first + tl.arange(0, ROWS)
        inside = (i < rank)[:, None] & (j < rank)[None, :]
        eye = tl.where(i[:, None] == j[None, :], 1.0, 0.0)
        at = out + i[:, None] * rank + j[None, :]
        # The sweeps leave the inverse's negative.
        inverse = -tl.load(at, mask=inside, other=0.0)
        inverse = _finish(inverse, eye, fine, damp, shift, core_trace, rank)
        tl.store(at, inverse, mask=inside)


def invert_cores(
    cores: Sequence[Tensor], traces: Sequence[Tensor], dims: Sequence[int], damping: float
) -> list[tuple[Tensor, Tensor]]:
    """See `gls_fused.reference.invert_cores`: one launch for those of one dtype and padded rank."""
    results: list[tuple[Tensor, Tensor]] = []
    tables: dict[tuple[torch.device, torch.dtype, int], list[int]] = {}
    # Tables know addresses only, so their tensors are kept until all is launched.
    kept: list[Tensor] = []
    for core, trace, dim in zip(cores, traces, dims, strict=True):
        rank, dtype = len(core), core.dtype
        if rank > (MAX_RANK if dtype == torch.float64 else MAX_CORE_RANK):
            results.append(reference.invert_core(core, trace, dim, damping))
            continue
        core_inverse, shift = core.new_empty(rank, rank), core.new_empty(())
        share = max(damping / dim, 32 * torch.finfo(dtype).eps)
        line = [core.data_ptr(), trace.data_ptr(), core_inverse.data_ptr(), shift.data_ptr()]
        line += [rank, dim, bits(share), core.stride(0), core.stride(1)]
        aside = core.new_empty(rank if rank > MAX_RANK else 0)
        kept.append(aside)
        line.append(aside.data_ptr())
        tables.setdefault((core.device, dtype, pad_rank(rank)), []).extend(line)
        results.append((core_inverse, shift))
    for (device, dtype, padded), lines in tables.items():
        shared = {"table": upload(lines, device), "LINE": LINE}
        if padded > MAX_RANK:
            launch(
                _sweep_core_kernel,
                (len(lines) // LINE,),
                device,
                RANK=padded,
                ROWS=SWEEP_ROWS,
                num_warps=SWEEP_WARPS,
                **shared,
            )
            continue
        launch(
            _invert_core_kernel,
            (len(lines) // LINE,),
            device,
            DTYPE=ELEMENTS[dtype],
            RANK=padded,
            num_warps=core_warps(padded, dtype),
            **shared,
        )
    return results


def invert_core(core: Tensor, trace: Tensor, dim: int, damping: float) -> tuple[Tensor, Tensor]:
    """See `gls_fused.reference.invert_core`; float32 to rank 128, float64 to 64.

    Larger ranks take the reference's ops.
    """
    (result,) = invert_cores([core], [trace], [dim], damping)
    return result
