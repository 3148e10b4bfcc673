"""Block sizes by op, rank and dtype: a table, with the reason of each line.

Nothing is autotuned: the update kernels work in place, so a trial run would be a step taken. The
table is the same for sm_80, sm_90 and sm_100: what binds are registers (65,536 per SM on all three)
and not shared memory (163, 227 and 227 KiB per program, of which no kernel uses half).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Ranks are padded to a power of two. Beyond 64 the products X U take longer than moving X, their
# unrolled tiles spill, and torch's own matrix products are the better kernels.
MAX_RANK = 64
# Of the kernels that move the basis, in float64: wider ones spill.
MAX_REFRESH_RANK = 32
# Of the core's powers other than 1, in float64: wider ones spill.
MAX_ROOT_RANK = 32
# Of its inverse, in float32: above MAX_RANK M spills, and is swept in memory by so many rows.
MAX_CORE_RANK = 128
SWEEP_ROWS, SWEEP_WARPS = 32, 8
# tl.dot's operands have at least 16 rows and columns.
MIN_RANK = 16

# How rows and updates form float32 products, by what torch calls the precision. "ieee" is float32's
# own rounding, "tf32" keeps 10 bits, "tf32x3" makes up for most of what they lose.
PRECISIONS = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}
# Of the curvature, whose small eigenvalues a coarser rounding would hide.
CURVATURE_PRECISION = "ieee"

# Elements of one program of the flat update: 16 per thread at 128 threads, so that each of at most
# five streams has four 16-byte accesses in flight per thread.
UPDATE_BLOCK = 2048
UPDATE_WARPS = 4

# Rows or columns whose mean squares one program blends: two 128-byte lines of each part's sums.
AXIS_BLOCK = 64

# Rows whose products one program of the sketch sums up: partial sums are then r / 256 of the rows.
ROWS_PER_SPLIT = 512


class Tile(NamedTuple):
    """Rows and columns of a program's tile, and how it is run."""

    rows: int
    columns: int
    warps: int
    stages: int


def product_precision() -> str:
    """How `torch.get_float32_matmul_precision()` has the products of rows and updates formed."""
    try:
        return PRECISIONS[torch.get_float32_matmul_precision()]
    except RuntimeError:
        # torch.backends.cuda.matmul.fp32_precision was set to "tf32", which the older name refuses.
        return PRECISIONS["high"]


def pad_rank(rank: int) -> int:
    """The width of the tiles that hold `rank` columns."""
    return max(MIN_RANK, 1 << (rank - 1).bit_length())


def row_tile(padded_rank: int) -> Tile:
    """Of the kernels that walk d for a block of rows, twice.

    16 rows, as the number of programs is what hides latency (batch 128 gives 8) and as more make
    the compiler spill the unrolled "ieee" product. 64 columns are at least 8 bytes a thread of each
    access, also for 16-bit rows. Beyond rank 32 loads made ahead would spill.
    """
    return Tile(16, 64, 8, 1) if padded_rank > 32 else Tile(16, 64, 4, 2)


def walks_twice(blocks: int, columns: int) -> bool:
    """Whether one kernel of so many programs walks rows of D0 twice, for T and for the norms of D.

    It spares a launch and reads D0 from memory once. But a program is all that walks its rows: 64
    columns take it about half a microsecond, so a few programs with long rows are slower than
    another launch, which cuts the rows. Modelled, not measured: 128 programs are about as many as
    there are multiprocessors (108 to 148), and 2,048 columns 16 microseconds.
    """
    return blocks >= 128 or columns <= 2048


def sketch_tile() -> Tile:
    """Of A'Y: 32 columns of A to a program, so that d = 3072 gives 96 of them."""
    return Tile(32, 32, 4, 2)


def update_tile(padded_rank: int) -> Tile:
    """Of the update in tiles: rows of 64 elements are two full 128-byte lines.

    Where it forms D itself, eight warps, as T U' is unrolled over the rank: on 4 it spills. At rank
    0 D is given, and the tile as large as the flat update's.
    """
    if padded_rank == 0:
        return Tile(32, 64, UPDATE_WARPS, 1)
    return Tile(32 if padded_rank <= 32 else 16, 64, 8, 1)


def basis_tile(padded_rank: int) -> Tile:
    """Of the kernels that move the basis, in float64: d = 3072 makes 96 programs."""
    return Tile(32, padded_rank, 4, 1)


def core_warps(padded_rank: int, dtype: torch.dtype) -> int:
    """Warps that hold a [rank, rank] tile with 16 registers per thread, 8 in float64 to rank 32.

    Two such tiles and their temporaries are alive where M is inverted, six where the basis moves.
    """
    elements = padded_rank * padded_rank
    if dtype == torch.float64:
        return min(16, max(1, elements // 128))
    return max(1, elements // 512)


def root_warps(padded_rank: int) -> int:
    """Warps that hold a [rank, rank] tile of float64 with 8 registers per thread.

    Four such tiles and the operands of a product are alive in a step of Newton's method.
    """
    return padded_rank * padded_rank // 128


def symmetric_tile(size: int, dtype: torch.dtype) -> Tile:
    """Of a symmetric product of `size` rows: a square, and the columns that one step takes in.

    128 x 128 sums are 64 registers a thread of eight warps, and 64 columns of both operands 32 KiB
    a stage in 16 bits. Small matrices make more programs of 64 x 64; float32 products, which are
    unrolled with "ieee", of 32 columns.
    """
    if dtype == torch.float32:
        return Tile(64, 32, 8, 2)
    return Tile(128, 64, 8, 3) if size > 512 else Tile(64, 64, 4, 3)


def row_blocks(n: int, rows: int) -> int:
    """Blocks of so many rows that one program of Y = A U walks: parts of Y'Y are at most 256."""
    return max(1, -(-n // (256 * rows)))


def sketch_splits(n: int) -> int:
    """Parts into which the rows are cut for A'Y; a function of n alone, so sums repeat exactly."""
    return min(64, max(1, n // ROWS_PER_SPLIT))


def commit_tile(padded_rank: int) -> Tile:
    """Of a step's end, whose last program factors and inverts a core in float64: `basis_tile` with
    the warps of `root_warps`.
    """
    return Tile(32, padded_rank, max(4, root_warps(padded_rank)), 1)
