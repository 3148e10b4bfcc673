"""How much the directions of all layers have grown, in one launch: a program for each layer.

It adds the layer's mean squares, one for each output, so that others than "adam" have few.
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
from gls_fused.backends.triton.launch import ELEMENTS, bits, launch, upload
from gls_fused.reference import SLOW_BETA

# Words of a layer's line in the table.
LINE = 5
BLOCK = 1024
# Mean squares that one program adds; more, one for each element of a weight, are torch's to add.
MOST_SQUARES = 1 << 16


@triton.jit
def _growth_kernel(
    table,  # int64 [layers, 5]: mean squares, growth, slow, step (addresses), elements
    # float64 bits [5]: log(beta2), log(SLOW_BETA), 1 - SLOW_BETA^every, most, tiny
    options,
    skip,
    SKIPS: tl.constexpr,
    DTYPE: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    LINE: tl.constexpr,
):
    if SKIPS:  # noqa: SIM102  # `and` would not leave the load out
        if tl.load(skip):
            return
    line = table + tl.program_id(0) * LINE
    step = tl.load(tl.load(line + 3).to(tl.pointer_type(STEP))).to(tl.float64)
    if step <= 1:
        return
    squares, count = tl.load(line).to(tl.pointer_type(DTYPE)), tl.load(line + 4)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, count.to(tl.int32), BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(squares + at, mask=at < count, other=0.0).to(tl.float64)
    mean = tl.sum(total, axis=0) / tl.maximum(count, 1).to(tl.float64)
    recent = mean / (1.0 - tl.exp(step * tl.load(options).to(tl.float64, bitcast=True)))
    share = 1.0 - tl.exp(step * tl.load(options + 1).to(tl.float64, bitcast=True))
    weight = tl.load(options + 2).to(tl.float64, bitcast=True) / share
    slow = tl.load(line + 2).to(tl.pointer_type(DTYPE))
    kept = tl.load(slow).to(tl.float64)
    blended = tl.where((weight < 1) & (kept > 0), kept + weight * (recent - kept), recent)
    # As memory holds them, which the other backends go on with.
    blended = blended.to(DTYPE)
    tl.store(slow, blended)
    tiny = tl.load(options + 4).to(tl.float64, bitcast=True)
    least = tl.maximum(blended.to(tl.float64), tiny)
    growth = tl.sqrt(recent.to(DTYPE).to(tl.float64) / least)
    most = tl.load(options + 3).to(tl.float64, bitcast=True)
    # Of mean squares beyond the dtype nothing is known: a NaN is in neither range.
    growth = tl.where(growth > 1, tl.where(growth < most, growth, most), 1.0)
    tl.store(tl.load(line + 1).to(tl.pointer_type(DTYPE)), growth.to(DTYPE))


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
    """See `gls_fused.reference.measure_growths_`; all of one device and of one dtype, but steps."""
    if any(each.numel() > MOST_SQUARES for each in squares):
        reference.measure_growths_(
            squares, growths, slows, steps, beta2=beta2, every=every, most=most, skip=skip
        )
        return
    device, dtype = squares[0].device, squares[0].dtype
    squares = [each.contiguous() for each in squares]
    lines = [
        word
        for tensors in zip(squares, growths, slows, steps, strict=True)
        for word in (*(tensor.data_ptr() for tensor in tensors), tensors[0].numel())
    ]
    options = (
        math.log(beta2) if beta2 else -math.inf,
        math.log(SLOW_BETA),
        -math.expm1(every * math.log(SLOW_BETA)),
        most,
        torch.finfo(dtype).tiny,
    )
    table = upload(lines, device)
    launch(
        _growth_kernel,
        (len(squares),),
        device,
        table=table,
        options=upload([bits(value) for value in options], device),
        skip=table if skip is None else skip.to(device, non_blocking=True),
        SKIPS=skip is not None,
        DTYPE=ELEMENTS[dtype],
        STEP=ELEMENTS[steps[0].dtype],
        BLOCK=BLOCK,
        LINE=LINE,
    )
    increment_version([*growths, *slows])
