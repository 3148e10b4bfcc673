"""Root mean squares of all weights, and how much their directions have grown, in one launch.

A program adds the squares of a block of a weight; the weight's last one adds what they left, in
order. One program adds the mean squares of a layer's directions, one for each output, so that
others than "adam" have few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from gls_fused import reference
from gls_fused.backends.triton.configs import UPDATE_BLOCK, UPDATE_WARPS
from gls_fused.backends.triton.counting import is_last
from gls_fused.backends.triton.launch import ELEMENTS, bits, block_table, launch, upload
from gls_fused.backends.triton.update_kernels import _address, _option
from gls_fused.reference import SLOW_BETA

# Words of a line in the table.
LINE = 7
# Blocks of a weight that one program adds.
BLOCKS_EACH = 4
# Mean squares that one program adds; more, one for each element of a weight, are torch's to add.
MOST_SQUARES = 1 << 16


@triton.jit
def _measure_kernel(
    # int64 [lines, 7], of a weight: weight, result (addresses), elements, programs, first of them,
    # how many are done, least (float64 bits). Of a layer's mean squares: these, growth (addresses),
    # elements, 0 for programs, slow average, step (addresses), nothing
    table,
    blocks,  # int64 [programs, 2]: line, part of it
    parts,  # float64 [programs]
    # float64 bits [5]: log(beta2), log(SLOW_BETA), 1 - SLOW_BETA^every, most, tiny
    options,
    skip,
    SKIPS: tl.constexpr,
    DTYPE: tl.constexpr,  # of the weights
    RESULT: tl.constexpr,  # of what is measured, and of the mean squares
    STEP: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS_EACH: tl.constexpr,
    LINE: tl.constexpr,
):
    if SKIPS:  # noqa: SIM102  # `and` would not leave the load out
        if tl.load(skip):
            return
    program = tl.program_id(0).to(tl.int64)
    line = table + tl.load(blocks + program * 2) * LINE
    part = tl.load(blocks + program * 2 + 1)
    if tl.load(line + 3):
        _measure_weight(
            line, part, parts, program, DTYPE, RESULT, ALIGNED, EVEN, BLOCK, BLOCKS_EACH
        )
    else:
        _measure_growth(line, options, RESULT, STEP, BLOCK)


@triton.jit
def _measure_weight(
    line, part, parts, program, DTYPE: tl.constexpr, RESULT: tl.constexpr, ALIGNED: tl.constexpr,
    EVEN: tl.constexpr, BLOCK: tl.constexpr, BLOCKS_EACH: tl.constexpr,
):  # fmt: skip
    weight = _address(line, DTYPE, ALIGNED)
    count = tl.load(line + 2)
    if EVEN:
        # Then the mask is the same for every 16 elements, and accesses stay 16 bytes wide.
        count = tl.multiple_of(count, 16)
    total = tl.zeros([BLOCK], dtype=RESULT)
    for block in range(BLOCKS_EACH):
        at = (part * BLOCKS_EACH + block) * BLOCK + tl.arange(0, BLOCK)
        w = tl.load(weight + at, mask=at < count, other=0.0).to(RESULT)
        total += w * w
    tl.store(parts + program, tl.sum(total.to(tl.float64), axis=0))
    programs = tl.load(line + 3)
    if is_last(line + 5, programs):
        first = tl.load(line + 4)
        whole = tl.zeros([BLOCK], dtype=tl.float64)
        for start in range(0, programs, BLOCK):
            i = start + tl.arange(0, BLOCK)
            whole += tl.load(parts + first + i, mask=i < programs, other=0.0)
        rms = tl.sqrt(tl.sum(whole, axis=0) / tl.maximum(count, 1).to(tl.float64))
        least = _option(line, 6)
        # As clamp does, a NaN stays one.
        rms = tl.where(rms < least, least, rms)
        tl.store(tl.load(line + 1).to(tl.pointer_type(RESULT)), rms.to(RESULT))


@triton.jit
def _measure_growth(
    line, options, RESULT: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    step = tl.load(tl.load(line + 5).to(tl.pointer_type(STEP))).to(tl.float64)
    if step > 1:
        squares, count = tl.load(line).to(tl.pointer_type(RESULT)), tl.load(line + 2)
        total = tl.zeros([BLOCK], dtype=tl.float64)
        for start in range(0, count.to(tl.int32), BLOCK):
            at = start + tl.arange(0, BLOCK)
            total += tl.load(squares + at, mask=at < count, other=0.0).to(tl.float64)
        mean = tl.sum(total, axis=0) / tl.maximum(count, 1).to(tl.float64)
        recent = mean / (1.0 - tl.exp(step * _option(options, 0)))
        share = 1.0 - tl.exp(step * _option(options, 1))
        weight = _option(options, 2) / share
        slow = tl.load(line + 4).to(tl.pointer_type(RESULT))
        kept = tl.load(slow).to(tl.float64)
        blended = tl.where((weight < 1) & (kept > 0), kept + weight * (recent - kept), recent)
        # As memory holds them, which the other backends go on with.
        blended = blended.to(RESULT)
        tl.store(slow, blended)
        least = tl.maximum(blended.to(tl.float64), _option(options, 4))
        growth = tl.sqrt(recent.to(RESULT).to(tl.float64) / least)
        most = _option(options, 3)
        # Of mean squares beyond the dtype nothing is known: a NaN is in neither range.
        growth = tl.where(growth > 1, tl.where(growth < most, growth, most), 1.0)
        tl.store(tl.load(line + 1).to(tl.pointer_type(RESULT)), growth.to(RESULT))


def measure_weights_(
    weights: Sequence[Tensor],
    results: Sequence[Tensor],
    least: Sequence[float],
    skip: Tensor | None = None,
) -> None:
    """See `gls_fused.reference.measure_weights_`."""
    measure_layers_(weights, results, least, (), (), (), (), beta2=0, every=1, most=1, skip=skip)


def measure_growths_(
    squares: Sequence[Tensor],
    growths: Sequence[Tensor],
    slows: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    beta2: float,
    every: int,
    most: float,
    skip: Tensor | None = None,
) -> None:
    """See `gls_fused.reference.measure_growths_`."""
    measure_layers_(
        (), (), (), squares, growths, slows, steps, beta2=beta2, every=every, most=most, skip=skip
    )


def measure_layers_(
    weights: Sequence[Tensor],
    results: Sequence[Tensor],
    least: Sequence[float],
    squares: Sequence[Tensor],
    growths: Sequence[Tensor],
    slows: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    beta2: float,
    every: int,
    most: float,
    skip: Tensor | None = None,
) -> None:
    """`measure_weights_` and `measure_growths_` of `gls_fused.reference`, in one launch.

    Args:
        weights: launches of their own for each dtype.
        squares: all of one device and one dtype, as growths and slows are; or none.
        steps: all of one dtype.
    """
    if any(each.numel() > MOST_SQUARES for each in squares):
        reference.measure_growths_(
            squares, growths, slows, steps, beta2=beta2, every=every, most=most, skip=skip
        )
        squares = ()
    weights, squares = ([each.contiguous() for each in tensors] for tensors in (weights, squares))
    # By device, dtype of what is measured, and dtype of the weights. Mean squares go with the first
    # weights that they can; alone, their own dtype stands for the weights'.
    groups: dict[tuple[torch.device, torch.dtype, torch.dtype], list[int]] = {}
    for index, (weight, result) in enumerate(zip(weights, results, strict=True)):
        groups.setdefault((weight.device, result.dtype, weight.dtype), []).append(index)
    growing = None
    if squares:
        own = squares[0].device, squares[0].dtype
        growing = next((key for key in groups if key[:2] == own), (*own, squares[0].dtype))
        groups.setdefault(growing, [])
    options = (
        math.log(beta2) if beta2 else -math.inf,
        math.log(SLOW_BETA),
        -math.expm1(every * math.log(SLOW_BETA)),
        most,
    )
    for key, mine in groups.items():
        device, kind, dtype = key
        counts = [max(1, triton.cdiv(weights[i].numel(), UPDATE_BLOCK * BLOCKS_EACH)) for i in mine]
        lines: list[int] = []
        programs = 0
        for i, count in zip(mine, counts, strict=True):
            lines += [weights[i].data_ptr(), results[i].data_ptr(), weights[i].numel()]
            lines += [count, programs, 0, bits(least[i])]
            programs += count
        if key == growing:
            for v, growth, slow, step in zip(squares, growths, slows, steps, strict=True):
                lines += [v.data_ptr(), growth.data_ptr(), v.numel()]
                lines += [0, slow.data_ptr(), step.data_ptr(), 0]
            counts += [1] * len(squares)
        parts = torch.empty(max(1, programs), dtype=torch.float64, device=device)
        launch(
            _measure_kernel,
            (sum(counts),),
            device,
            table=upload(lines, device),
            blocks=upload(counts, device, block_table),
            parts=parts,
            options=upload([bits(x) for x in (*options, torch.finfo(kind).tiny)], device),
            skip=parts if skip is None else skip.to(device, non_blocking=True),
            SKIPS=skip is not None,
            DTYPE=ELEMENTS[dtype],
            RESULT=ELEMENTS[kind],
            STEP=ELEMENTS[steps[0].dtype if key == growing else torch.float32],
            ALIGNED=all(weights[i].data_ptr() % 16 == 0 for i in mine),
            EVEN=all(weights[i].numel() % 16 == 0 for i in mine),
            BLOCK=UPDATE_BLOCK,
            BLOCKS_EACH=BLOCKS_EACH,
            LINE=LINE,
            num_warps=UPDATE_WARPS,
        )
    increment_version([*results, *growths, *slows])
