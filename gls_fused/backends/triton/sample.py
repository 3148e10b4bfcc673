"""Which rows of a layer's inputs a sketch takes, and where in memory they are.

Rows are those of a matrix, or the patches of images, which are not built: an element's address
follows from its output position and its place in the patch. Of many rows those count that
`gls_fused.capture.rows.sample_places` names, and nothing is copied.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from gls_fused.reference import Window, count_patches


@triton.jit
def _sample_place(stretch, total, most, draw):
    """See `gls_fused.capture.rows.sample_places`, of some stretches; int64."""
    mask = (1 << 31) - 1
    bits = (stretch * 0x9E3779B1 + draw * 0x85EBCA6B) & mask
    bits = ((bits ^ (bits >> 15)) * 0x2C1B3C6D) & mask
    bits = ((bits ^ (bits >> 12)) * 0x297A2D39) & mask
    bits = bits ^ (bits >> 15)
    return ((stretch << 16) + (bits >> 15)) * total // (tl.cast(most, tl.int64) << 16)


@triton.jit
def _word(window, at):
    return tl.load(window + at).to(tl.int32)


@triton.jit
def _locate(i, total, most, draw, row_stride, window,
            SAMPLED: tl.constexpr, DRAWN: tl.constexpr, IMAGES: tl.constexpr):  # fmt: skip
    """Of rows i, int64: the offset of the row, or of its image, and the patch's first pixel."""
    place, top, left = i.to(tl.int64), i, i
    if SAMPLED:
        step = tl.load(draw) if DRAWN else tl.zeros([], dtype=tl.int64)
        place = _sample_place(place, total, most, step)
    if IMAGES:
        across = _word(window, 7)
        positions = _word(window, 6) * across
        number, position = place // positions, (place % positions).to(tl.int32)
        top = position // across * _word(window, 10) - _word(window, 12)
        left = position % across * _word(window, 11) - _word(window, 13)
        groups = tl.load(window)
        offset = number // groups * row_stride + number % groups * tl.load(window + 1)
    else:
        offset = place * row_stride
    return offset, top, left


@triton.jit
def _load_tile(rows, where, j, mask, column_stride, window, IMAGES: tl.constexpr):
    """A tile of A in float32: the rows that `_locate` found, the columns j."""
    offset, top, left = where
    if IMAGES:
        # In 32 bits: no image of a group has more elements.
        wide = _word(window, 9)
        taps = _word(window, 8) * wide
        j = j.to(tl.int32)
        tap = j % taps
        y = top[:, None] + (tap // wide * _word(window, 14))[None, :]
        x = left[:, None] + (tap % wide * _word(window, 15))[None, :]
        mask = mask & (y >= 0) & (y < _word(window, 4)) & (x >= 0) & (x < _word(window, 5))
        inside = (j // taps * column_stride)[None, :]
        inside += y * _word(window, 2) + x * _word(window, 3)
        at = offset[:, None] + inside
    else:
        at = offset[:, None] + j[None, :] * column_stride
    return tl.load(rows + at, mask=mask, other=0.0).to(tl.float32)


class Geometry(NamedTuple):
    """What the kernels take of the rows of a matrix, or of images.

    Attributes:
        total: rows that there are.
        taken: how many of them count.
        size: columns, without the one.
        row_stride, column_stride: of images, from one to the next and from channel to channel.
        window: of images int64 [16]: groups, the stride from one to the next, and then a number
            down and one across each: strides, size, size of the output, and of the window size,
            stride, padding and dilation. Of rows empty.
    """

    total: int
    taken: int
    size: int
    row_stride: int
    column_stride: int
    window: tuple[int, ...] = ()

    @property
    def weight(self) -> float:
        """How many rows each of those that count stands for."""
        return self.total / self.taken if self.taken else 1.0


def geometry_of_rows(rows: Tensor, most: int) -> Geometry:
    """Of rows [n, k], of which at most so many count."""
    (n, size), (down, across) = rows.shape, rows.stride()
    taken = min(n, most)
    return Geometry(n, taken, size, down, across)


def geometry_of_images(images: Tensor, window: Window, groups: int, most: int) -> Geometry:
    """Of the patches of images [N, g c, h, w] or [N, g c, w], at most so many of which count."""
    _, channels, *size = images.shape
    image_stride, channel_stride, *strides = images.stride()
    many, *out = count_patches(images, window, groups)
    each, total = channels // groups, many * math.prod(out)
    # Of a line of pixels, an image of height 1, what there is down.
    down = [0, 1, 1, 1, 1, 0, 1] if len(size) == 1 else []
    words = [groups, each * channel_stride]
    for i, axis in enumerate([strides, size, out, *window[:4]]):
        words += [*down[i : i + 1], *axis]
    columns = each * math.prod(window.kernel_size)
    return Geometry(total, min(total, most), columns, image_stride, channel_stride, tuple(words))
