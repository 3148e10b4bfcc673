"""The estimates of all layers take in a step's sums, in one launch per padded rank.

A program owns a block of a layer's d: its rows of Z = (1 - w) U M + w A'Y / n. The first of a layer
also blends M and t. Nothing is written in place, as the other programs still read M.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gls_fused import reference
from gls_fused.backends.triton.configs import (
    CURVATURE_PRECISION,
    MAX_REFRESH_RANK,
    basis_tile,
    pad_rank,
)
from gls_fused.backends.triton.launch import bits, block_table, launch, needs_reference, upload

# Words of a layer's line in the table.
LINE = 9


@triton.jit
def _blend_kernel(
    table,  # int64 [layers, 9]: U, M, t, sums, Z, M+, t+ (addresses), d, r
    blocks,  # int64 [programs, 2]: layer, block of its d
    options,  # int64 [1], float64 bits: 1 - beta
    LINE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = blocks + tl.program_id(0).to(tl.int64) * 2
    line, part = table + tl.load(block) * LINE, tl.load(block + 1)
    dim, rank = tl.load(line + 7), tl.load(line + 8)
    basis = tl.load(line).to(tl.pointer_type(tl.float32))
    core = tl.load(line + 1).to(tl.pointer_type(tl.float32))
    sums = tl.load(line + 3).to(tl.pointer_type(tl.float32))
    count = tl.load(sums)
    n = tl.maximum(count, 1.0)
    w = tl.where(count > 0, tl.load(options).to(tl.float64, bitcast=True).to(tl.float32), 0.0)

    i = part * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.arange(0, RANK)
    in_rank = c < rank
    mask = (i < dim)[:, None] & in_rank[None, :]
    at = i[:, None] + c[None, :] * dim
    square = in_rank[:, None] & in_rank[None, :]
    inside = c[:, None] * rank + c[None, :]
    m = tl.load(core + inside, mask=square, other=0.0)
    u = tl.load(basis + at, mask=mask, other=0.0)
    earlier = tl.dot(u, tl.trans(m), input_precision=PRECISION)
    fresh = tl.load(sums + 2 + rank * rank + at, mask=mask, other=0.0) / n
    sketch = tl.load(line + 4).to(tl.pointer_type(tl.float32))
    tl.store(sketch + at, earlier + (fresh - earlier) * w, mask=mask)
    if part == 0:
        gram = tl.load(sums + 2 + inside, mask=square, other=0.0) / n
        core_out = tl.load(line + 5).to(tl.pointer_type(tl.float32))
        tl.store(core_out + inside, m + (gram - m) * w, mask=square)
        t = tl.load(tl.load(line + 2).to(tl.pointer_type(tl.float32)))
        trace_out = tl.load(line + 6).to(tl.pointer_type(tl.float32))
        tl.store(trace_out, t + (tl.load(sums + 1) / n - t) * w)


def blend_subspaces(
    bases: Sequence[Tensor],
    cores: Sequence[Tensor],
    traces: Sequence[Tensor],
    sums: Sequence[Tensor],
    beta: float,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """See `gls_fused.reference.blend_subspaces`; Z is kept by columns.

    Numerics: float32, with "ieee" products; ranks to 32. float64 and larger ranks take the
        reference's ops.
    """
    results: list[tuple[Tensor, Tensor, Tensor]] = []
    lines: dict[tuple[torch.device, int], list[list[int]]] = {}
    kept: list[Tensor] = []
    for layer in zip(bases, cores, traces, sums, strict=True):
        dim, rank = layer[0].shape
        if needs_reference(layer[1].dtype, rank, MAX_REFRESH_RANK):
            results.append(reference.blend_subspace(*layer, beta))
            continue
        given = [layer[0].T.contiguous(), *(part.contiguous() for part in layer[1:])]
        found = [torch.empty_like(part) for part in given[:3]]
        kept += given
        line = [array.data_ptr() for array in (*given, *found)]
        lines.setdefault((layer[0].device, pad_rank(rank)), []).append([*line, dim, rank])
        results.append((found[0].T, found[1], found[2]))
    for (device, padded), mine in lines.items():
        tile = basis_tile(padded)
        counts = [triton.cdiv(line[7], tile.rows) for line in mine]
        launch(
            _blend_kernel,
            (sum(counts),),
            device,
            table=upload([word for line in mine for word in line], device),
            blocks=upload(counts, device, block_table),
            options=upload([bits(1 - beta)], device),
            LINE=LINE,
            RANK=padded,
            BLOCK_D=tile.rows,
            PRECISION=CURVATURE_PRECISION,
            num_warps=tile.warps,
        )
    return results


def blend_subspace(
    basis: Tensor, core: Tensor, trace: Tensor, sums: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `gls_fused.reference.blend_subspace`."""
    (result,) = blend_subspaces([basis], [core], [trace], [sums], beta)
    return result
