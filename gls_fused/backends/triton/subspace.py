"""The basis moves: a Cholesky QR done twice in float64, and M+ = T (M + nu I)^-1 T'.

    _gram_kernel     parts of Z'Z, a block of d to a program
    _factor_kernel   R with R'R = Z'Z, and R^-1; a column that depends on those before it gets a
                     zero row in R, which is decided on the device
    _rotate_kernel   Q = Z R^-1, random columns in place of dependent ones, and parts of Q'Q
    _factor_kernel   again, of Q'Q; then T = R2 R1 and M+
    _rotate_kernel   again: U+ = Q R2^-1

Z = Q R holds whatever stands in a column of Q whose row in R is zero, so the second round completes
the basis without changing what it spans. float64, because the Gram matrix squares the condition:
of float32 data it is then at most 1e12, which leaves Q orthogonal to 1e-4 after the first round and
to float32's rounding after the second.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gls_fused import reference
from gls_fused.backends.triton.configs import MAX_REFRESH_RANK, basis_tile, core_warps, pad_rank
from gls_fused.backends.triton.core import invert_tile
from gls_fused.backends.triton.launch import launch, needs_reference

# A column whose part across the columns before it is below 1e-6 of its norm, some ten roundings of
# float32, is taken as dependent; this is the square.
DEPENDENT = 1e-12
SEED = 20230517


@triton.jit
def _gram_kernel(
    sketch,  # [dim, rank]
    parts,  # float64 [programs, RANK, RANK]
    dim,
    rank,
    row_stride,
    column_stride,
    RANK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    i = block * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.arange(0, RANK)
    z = tl.load(
        sketch + i[:, None] * row_stride + c[None, :] * column_stride,
        mask=(i < dim)[:, None] & (c < rank)[None, :],
        other=0.0,
    ).to(tl.float64)
    gram = tl.dot(tl.trans(z), z, out_dtype=tl.float64)
    tl.store(parts + block * RANK * RANK + c[:, None] * RANK + c[None, :], gram)


@triton.jit
def _factor_kernel(
    parts,  # float64 [count, RANK, RANK]
    triangle,  # float64 [RANK, RANK]: R, written in the first round, read in the second
    inverse,  # float64 [RANK, RANK]: R^-1 of this round
    core,  # [rank, rank], read in the second round
    core_out,  # [rank, rank], written in the second round
    count,
    rank,
    core_row_stride,
    core_column_stride,
    EPS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    SECOND: tl.constexpr,
    RANK: tl.constexpr,
):
    c = tl.arange(0, RANK)
    i, j = c[:, None], c[None, :]
    at = i * RANK + j
    g = tl.zeros([RANK, RANK], dtype=tl.float64)
    for part in range(count):
        g += tl.load(parts + part * RANK * RANK + at)

    # Gaussian elimination on [G, I]: R in the upper triangle, and L^-1, whose transpose is R^-1.
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
    tl.store(inverse + j * RANK + i, eliminated)

    if SECOND:
        inside = (i < rank) & (j < rank)
        m = tl.load(core + i * core_row_stride + j * core_column_stride, mask=inside, other=0.0).to(
            tl.float64
        )
        nu = tl.sum(tl.where(i == j, m, 0.0)) * rank * EPS
        nu = tl.maximum(nu, 1e-300)
        unit_core = (m + tl.trans(m)) * 0.5 / nu + tl.where(i == j, 1.0, 0.0)
        middle, _ = invert_tile(unit_core, 0.0 * nu, rank, RANK)
        t = tl.dot(factor, tl.load(triangle + at), out_dtype=tl.float64)
        moved = tl.dot(t, middle, out_dtype=tl.float64)
        moved = tl.dot(moved, tl.trans(t), out_dtype=tl.float64) / nu
        moved = (moved + tl.trans(moved)) * 0.5
        tl.store(core_out + i * rank + j, moved.to(core_out.dtype.element_ty), mask=inside)
    else:
        tl.store(triangle + at, factor)


@triton.jit
def _rotate_kernel(
    sketch,  # [dim, rank]
    inverse,  # float64 [RANK, RANK]
    basis,  # [dim, rank], written
    parts,  # float64 [programs, RANK, RANK], written in the first round
    dim,
    rank,
    row_stride,
    column_stride,
    basis_row_stride,
    basis_column_stride,
    SEED: tl.constexpr,
    SECOND: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    i = block * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.arange(0, RANK)
    mask = (i < dim)[:, None] & (c < rank)[None, :]
    z = tl.load(
        sketch + i[:, None] * row_stride + c[None, :] * column_stride, mask=mask, other=0.0
    ).to(tl.float64)
    turn = tl.load(inverse + c[:, None] * RANK + c[None, :])
    q = tl.dot(z, turn, out_dtype=tl.float64)
    diagonal = tl.sum(tl.where(c[:, None] == c[None, :], turn, 0.0), axis=0)
    # Entries of variance 1 / dim: about as long as the columns beside them.
    noise = tl.rand(SEED, (i[:, None] * RANK + c[None, :]).to(tl.int32)).to(tl.float64)
    noise = (2.0 * noise - 1.0) * tl.sqrt(3.0 / tl.cast(dim, tl.float64))
    q = tl.where(diagonal[None, :] == 0.0, noise, q)
    q = tl.where(mask, q, 0.0).to(basis.dtype.element_ty)
    out = basis + i[:, None] * basis_row_stride + c[None, :] * basis_column_stride
    tl.store(out, q, mask=mask)
    if not SECOND:
        wide = q.to(tl.float64)
        gram = tl.dot(tl.trans(wide), wide, out_dtype=tl.float64)
        tl.store(parts + block * RANK * RANK + c[:, None] * RANK + c[None, :], gram)


def refresh_subspace(core: Tensor, sketch: Tensor) -> tuple[Tensor, Tensor]:
    """See `gls_fused.reference.refresh_subspace`: the same U+ M+ U+' in five launches.

    Numerics: float32 in and out, float64 between; ranks to 32. float64 statistics and larger ranks
        take the reference's ops. What a column of Z has across the others is lost below 1e-6 of it.
    """
    dim, rank = sketch.shape
    if needs_reference(core.dtype, rank, MAX_REFRESH_RANK):
        return reference.refresh_subspace(core, sketch)
    device, padded = sketch.device, pad_rank(rank)
    tile = basis_tile(padded)
    programs = triton.cdiv(dim, tile.rows)
    parts = sketch.new_empty(programs, padded, padded, dtype=torch.float64)
    triangle, inverse = (parts.new_empty(padded, padded) for _ in range(2))
    turned, basis = (torch.empty_like(sketch).contiguous() for _ in range(2))
    core_out = core.new_empty(rank, rank)
    shared = {"rank": rank, "RANK": padded}
    launch(
        _gram_kernel,
        (programs,),
        device,
        sketch=sketch,
        parts=parts,
        dim=dim,
        row_stride=sketch.stride(0),
        column_stride=sketch.stride(1),
        BLOCK_D=tile.rows,
        num_warps=tile.warps,
        **shared,
    )
    for second, source, target in ((False, sketch, turned), (True, turned, basis)):
        launch(
            _factor_kernel,
            (1,),
            device,
            parts=parts,
            triangle=triangle,
            inverse=inverse,
            core=core,
            core_out=core_out,
            count=programs,
            core_row_stride=core.stride(0),
            core_column_stride=core.stride(1),
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
            sketch=source,
            inverse=inverse,
            basis=target,
            parts=parts,
            dim=dim,
            row_stride=source.stride(0),
            column_stride=source.stride(1),
            basis_row_stride=target.stride(0),
            basis_column_stride=target.stride(1),
            SEED=SEED,
            SECOND=second,
            BLOCK_D=tile.rows,
            num_warps=tile.warps,
            **shared,
        )
    return basis, core_out
