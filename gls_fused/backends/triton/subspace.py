"""The bases of all layers move: Cholesky QR, twice, in float64, and M+ = T (M + nu I)^-1 T'.

    _gram_kernel     parts of Z'Z, a block of a layer's d to a program
    _factor_kernel   R with R'R = Z'Z, and R^-1, a layer to a program; a column that depends on
                     those before it gets a zero row in R, which is decided on the device
    _rotate_kernel   Q = Z R^-1, random columns in place of dependent ones, and parts of Q'Q
    _factor_kernel   again, of Q'Q; then T = R2 R1 and M+
    _rotate_kernel   again: U+ = Q R2^-1

Z = Q R holds whatever stands in a column of Q whose row in R is zero, so the second round completes
the basis without changing what it spans. float64, because the Gram matrix squares the condition:
of float32 data it is then at most 1e12, which leaves Q orthogonal to 1e-4 after the first round and
to float32's rounding after the second.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gls_fused import reference
from gls_fused.backends.triton.configs import MAX_REFRESH_RANK, basis_tile, core_warps, pad_rank
from gls_fused.backends.triton.core import invert_tile
from gls_fused.backends.triton.launch import block_table, launch, needs_reference, upload

# A column whose part across the columns before it is below 1e-6 of its norm, some ten roundings of
# float32, is taken as dependent; this is the square.
DEPENDENT = 1e-12
SEED = 20230517
# Words of a layer's line in the table.
LINE = 9


@triton.jit
def _tile(line, at, dim, rank, RANK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of the matrix [dim, rank] by columns whose address stands at `line`: pointers, mask, rows."""
    i = at * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.arange(0, RANK)
    matrix = tl.load(line).to(tl.pointer_type(tl.float32))
    mask = (i < dim)[:, None] & (c < rank)[None, :]
    return matrix + i[:, None] + c[None, :] * dim, mask, i


@triton.jit
def _gram_kernel(
    table,  # int64 [layers, 9]: Z, Q, U+, M, M+ (addresses), d, r, first program, programs
    blocks,  # int64 [programs, 2]: layer, block of its d
    parts,  # float64 [programs, RANK, RANK]
    LINE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    line = table + tl.load(blocks + program * 2) * LINE
    dim, rank = tl.load(line + 5), tl.load(line + 6)
    pointers, mask, _ = _tile(line, tl.load(blocks + program * 2 + 1), dim, rank, RANK, BLOCK_D)
    z = tl.load(pointers, mask=mask, other=0.0).to(tl.float64)
    gram = tl.dot(tl.trans(z), z, out_dtype=tl.float64)
    c = tl.arange(0, RANK)
    tl.store(parts + program * RANK * RANK + c[:, None] * RANK + c[None, :], gram)


@triton.jit
def sum_parts(parts, first, count, RANK: tl.constexpr):
    """The Gram matrix [RANK, RANK], of so many parts in their order."""
    c = tl.arange(0, RANK)
    total = tl.zeros([RANK, RANK], dtype=tl.float64)
    for part in range(first, first + count):
        total += tl.load(parts + part * RANK * RANK + c[:, None] * RANK + c[None, :])
    return total


@triton.jit
def eliminate(g, rank, DEPENDENT: tl.constexpr):
    """R with R'R = G, and the transpose of R^-1, of the tile G [RANK, RANK] in float64.

    Gaussian elimination on [G, I]: R in the upper triangle, and L^-1, whose transpose is R^-1. A
    column that depends on those before it gets a row of zeros.
    """
    RANK: tl.constexpr = g.shape[0]
    c = tl.arange(0, RANK)
    i, j = c[:, None], c[None, :]
    norms = tl.sum(tl.where(i == j, g, 0.0), axis=0)
    factor = tl.zeros([RANK, RANK], dtype=tl.float64)
    eliminated = tl.where(i == j, 1.0, 0.0).to(tl.float64)
    for k in range(rank):
        row = tl.sum(tl.where(i == k, g, 0.0), axis=0)
        column = tl.sum(tl.where(j == k, g, 0.0), axis=1)
        pivot = tl.sum(tl.where(c == k, row, 0.0))
        norm = tl.sum(tl.where(c == k, norms, 0.0))
        sound = pivot > DEPENDENT * norm
        root = tl.where(sound, 1.0 / tl.sqrt(tl.where(sound, pivot, 1.0)), 0.0)
        row = tl.where(c >= k, row * root, 0.0)
        column = tl.where(c > k, column * root, 0.0)
        unit = tl.sum(tl.where(i == k, eliminated, 0.0), axis=0) * root
        g -= column[:, None] * row[None, :]
        factor = tl.where(i == k, row[None, :], factor)
        eliminated = tl.where(i == k, unit[None, :], eliminated - column[:, None] * unit[None, :])
    return factor, eliminated


@triton.jit
def move_core(m, t, rank, EPS: tl.constexpr):
    """M+ = T (M + nu I)^-1 T', nu = 4 eps tr M, of tiles in float64."""
    RANK: tl.constexpr = m.shape[0]
    i, j = tl.arange(0, RANK)[:, None], tl.arange(0, RANK)[None, :]
    nu = tl.sum(tl.where(i == j, m, 0.0)) * (4 * EPS)
    nu = tl.maximum(nu, 1e-300)
    unit_core = (m + tl.trans(m)) * 0.5 / nu + tl.where(i == j, 1.0, 0.0)
    middle, _ = invert_tile(unit_core, 0.0 * nu, rank, RANK)
    moved = tl.dot(t, middle, out_dtype=tl.float64)
    moved = tl.dot(moved, tl.trans(t), out_dtype=tl.float64) / nu
    return (moved + tl.trans(moved)) * 0.5


@triton.jit
def rotate_tile(z, turn, i, dim, mask, SEED: tl.constexpr):
    """Rows i of Z R^-1 in float32, with random columns in place of dependent ones."""
    RANK: tl.constexpr = turn.shape[0]
    c = tl.arange(0, RANK)
    q = tl.dot(z, turn, out_dtype=tl.float64)
    diagonal = tl.sum(tl.where(c[:, None] == c[None, :], turn, 0.0), axis=0)
    # Entries of variance 1 / dim: about as long as the columns beside them.
    noise = tl.rand(SEED, (i[:, None] * RANK + c[None, :]).to(tl.int32)).to(tl.float64)
    noise = (2.0 * noise - 1.0) * tl.sqrt(3.0 / dim.to(tl.float64))
    q = tl.where(diagonal[None, :] == 0.0, noise, q)
    return tl.where(mask, q, 0.0).to(tl.float32)


@triton.jit
def _factor_kernel(
    table,
    parts,
    triangles,  # float64 [layers, RANK, RANK]: R, written in the first round, read in the second
    inverses,  # float64 [layers, RANK, RANK]: R^-1 of this round
    EPS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    SECOND: tl.constexpr,
    LINE: tl.constexpr,
    RANK: tl.constexpr,
):
    layer = tl.program_id(0).to(tl.int64)
    line = table + layer * LINE
    rank, first, count = tl.load(line + 6), tl.load(line + 7), tl.load(line + 8)
    c = tl.arange(0, RANK)
    i, j = c[:, None], c[None, :]
    at = i * RANK + j
    factor, eliminated = eliminate(sum_parts(parts, first, count, RANK), rank, DEPENDENT)
    tl.store(inverses + layer * RANK * RANK + j * RANK + i, eliminated)

    triangle = triangles + layer * RANK * RANK + at
    if SECOND:
        core = tl.load(line + 3).to(tl.pointer_type(tl.float32))
        core_out = tl.load(line + 4).to(tl.pointer_type(tl.float32))
        inside = (i < rank) & (j < rank)
        m = tl.load(core + i * rank + j, mask=inside, other=0.0).to(tl.float64)
        moved = move_core(m, tl.dot(factor, tl.load(triangle), out_dtype=tl.float64), rank, EPS)
        tl.store(core_out + i * rank + j, moved.to(tl.float32), mask=inside)
    else:
        tl.store(triangle, factor)


@triton.jit
def _rotate_kernel(
    table,
    blocks,
    inverses,
    parts,  # written in the first round
    SEED: tl.constexpr,
    SECOND: tl.constexpr,
    LINE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    layer, block = tl.load(blocks + program * 2), tl.load(blocks + program * 2 + 1)
    line = table + layer * LINE
    dim, rank = tl.load(line + 5), tl.load(line + 6)
    c = tl.arange(0, RANK)
    # From Z to Q, then from Q to U+.
    source, mask, i = _tile(line + SECOND, block, dim, rank, RANK, BLOCK_D)
    target, _, _ = _tile(line + SECOND + 1, block, dim, rank, RANK, BLOCK_D)
    z = tl.load(source, mask=mask, other=0.0).to(tl.float64)
    turn = tl.load(inverses + layer * RANK * RANK + c[:, None] * RANK + c[None, :])
    q = rotate_tile(z, turn, i, dim, mask, SEED)
    tl.store(target, q, mask=mask)
    if not SECOND:
        wide = q.to(tl.float64)
        gram = tl.dot(tl.trans(wide), wide, out_dtype=tl.float64)
        tl.store(parts + program * RANK * RANK + c[:, None] * RANK + c[None, :], gram)


def refresh_subspaces(
    cores: Sequence[Tensor], sketches: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """See `gls_fused.reference.refresh_subspaces`: the same U+ M+ U+', in five launches per padded
    rank, whatever the number of layers; U+ is kept by columns.

    Numerics: float32 in and out, float64 between; ranks to 32. float64 statistics and larger ranks
        take the reference's ops. What a column of Z has across the others is lost below 1e-6 of it.
    """
    results: list[tuple[Tensor, Tensor]] = []
    groups: dict[tuple[torch.device, int], list[_Move]] = {}
    for core, sketch in zip(cores, sketches, strict=True):
        rank = sketch.shape[1]
        if needs_reference(core.dtype, rank, MAX_REFRESH_RANK):
            results.append(reference.refresh_subspace(core, sketch))
            continue
        move = _Move(core.contiguous(), sketch.T.contiguous())
        groups.setdefault((sketch.device, pad_rank(rank)), []).append(move)
        results.append((move.basis.T, move.core_out))
    for (device, padded), moves in groups.items():
        _launch_moves(moves, device, padded)
    return results


def refresh_subspace(core: Tensor, sketch: Tensor) -> tuple[Tensor, Tensor]:
    """See `gls_fused.reference.refresh_subspace`."""
    (result,) = refresh_subspaces([core], [sketch])
    return result


class _Move:
    """One layer's arrays, all contiguous: M, Z' [r, d], and what becomes of them."""

    def __init__(self, core: Tensor, sketch: Tensor) -> None:
        self.core, self.sketch = core, sketch
        self.turned, self.basis = torch.empty_like(sketch), torch.empty_like(sketch)
        self.core_out = torch.empty_like(core)

    @property
    def addresses(self) -> list[int]:
        arrays = (self.sketch, self.turned, self.basis, self.core, self.core_out)
        return [array.data_ptr() for array in arrays]


def _launch_moves(moves: Sequence[_Move], device: torch.device, padded: int) -> None:
    tile = basis_tile(padded)
    lines: list[int] = []
    counts: list[int] = []
    for move in moves:
        rank, dim = move.sketch.shape
        count = triton.cdiv(dim, tile.rows)
        lines += [*move.addresses, dim, rank, sum(counts), count]
        counts.append(count)
    programs, square = sum(counts), (padded, padded)
    shared = {"table": upload(lines, device), "LINE": LINE, "RANK": padded}
    parts = torch.empty(programs, *square, dtype=torch.float64, device=device)
    triangles, inverses = (parts.new_empty(len(moves), *square) for _ in range(2))
    blocks = upload(counts, device, block_table)
    walk = {"blocks": blocks, "BLOCK_D": tile.rows, "num_warps": tile.warps}
    launch(_gram_kernel, (programs,), device, parts=parts, **walk, **shared)
    for second in (False, True):
        launch(
            _factor_kernel,
            (len(moves),),
            device,
            parts=parts,
            triangles=triangles,
            inverses=inverses,
            EPS=torch.finfo(torch.float32).eps,
            DEPENDENT=DEPENDENT,
            SECOND=second,
            num_warps=core_warps(padded, torch.float64),
            **shared,
        )
        launch(
            _rotate_kernel,
            (programs,),
            device,
            inverses=inverses,
            parts=parts,
            SEED=SEED,
            SECOND=second,
            **walk,
            **shared,
        )
