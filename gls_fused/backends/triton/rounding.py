"""Values rounded into parameters of 16 bits, up or down, all parameters of a dtype in one launch.

Bytes per parameter: 6.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from gls_fused.backends.triton.configs import UPDATE_BLOCK, UPDATE_WARPS
from gls_fused.backends.triton.launch import ELEMENTS, block_table, launch, upload
from gls_fused.backends.triton.update_kernels import _address

# Words of a parameter's line in the table.
LINE = 5


@triton.jit
def _mix(x):
    """The finalizer of MurmurHash3, of 32 bits."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _draw_uniform(seed, step, place):
    """See `gls_fused.reference.draw_uniform`."""
    key = _mix(_mix(seed + 0x9E3779B9 * step) + (place >> 32).to(tl.uint32))
    mixed = _mix(_mix(place.to(tl.uint32) ^ key) + key)
    # Of 24 bits, so that it is positive as a signed number, too.
    return (mixed >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _round_kernel(
    table,  # int64 [params, 5]: parameter, values, step (addresses), elements, seed
    blocks,  # int64 [programs, 2]: parameter, part of it
    PARAM: tl.constexpr,
    STEP: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    LINE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    line = table + tl.load(blocks + program * 2) * LINE
    param = _address(line, PARAM, ALIGNED)
    values = _address(line + 1, tl.float32, ALIGNED)
    step = tl.load(tl.load(line + 2).to(tl.pointer_type(STEP))).to(tl.int64).to(tl.uint32)
    count, seed = tl.load(line + 3), tl.load(line + 4).to(tl.uint32)
    if EVEN:
        # Then the mask is the same for every 16 elements, and accesses stay 16 bytes wide.
        count = tl.multiple_of(count, 16)
    at = tl.load(blocks + program * 2 + 1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(values + at, mask=at < count, other=0.0)
    size = tl.abs(x)
    nearest = x.to(PARAM)
    found = tl.abs(nearest.to(tl.float32))
    # Sign and magnitude: one less in the bits is the next number towards zero.
    bits = nearest.to(tl.int16, bitcast=True)
    inner = bits - (found > size).to(tl.int16)
    outer = inner + 1
    low = tl.abs(inner.to(PARAM, bitcast=True).to(tl.float32))
    high = tl.abs(outer.to(PARAM, bitcast=True).to(tl.float32))
    chosen = tl.where(_draw_uniform(seed, step, at) * (high - low) < size - low, outer, inner)
    # Not what rounds to infinity, nor NaN.
    chosen = tl.where(found < float("inf"), chosen, bits)
    tl.store(param + at, chosen.to(PARAM, bitcast=True), mask=at < count)


def round_params_(
    params: Sequence[Tensor],
    values: Sequence[Tensor],
    seeds: Sequence[int],
    steps: Sequence[Tensor],
) -> None:
    """See `gls_fused.reference.round_params_`."""
    groups: dict[tuple[torch.device, torch.dtype, torch.dtype], list[int]] = {}
    for index, (param, step) in enumerate(zip(params, steps, strict=True)):
        if param.numel():
            groups.setdefault((param.device, param.dtype, step.dtype), []).append(index)
    for (device, dtype, kind), mine in groups.items():
        written = [_dense(params[i]) for i in mine]
        laid = [
            values[i] if values[i].stride() == to.stride() else _laid_as(to, values[i])
            for i, to in zip(mine, written, strict=True)
        ]
        lines: list[int] = []
        for i, to, value in zip(mine, written, laid, strict=True):
            lines += [to.data_ptr(), value.data_ptr(), steps[i].data_ptr(), to.numel(), seeds[i]]
        counts = [triton.cdiv(to.numel(), UPDATE_BLOCK) for to in written]
        launch(
            _round_kernel,
            (sum(counts),),
            device,
            table=upload(lines, device),
            blocks=upload(counts, device, block_table),
            PARAM=ELEMENTS[dtype],
            STEP=ELEMENTS[kind],
            ALIGNED=all(tensor.data_ptr() % 16 == 0 for tensor in (*written, *laid)),
            EVEN=all(to.numel() % 16 == 0 for to in written),
            BLOCK=UPDATE_BLOCK,
            LINE=LINE,
            num_warps=UPDATE_WARPS,
        )
        for i, to in zip(mine, written, strict=True):
            if to is not params[i]:
                params[i].copy_(to)
    increment_version(list(params))


def _dense(param: Tensor) -> Tensor:
    """The parameter, or memory for one that has gaps."""
    laid = torch.empty_like(param, device="meta")
    return param if laid.stride() == param.stride() else torch.empty_like(param)


def _laid_as(like: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(like, dtype=torch.float32).copy_(values)
