"""C and lambda'^p from M and t, for all layers in one launch per padded rank.

A program holds a layer's M in registers, or above rank 64 in memory, its L1 or L2.

For p = 1 the inverse is made in place, in registers, by Gauss-Jordan without pivoting. For a
positive definite matrix its pivots are the squared diagonal of the Cholesky factor, so a pivot that
is not positive tells what `cholesky_ex` tells, and a factor beside its inverse would take twice the
registers.

Other powers are those of an inverse fourth root, which Newton's method finds by products alone, in
registers and in float64: lambda may be 32 units of rounding of M, where a product in M's float32
would move the smallest eigenvalue by percents. With c = tr(M + lambda I), which bounds those of
M + lambda I:

    B = (M + lambda I) / c,   X = I;   repeated:   T = (5 I - B) / 4,   X <- X T,   B <- T^4 B
    B -> I,   X -> ((M + lambda I) / c)^-1/4,   (M + lambda I)^-p = c^-p X^4p

An eigenvalue of B stays in (0, 1] and grows by up to (5/4)^4 = 2.44 at a time, near 1 its distance
is squared; one that is not positive moves away from 1. So whether B has come close to I tells what
the sign of the smallest eigenvalue of M + lambda I does, up to rounding.

Source: Iannazzo, 2006, "On the Newton method for the matrix pth root", the coupled iteration.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gls_fused import reference
from gls_fused.backends.triton.configs import (
    MAX_CORE_RANK,
    MAX_RANK,
    MAX_ROOT_RANK,
    SWEEP_ROWS,
    SWEEP_WARPS,
    core_warps,
    pad_rank,
    root_warps,
)
from gls_fused.backends.triton.launch import ELEMENTS, bits, launch, upload

# Words of a layer's line in the table.
LINE = 11


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
def _multiply(x, y):
    return tl.dot(x, y, out_dtype=tl.float64)


@triton.jit
def _power_of_inverse_root(b, NEAR: tl.constexpr, STEPS: tl.constexpr, QUARTERS: tl.constexpr):
    """b^(-QUARTERS / 4) of the symmetric tile b, float64, whose eigenvalues add up to 1 or less.

    Returns:
        The power, and whether STEPS have brought b so near to I, ||b - I||^2 <= NEAR, that another
        one leaves a distance below NEAR.
    """
    RANK: tl.constexpr = b.shape[0]
    i, j = tl.arange(0, RANK)[:, None], tl.arange(0, RANK)[None, :]
    eye = tl.where(i == j, 1.0, 0.0).to(tl.float64)
    root, taken = eye, 0
    distance = tl.sum((b - eye) * (b - eye))
    # Eigenvalues in (0, 1] are nearer to 1 than RANK in all. A NaN ends it too.
    while (taken < STEPS) & (distance > NEAR) & (distance < RANK):
        t = 1.25 * eye - 0.25 * b
        root = _multiply(root, t)
        t = _multiply(t, t)
        b = _multiply(_multiply(t, t), b)
        b = (b + tl.trans(b)) * 0.5
        distance = tl.sum((b - eye) * (b - eye))
        taken += 1
    root = _multiply(root, 1.25 * eye - 0.25 * b)
    root = (root + tl.trans(root)) * 0.5
    power = root
    for _ in tl.static_range(1, QUARTERS):
        power = _multiply(power, root)
    return power, distance <= NEAR


@triton.jit
def _power(x, QUARTERS: tl.constexpr):
    """x^(QUARTERS / 4), which is NaN for a negative x."""
    if QUARTERS == 4:
        return x
    root = tl.sqrt(x)
    if QUARTERS == 2:
        return root
    fourth = tl.sqrt(root)
    return fourth if QUARTERS == 1 else root * fourth


@triton.jit
def damp_core(trace, core_trace, dim, rank, rows, damping, QUARTERS: tl.constexpr):
    """Lambda and lambda'^p, of Sigma that stands for so many rows."""
    share = damping.to(trace.dtype) / tl.minimum(dim.to(trace.dtype), rows)
    # 32 units of rounding.
    LEAST: tl.constexpr = 2.0**-47 if trace.dtype == tl.float64 else 2.0**-18
    damp = trace * tl.maximum(share, LEAST)
    rest = trace - core_trace
    # As clamp does, a NaN stays one.
    rest = tl.where(rest < 0.0, 0.0, rest)
    others = tl.maximum(dim - rank, 1).to(trace.dtype)
    return damp, _power(damp + tl.where(dim > rank, rest / others, 0.0), QUARTERS)


@triton.jit
def _dampings(line, core_trace, trace, rank, QUARTERS: tl.constexpr):
    """`damp_core` of a line of the table."""
    dim = tl.load(line + 5)
    rows = dim.to(trace.dtype)
    samples = tl.load(line + 10)
    # No address: no fewer than dim.
    known = samples != 0
    samples = tl.load(samples.to(tl.pointer_type(trace.dtype)), mask=known, other=0.0)
    rows = tl.where(known, samples, rows)
    damping = tl.load(line + 6).to(tl.float64, bitcast=True)
    return damp_core(trace, core_trace, dim, rank, rows, damping, QUARTERS)


@triton.jit
def _finish(inverse, eye, fine, damp, shift, core_trace, rank, QUARTERS: tl.constexpr):
    """C from (M + lambda I)^-p."""
    fallback = eye / _power(damp + core_trace / rank.to(damp.dtype), QUARTERS)
    return tl.where(fine, inverse, fallback) - eye / shift


@triton.jit
def invert_core_tile(
    m, core_trace, damp, shift, rank,
    QUARTERS: tl.constexpr, NEAR: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """C of the tile m, which holds M [rank, rank] and is zero beyond."""
    RANK: tl.constexpr = m.shape[0]
    i, j = tl.arange(0, RANK)[:, None], tl.arange(0, RANK)[None, :]
    inside = (i < rank) & (j < rank)
    eye = tl.where(i == j, 1.0, 0.0).to(m.dtype)
    if QUARTERS == 4:
        inverse, fine = invert_tile(m / damp + eye, damp * 0.0, rank, RANK)
        inverse = inverse / damp
    else:
        wide = m.to(tl.float64)
        bound = tl.sum(tl.where(i == j, wide, 0.0)) + rank * damp.to(tl.float64)
        wide = ((wide + tl.trans(wide)) * 0.5 + eye * damp.to(tl.float64)) / bound
        # The rest of the tile has converged.
        wide = tl.where(inside, wide, eye.to(tl.float64))
        inverse, fine = _power_of_inverse_root(wide, NEAR, STEPS, QUARTERS)
        # NaN, as the fallback, for a negative multiple of what is positive definite.
        inverse = (inverse / _power(bound, QUARTERS)).to(m.dtype)
    return _finish(inverse, eye, fine, damp, shift, core_trace, rank, QUARTERS)


@triton.jit
def _invert_core_kernel(
    # int64 [layers, 11]: M, t, C, lambda'^p (addresses), r, d, damping, strides of M, row, s
    table,
    DTYPE: tl.constexpr,
    RANK: tl.constexpr,
    QUARTERS: tl.constexpr,  # 4 p
    NEAR: tl.constexpr,
    STEPS: tl.constexpr,
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
    damp, shift = _dampings(line, core_trace, trace, rank, QUARTERS)
    inverse = invert_core_tile(m, core_trace, damp, shift, rank, QUARTERS, NEAR, STEPS)
    tl.store(core_inverse + i * rank + j, inverse, mask=inside)
    tl.store(tl.load(line + 3).to(tl.pointer_type(DTYPE)), shift)


@triton.jit
def _sweep_core_kernel(
    table,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    LINE: tl.constexpr,
):
    """The same in memory for float32 and p = 1: each pivot is swept through C, ROWS rows at a time.

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
    damp, shift = _dampings(line, core_trace, trace, rank, 4)
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
        inverse = -tl.load(at, mask=inside, other=0.0) / damp
        inverse = _finish(inverse, eye, fine, damp, shift, core_trace, rank, 4)
        tl.store(at, inverse, mask=inside)


def invert_cores(
    cores: Sequence[Tensor],
    traces: Sequence[Tensor],
    dims: Sequence[int],
    damping: float,
    power: float = 1,
    samples: Sequence[Tensor] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """See `gls_fused.reference.invert_cores`: one launch for those of one dtype and padded rank.

    Numerics: for p = 1 in the dtype of M, ranks to 64, in float32 to 128; for other p in float64,
        ranks to 32. Larger ones take the reference's ops.
    """
    results: list[tuple[Tensor, Tensor]] = []
    tables: dict[tuple[torch.device, torch.dtype, int], list[int]] = {}
    # Tables know addresses only, so their tensors are kept until all is launched.
    kept: list[Tensor] = []
    counts: Sequence[Tensor | None] = samples or [None] * len(cores)
    for core, trace, dim, rows in zip(cores, traces, dims, counts, strict=True):
        rank, dtype = len(core), core.dtype
        widest = MAX_RANK if dtype == torch.float64 else MAX_CORE_RANK
        if rank > (widest if power == 1 else MAX_ROOT_RANK):
            results.append(reference.invert_core(core, trace, dim, damping, power, rows))
            continue
        core_inverse, shift = core.new_empty(rank, rank), core.new_empty(())
        line = [core.data_ptr(), trace.data_ptr(), core_inverse.data_ptr(), shift.data_ptr()]
        line += [rank, dim, bits(damping), core.stride(0), core.stride(1)]
        aside = core.new_empty(rank if rank > MAX_RANK else 0)
        kept.append(aside)
        line += [aside.data_ptr(), 0 if rows is None else rows.data_ptr()]
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
            QUARTERS=round(4 * power),
            NEAR=torch.finfo(dtype).eps,
            STEPS=root_steps(dtype),
            num_warps=core_warps(padded, dtype) if power == 1 else root_warps(padded),
            **shared,
        )
    return results


def invert_core(
    core: Tensor,
    trace: Tensor,
    dim: int,
    damping: float,
    power: float = 1,
    samples: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `gls_fused.reference.invert_core`; numerics as `invert_cores`."""
    rows = None if samples is None else [samples]
    (result,) = invert_cores([core], [trace], [dim], damping, power, rows)
    return result


@functools.cache
def root_steps(dtype: torch.dtype) -> int:
    """Steps of Newton's method that bring every eigenvalue of B that damping admits near 1.

    Lambda is at least 32 units of rounding of t, so an eigenvalue of B at least 32, less what
    rounding takes from it, of 1; this counts from a single one.
    """
    unit: float = torch.finfo(dtype).eps
    value, steps = unit, 0
    while 1 - value > math.sqrt(unit):
        value *= ((5 - value) / 4) ** 4
        steps += 1
    # The distance is that of all eigenvalues together.
    return steps + 1
