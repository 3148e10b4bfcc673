"""The estimates of all layers take in a step's sums, in one launch per padded rank.

A program owns a block of a layer's d: its rows of Z = (1 - w) U M + w A'Y / n, and of mu S U. The
first of a layer also blends M, t and s. Nothing is written in place, as the other programs still
read M and t.
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
from gls_fused.reference import SHIFT

# Words of a layer's line in the table.
LINE = 11


@triton.jit
def blend_samples(s, w, n):
    """See `gls_fused.reference.blend_samples`."""
    return tl.where(w > 0, 1.0 / ((1.0 - w) * (1.0 - w) / s + w * w / n), s)


@triton.jit
def blend_tile(basis, m, sums, i, dim, rank, n, w, mu, PRECISION: tl.constexpr):
    """Rows i of Z + mu S U, the addresses of these elements by columns, and which there are."""
    RANK: tl.constexpr = m.shape[0]
    c = tl.arange(0, RANK)
    mask = (i < dim)[:, None] & (c < rank)[None, :]
    at = i[:, None] + c[None, :] * dim
    u = tl.load(basis + at, mask=mask, other=0.0)
    earlier = tl.dot(u, tl.trans(m), input_precision=PRECISION)
    fresh = tl.load(sums + 2 + rank * rank + at, mask=mask, other=0.0) / n
    z = earlier + (fresh - earlier) * w
    # Where all of a row is 0 it stays 0.
    z += tl.where(tl.max(tl.abs(z), axis=1)[:, None] > 0.0, mu, 0.0) * u
    return z, at, mask


@triton.jit
def _blend_kernel(
    table,  # int64 [layers, 11]: U, M, t, s, sums, Z, M+, t+, s+ (addresses), d, r
    blocks,  # int64 [programs, 2]: layer, block of its d
    options,  # int64 [2], float64 bits: 1 - beta, mu d / t
    LINE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = blocks + tl.program_id(0).to(tl.int64) * 2
    line, part = table + tl.load(block) * LINE, tl.load(block + 1)
    dim, rank = tl.load(line + 9), tl.load(line + 10)
    basis = tl.load(line).to(tl.pointer_type(tl.float32))
    core = tl.load(line + 1).to(tl.pointer_type(tl.float32))
    sums = tl.load(line + 4).to(tl.pointer_type(tl.float32))
    count = tl.load(sums)
    n = tl.maximum(count, 1.0)
    w = tl.where(count > 0, tl.load(options).to(tl.float64, bitcast=True).to(tl.float32), 0.0)
    t = tl.load(tl.load(line + 2).to(tl.pointer_type(tl.float32)))
    t += (tl.load(sums + 1) / n - t) * w
    mu = t * (tl.load(options + 1).to(tl.float64, bitcast=True) / dim).to(tl.float32)

    i = part * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.arange(0, RANK)
    square = (c < rank)[:, None] & (c < rank)[None, :]
    inside = c[:, None] * rank + c[None, :]
    m = tl.load(core + inside, mask=square, other=0.0)
    z, at, mask = blend_tile(basis, m, sums, i, dim, rank, n, w, mu, PRECISION)
    sketch = tl.load(line + 5).to(tl.pointer_type(tl.float32))
    tl.store(sketch + at, z, mask=mask)
    if part == 0:
        gram = tl.load(sums + 2 + inside, mask=square, other=0.0) / n
        m += (gram - m) * w + tl.where(c[:, None] == c[None, :], mu, 0.0)
        tl.store(tl.load(line + 6).to(tl.pointer_type(tl.float32)) + inside, m, mask=square)
        tl.store(tl.load(line + 7).to(tl.pointer_type(tl.float32)), t)
        s = tl.load(tl.load(line + 3).to(tl.pointer_type(tl.float32)))
        tl.store(tl.load(line + 8).to(tl.pointer_type(tl.float32)), blend_samples(s, w, n))


def blend_subspaces(
    bases: Sequence[Tensor],
    cores: Sequence[Tensor],
    traces: Sequence[Tensor],
    samples: Sequence[Tensor],
    sums: Sequence[Tensor],
    beta: float,
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """See `gls_fused.reference.blend_subspaces`; Z is kept by columns.

    Numerics: float32, with "ieee" products; ranks to 32. float64 and larger ranks take the
        reference's ops.
    """
    results: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    lines: dict[tuple[torch.device, int], list[list[int]]] = {}
    kept: list[Tensor] = []
    for layer in zip(bases, cores, traces, samples, sums, strict=True):
        dim, rank = layer[0].shape
        if needs_reference(layer[1].dtype, rank, MAX_REFRESH_RANK):
            results.append(reference.blend_subspace(*layer, beta))
            continue
        given = [layer[0].T.contiguous(), *(part.contiguous() for part in layer[1:])]
        found = [torch.empty_like(part) for part in given[:4]]
        kept += given
        line = [array.data_ptr() for array in (*given, *found)]
        lines.setdefault((layer[0].device, pad_rank(rank)), []).append([*line, dim, rank])
        results.append((found[0].T, found[1], found[2], found[3]))
    for (device, padded), mine in lines.items():
        tile = basis_tile(padded)
        counts = [triton.cdiv(line[9], tile.rows) for line in mine]
        launch(
            _blend_kernel,
            (sum(counts),),
            device,
            table=upload([word for line in mine for word in line], device),
            blocks=upload(counts, device, block_table),
            options=upload([bits(1 - beta), bits(1 / SHIFT)], device),
            LINE=LINE,
            RANK=padded,
            BLOCK_D=tile.rows,
            PRECISION=CURVATURE_PRECISION,
            num_warps=tile.warps,
        )
    return results


def blend_subspace(
    basis: Tensor, core: Tensor, trace: Tensor, samples: Tensor, sums: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `gls_fused.reference.blend_subspace`."""
    (result,) = blend_subspaces([basis], [core], [trace], [samples], [sums], beta)
    return result
