"""C and lambda' from M and t, for all layers in one launch: a program holds a layer's M.

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
from gls_fused.backends.triton.configs import MAX_RANK, core_warps, pad_rank
from gls_fused.backends.triton.launch import ELEMENTS, bits, launch, upload

# Words of a layer's line in the table.
LINE = 9


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
def _invert_core_kernel(
    table,  # int64 [layers, 9]: M, t, C, lambda' (addresses), r, d, lambda / t, strides of M
    DTYPE: tl.constexpr,
    RANK: tl.constexpr,
    LINE: tl.constexpr,
):
    line = table + tl.program_id(0) * LINE
    core = tl.load(line).to(tl.pointer_type(DTYPE))
    trace = tl.load(tl.load(line + 1).to(tl.pointer_type(DTYPE)))
    core_inverse = tl.load(line + 2).to(tl.pointer_type(DTYPE))
    shift_out = tl.load(line + 3).to(tl.pointer_type(DTYPE))
    rank, dim = tl.load(line + 4).to(tl.int32), tl.load(line + 5)
    share = tl.load(line + 6).to(tl.float64, bitcast=True)
    i, j = tl.arange(0, RANK)[:, None], tl.arange(0, RANK)[None, :]
    inside = (i < rank) & (j < rank)
    m = tl.load(core + i * tl.load(line + 7) + j * tl.load(line + 8), mask=inside, other=0.0)

    damp = (trace.to(tl.float64) * share).to(DTYPE)
    core_trace = tl.sum(tl.where(i == j, m, 0.0))
    rest = trace - core_trace
    # As clamp does, a NaN stays one.
    rest = tl.where(rest < 0.0, 0.0, rest)
    shift = damp + tl.where(dim > rank, rest / tl.maximum(dim - rank, 1).to(DTYPE), 0.0)

    eye = tl.where(i == j, 1.0, 0.0).to(DTYPE)
    inverse, fine = invert_tile(m / damp + eye, damp * 0.0, rank, RANK)
    fallback = eye / (damp + core_trace / rank.to(DTYPE))
    inverse = tl.where(fine, inverse / damp, fallback) - eye / shift
    tl.store(core_inverse + i * rank + j, inverse, mask=inside)
    tl.store(shift_out, shift)


def invert_cores(
    cores: Sequence[Tensor], traces: Sequence[Tensor], dims: Sequence[int], damping: float
) -> list[tuple[Tensor, Tensor]]:
    """See `gls_fused.reference.invert_cores`: one launch for those of one dtype and padded rank."""
    results: list[tuple[Tensor, Tensor]] = []
    tables: dict[tuple[torch.device, torch.dtype, int], list[int]] = {}
    for core, trace, dim in zip(cores, traces, dims, strict=True):
        rank, dtype = len(core), core.dtype
        if rank > MAX_RANK:
            results.append(reference.invert_core(core, trace, dim, damping))
            continue
        core_inverse, shift = core.new_empty(rank, rank), core.new_empty(())
        share = max(damping / dim, 32 * torch.finfo(dtype).eps)
        line = [core.data_ptr(), trace.data_ptr(), core_inverse.data_ptr(), shift.data_ptr()]
        line += [rank, dim, bits(share), core.stride(0), core.stride(1)]
        tables.setdefault((core.device, dtype, pad_rank(rank)), []).extend(line)
        results.append((core_inverse, shift))
    for (device, dtype, padded), lines in tables.items():
        launch(
            _invert_core_kernel,
            (len(lines) // LINE,),
            device,
            table=upload(lines, device),
            DTYPE=ELEMENTS[dtype],
            RANK=padded,
            LINE=LINE,
            num_warps=core_warps(padded, dtype),
        )
    return results


def invert_core(core: Tensor, trace: Tensor, dim: int, damping: float) -> tuple[Tensor, Tensor]:
    """See `gls_fused.reference.invert_core`; float32 and float64, ranks to 64.

    Larger ranks take the reference's ops.
    """
    (result,) = invert_cores([core], [trace], [dim], damping)
    return result
