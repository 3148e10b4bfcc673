"""A gathering step's end for all layers at once: `blend_subspaces`, `refresh_subspaces` and
`invert_cores`, in place and in three launches, whatever the number of layers and ranks.

    _blend_gram_kernel      Z + mu S U, and parts of Z'Z; then R and R^-1, see subspace.py
    _turn_kernel            Q = Z R^-1, and parts of Q'Q; then R again, M+, C and lambda'^p
    _turn_kernel            U+ = Q R^-1

A program owns a block of a layer's d, and the last of a layer's programs does what is the layer's:
a launch each would cost more than they wait. Parts are added in order, so that the same sums give
the same bits. Between the launches Z and Q stand in memory; a state is written to only when no
program reads what it holds any more.

Rows count only if the gradient that they led to is there: where all of it is zero, which every
program looks for itself, and finds in its first elements, w is 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gls_fused.backends.triton.blend import blend_samples, blend_tile
from gls_fused.backends.triton.configs import (
    CURVATURE_PRECISION,
    MAX_REFRESH_RANK,
    commit_tile,
    pad_rank,
)
from gls_fused.backends.triton.core import damp_core, invert_core_tile, root_steps
from gls_fused.backends.triton.counting import is_last
from gls_fused.backends.triton.launch import bits, block_table, launch, needs_reference, upload
from gls_fused.backends.triton.subspace import (
    DEPENDENT,
    SEED,
    eliminate,
    move_core,
    rotate_tile,
    sum_parts,
)
from gls_fused.reference import SHIFT

# Words of a layer's line in the table.
LINE = 20
# Elements of a gradient that are looked at together.
SCAN = tl.constexpr(1024)


@triton.jit
def _find_nonzero(word):
    """Whether a gradient (address, elements, bytes of each) has an element that is not zero."""
    address, count, size = tl.load(word), tl.load(word + 1), tl.load(word + 2)
    found, start = tl.full([], 0, dtype=tl.int32), tl.full([], 0, dtype=tl.int64)
    while (found == 0) & (start < count):
        at = start + tl.arange(0, SCAN)
        # All bits but the sign.
        wide = tl.load(
            address.to(tl.pointer_type(tl.int32)) + at, mask=(at < count) & (size == 4), other=0
        )
        half = tl.load(
            address.to(tl.pointer_type(tl.int16)) + at, mask=(at < count) & (size == 2), other=0
        )
        either = (wide & 0x7FFFFFFF) | (half.to(tl.int32) & 0x7FFF)
        found = tl.max(either, axis=0)
        start += SCAN
    return found != 0


@triton.jit
def _blend_gram_kernel(
    # int64 [layers, 20]: U, M, t, s, C, lambda'^p, sums (addresses), d, r, first program, how many,
    # where in `between` the layer begins, how many programs are done, of two gradients address,
    # elements and the bytes of one, whether rows count without them
    table,
    blocks,  # int64 [programs, 2]: layer, block of its d
    options,  # int64 [3], float64 bits: 1 - beta, mu d / t, damping
    skip,
    between,  # float32, of each layer: Z [r, d], Q [r, d], M + mu I [r, r], t, s, w
    parts,  # float64 [programs, RANK, RANK]
    triangles,  # float64 [layers, RANK, RANK]: R
    inverses,  # float64 [layers, RANK, RANK]: R^-1
    SKIPS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    LINE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if SKIPS:  # noqa: SIM102  # `and` would not leave the load out
        if tl.load(skip):
            return
    program = tl.program_id(0).to(tl.int64)
    layer, block = tl.load(blocks + program * 2), tl.load(blocks + program * 2 + 1)
    line = table + layer * LINE
    dim, rank = tl.load(line + 7), tl.load(line + 8)
    basis = tl.load(line).to(tl.pointer_type(tl.float32))
    core = tl.load(line + 1).to(tl.pointer_type(tl.float32))
    sums = tl.load(line + 6).to(tl.pointer_type(tl.float32))
    out = between + tl.load(line + 11)
    counts = tl.load(line + 19) != 0
    if not counts:
        counts = _find_nonzero(line + 13)
    if not counts:
        counts = _find_nonzero(line + 16)
    n = tl.where(counts, tl.load(sums), 0.0)
    w = tl.where(n > 0, tl.load(options).to(tl.float64, bitcast=True).to(tl.float32), 0.0)
    n = tl.maximum(n, 1.0)
    t = tl.load(tl.load(line + 2).to(tl.pointer_type(tl.float32)))
    t += (tl.load(sums + 1) / n - t) * w
    mu = t * (tl.load(options + 1).to(tl.float64, bitcast=True) / dim).to(tl.float32)

    c = tl.arange(0, RANK)
    square = (c < rank)[:, None] & (c < rank)[None, :]
    inside = c[:, None] * rank + c[None, :]
    m = tl.load(core + inside, mask=square, other=0.0)
    i = block * BLOCK_D + tl.arange(0, BLOCK_D)
    z, at, mask = blend_tile(basis, m, sums, i, dim, rank, n, w, mu, PRECISION)
    z = tl.where(mask, z, 0.0)
    tl.store(out + at, z, mask=mask)
    if block == 0:
        gram = tl.load(sums + 2 + inside, mask=square, other=0.0) / n
        m += (gram - m) * w + tl.where(c[:, None] == c[None, :], mu, 0.0)
        rest = out + 2 * rank * dim
        tl.store(rest + inside, m, mask=square)
        tl.store(rest + rank * rank, t)
        s = tl.load(tl.load(line + 3).to(tl.pointer_type(tl.float32)))
        tl.store(rest + rank * rank + 1, blend_samples(s, w, n))
        tl.store(rest + rank * rank + 2, w)
    wide = z.to(tl.float64)
    own = tl.dot(tl.trans(wide), wide, out_dtype=tl.float64)
    tl.store(parts + program * RANK * RANK + c[:, None] * RANK + c[None, :], own)

    count = tl.load(line + 10)
    if is_last(line + 12, count):
        total = sum_parts(parts, tl.load(line + 9), count, RANK)
        factor, eliminated = eliminate(total, rank, DEPENDENT)
        first = layer * RANK * RANK
        tl.store(triangles + first + c[:, None] * RANK + c[None, :], factor)
        tl.store(inverses + first + c[None, :] * RANK + c[:, None], eliminated)


@triton.jit
def _turn_kernel(
    table,
    blocks,
    options,
    skip,
    between,
    parts,
    triangles,
    inverses,
    turned,  # as `inverses`, of the second round
    SKIPS: tl.constexpr,
    SECOND: tl.constexpr,
    QUARTERS: tl.constexpr,
    NEAR: tl.constexpr,
    STEPS: tl.constexpr,
    EPS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    SEED: tl.constexpr,
    LINE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Z R^-1; the first time the layer's core and P from R, the second time the basis."""
    if SKIPS:  # noqa: SIM102
        if tl.load(skip):
            return
    program = tl.program_id(0).to(tl.int64)
    layer, block = tl.load(blocks + program * 2), tl.load(blocks + program * 2 + 1)
    line = table + layer * LINE
    dim, rank = tl.load(line + 7), tl.load(line + 8)
    own = between + tl.load(line + 11)
    c = tl.arange(0, RANK)
    i, j = c[:, None], c[None, :]
    k = block * BLOCK_D + tl.arange(0, BLOCK_D)
    at = k[:, None] + c[None, :] * dim
    mask = (k < dim)[:, None] & (c < rank)[None, :]
    of_layer = layer * RANK * RANK + i * RANK + j
    rest = own + 2 * rank * dim
    w = tl.load(rest + rank * rank + 2)
    if SECOND:
        # Over no row the basis would move by rounding, which adds up.
        if w == 0:
            return
        z = tl.load(own + rank * dim + at, mask=mask, other=0.0).to(tl.float64)
        q = rotate_tile(z, tl.load(turned + of_layer), k, dim, mask, SEED)
        tl.store(tl.load(line).to(tl.pointer_type(tl.float32)) + at, q, mask=mask)
    else:
        z = tl.load(own + at, mask=mask, other=0.0).to(tl.float64)
        q = rotate_tile(z, tl.load(inverses + of_layer), k, dim, mask, SEED)
        tl.store(own + rank * dim + at, q, mask=mask)
        wide = q.to(tl.float64)
        gram = tl.dot(tl.trans(wide), wide, out_dtype=tl.float64)
        tl.store(parts + program * RANK * RANK + i * RANK + j, gram)
        count = tl.load(line + 10)
        if is_last(line + 12, count):
            total = sum_parts(parts, tl.load(line + 9), count, RANK)
            factor, eliminated = eliminate(total, rank, DEPENDENT)
            tl.store(turned + layer * RANK * RANK + j * RANK + i, eliminated)
            inside = (i < rank) & (j < rank)
            m = tl.load(rest + i * rank + j, mask=inside, other=0.0).to(tl.float64)
            t, s = tl.load(rest + rank * rank), tl.load(rest + rank * rank + 1)
            turn = tl.dot(factor, tl.load(triangles + of_layer), out_dtype=tl.float64)
            mu = t * (tl.load(options + 1).to(tl.float64, bitcast=True) / dim).to(tl.float32)
            moved = move_core(m, turn, rank, EPS).to(tl.float32)
            # Where the basis was completed by directions of no sketch there is none of it.
            moved -= tl.where(i == j, tl.minimum(moved, mu), 0.0)
            core = tl.load(line + 1).to(tl.pointer_type(tl.float32)) + i * rank + j
            moved = tl.where(w > 0, moved, tl.load(core, mask=inside, other=0.0))
            moved = tl.where(inside, moved, 0.0)
            tl.store(core, moved, mask=inside)
            tl.store(tl.load(line + 2).to(tl.pointer_type(tl.float32)), t)
            tl.store(tl.load(line + 3).to(tl.pointer_type(tl.float32)), s)
            trace = tl.sum(tl.where(i == j, moved, 0.0))
            damping = tl.load(options + 2).to(tl.float64, bitcast=True)
            damp, shift = damp_core(t, trace, dim, rank, s, damping, QUARTERS)
            found = invert_core_tile(
                moved, trace, damp, shift, rank.to(tl.int32), QUARTERS, NEAR, STEPS
            )
            core_inverse = tl.load(line + 4).to(tl.pointer_type(tl.float32))
            tl.store(core_inverse + i * rank + j, found, mask=inside)
            tl.store(tl.load(line + 5).to(tl.pointer_type(tl.float32)), shift)


def commits(estimate: Sequence[Tensor]) -> bool:
    """Whether `commit_subspaces_` takes an estimate (U, M, t, s, C, lambda'^p): in float32, ranks
    to 32, as `empty_state` lays it out.
    """
    basis, *rest = estimate
    if needs_reference(basis.dtype, basis.shape[1], MAX_REFRESH_RANK):
        return False
    if not basis.T.is_contiguous() or not all(part.is_contiguous() for part in rest):
        return False
    return all(part.dtype == torch.float32 for part in rest)


def commit_subspaces_(
    estimates: Sequence[Sequence[Tensor]],
    sums: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor]],
    *,
    beta: float,
    damping: float,
    power: float,
    skip: Tensor | None = None,
) -> None:
    """Blend sums into the estimates, move their bases and make P anew, in place.

        `blend_subspaces`, `refresh_subspaces` less the mu I of M+, `invert_cores`

    Args:
        estimates: U, M, t, s, C and lambda'^p of each layer, that `commits` takes, on one device.
        sums: see `gls_fused.reference.split_sums`.
        gradients: that the rows led to, two at most: where all are zero the rows do not count.
            None of them where that is known.
        skip: 0-d bool; where it is true nothing changes.
    Numerics: those of the three ops.
    """
    if not estimates:
        return
    device = sums[0].device
    padded = max(pad_rank(estimate[0].shape[1]) for estimate in estimates)
    tile = commit_tile(padded)
    lines: list[int] = []
    counts: list[int] = []
    size = 0
    # Tables know addresses only, so their tensors are kept until all is launched.
    kept: list[Tensor] = []
    for estimate, own, led_to in zip(estimates, sums, gradients, strict=True):
        dim, rank = estimate[0].shape
        own = own.contiguous()
        kept.append(own)
        count = triton.cdiv(dim, tile.rows)
        lines += [*(part.data_ptr() for part in (*estimate, own)), dim, rank]
        lines += [sum(counts), count, size, 0]
        words = []
        for gradient in led_to:
            # In the order of memory, whatever the axes.
            flat = gradient if _is_dense(gradient) else gradient.contiguous()
            kept.append(flat)
            words += [flat.data_ptr(), flat.numel(), flat.element_size()]
        lines += [*words, *[0] * (6 - len(words)), not led_to]
        counts.append(count)
        size += 2 * rank * dim + rank * rank + 3
    square = (padded, padded)
    parts = torch.empty(sum(counts), *square, dtype=torch.float64, device=device)
    triangles, inverses, turned = (parts.new_empty(len(estimates), *square) for _ in range(3))
    options = [bits(1 - beta), bits(1 / SHIFT), bits(damping)]
    shared = {
        "table": upload(lines, device),
        "blocks": upload(counts, device, block_table),
        "options": upload(options, device),
        "skip": parts if skip is None else skip,
        "between": torch.empty(size, dtype=torch.float32, device=device),
        "parts": parts,
        "triangles": triangles,
        "inverses": inverses,
        "SKIPS": skip is not None,
        "DEPENDENT": DEPENDENT,
        "LINE": LINE,
        "RANK": padded,
        "BLOCK_D": tile.rows,
        "num_warps": tile.warps,
    }
    launch(_blend_gram_kernel, (sum(counts),), device, PRECISION=CURVATURE_PRECISION, **shared)
    for second in (False, True):
        launch(
            _turn_kernel,
            (sum(counts),),
            device,
            turned=turned,
            SECOND=second,
            QUARTERS=round(4 * power),
            NEAR=torch.finfo(torch.float32).eps,
            STEPS=root_steps(torch.float32),
            EPS=torch.finfo(torch.float32).eps,
            SEED=SEED,
            **shared,
        )


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements are those of a stretch of memory, in some order."""
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous()
