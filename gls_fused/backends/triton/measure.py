"""Root mean squares of all layers' weights, in one launch.

A program adds the squares of a block of a weight; the weight's last one adds what they left, in
order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from gls_fused.backends.triton.configs import UPDATE_BLOCK, UPDATE_WARPS
from gls_fused.backends.triton.counting import is_last
from gls_fused.backends.triton.launch import ELEMENTS, bits, block_table, launch, upload
from gls_fused.backends.triton.update_kernels import _address

# Words of a weight's line in the table.
LINE = 7
# Blocks of a weight that one program adds.
BLOCKS_EACH = 4


@triton.jit
def _measure_kernel(
    # int64 [weights, 7]: weight, result (addresses), elements, first program, how many, how many
    # are done, least (float64 bits)
    table,
    blocks,  # int64 [programs, 2]: weight, part of it
    parts,  # float64 [programs]
    skip,
    SKIPS: tl.constexpr,
    DTYPE: tl.constexpr,
    RESULT: tl.constexpr,
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
    weight = _address(line, DTYPE, ALIGNED)
    count = tl.load(line + 2)
    if EVEN:
        # Then the mask is the same for every 16 elements, and accesses stay 16 bytes wide.
        count = tl.multiple_of(count, 16)
    total = tl.zeros([BLOCK], dtype=RESULT)
    for block in range(BLOCKS_EACH):
        at = (tl.load(blocks + program * 2 + 1) * BLOCKS_EACH + block) * BLOCK
        at += tl.arange(0, BLOCK)
        w = tl.load(weight + at, mask=at < count, other=0.0).to(RESULT)
        total += w * w
    tl.store(parts + program, tl.sum(total.to(tl.float64), axis=0))
    programs = tl.load(line + 4)
    if is_last(line + 5, programs):
        first = tl.load(line + 3)
        whole = tl.zeros([BLOCK], dtype=tl.float64)
        for start in range(0, programs, BLOCK):
            i = start + tl.arange(0, BLOCK)
            whole += tl.load(parts + first + i, mask=i < programs, other=0.0)
        rms = tl.sqrt(tl.sum(whole, axis=0) / tl.maximum(count, 1).to(tl.float64))
        least = tl.load(line + 6).to(tl.float64, bitcast=True)
        # As clamp does, a NaN stays one.
        rms = tl.where(rms < least, least, rms)
        tl.store(tl.load(line + 1).to(tl.pointer_type(RESULT)), rms.to(RESULT))


def measure_weights_(
    weights: Sequence[Tensor],
    results: Sequence[Tensor],
    least: Sequence[float],
    skip: Tensor | None = None,
) -> None:
    """See `gls_fused.reference.measure_weights_`."""
    weights = [weight.contiguous() for weight in weights]
    groups: dict[tuple[torch.device, torch.dtype, torch.dtype], list[int]] = {}
    for index, (weight, result) in enumerate(zip(weights, results, strict=True)):
        groups.setdefault((weight.device, weight.dtype, result.dtype), []).append(index)
    for (device, dtype, kind), mine in groups.items():
        counts = [max(1, triton.cdiv(weights[i].numel(), UPDATE_BLOCK * BLOCKS_EACH)) for i in mine]
        lines: list[int] = []
        first = 0
        for i, count in zip(mine, counts, strict=True):
            lines += [weights[i].data_ptr(), results[i].data_ptr(), weights[i].numel()]
            lines += [first, count, 0, bits(least[i])]
            first += count
        parts = torch.empty(first, dtype=torch.float64, device=device)
        launch(
            _measure_kernel,
            (first,),
            device,
            table=upload(lines, device),
            blocks=upload(counts, device, block_table),
            parts=parts,
            skip=parts if skip is None else skip.to(device, non_blocking=True),
            SKIPS=skip is not None,
            DTYPE=ELEMENTS[dtype],
            RESULT=ELEMENTS[kind],
            ALIGNED=all(weights[i].data_ptr() % 16 == 0 for i in mine),
            EVEN=all(weights[i].numel() % 16 == 0 for i in mine),
            BLOCK=UPDATE_BLOCK,
            BLOCKS_EACH=BLOCKS_EACH,
            LINE=LINE,
            num_warps=UPDATE_WARPS,
        )
    increment_version(list(results))
