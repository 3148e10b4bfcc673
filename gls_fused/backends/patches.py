"""Sketches of images on a CPU, where convolutions of few channels are slow.

Such are those of the groups of a convolution, each of which is an image of its own. Patches hardly
longer than a row of Y = A U are built, which takes hardly more memory than Y, and

    Y'Y = U' (A'A) U,   A'Y = (A'A) U

so that no convolution's weight gradient is taken. Patches of one pixel are there already, and Y and
A'Y are products with them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from gls_fused import reference
from gls_fused.reference import Window

# Patches of up to so many times the rank, where this was faster on a CPU; longer ones were slower.
LONGEST = 1.6


def sketch_images(
    images: Tensor, basis: Tensor, window: Window, *, ones: bool
) -> tuple[Tensor, Tensor, Tensor, int]:
    """See `gls_fused.reference.sketch_images`."""
    pixels, rank = math.prod(window.kernel_size), basis.shape[1]
    if not images.is_cpu or window.output_padding is not None:
        return reference.sketch_images(images, basis, window, ones=ones)
    if pixels == 1 and not any(window.padding):
        return _sketch_pixels(images.to(basis.dtype), basis, window, ones=ones)
    short = images.shape[1] * pixels <= LONGEST * rank
    if len(window.kernel_size) != 2 or not short:
        return reference.sketch_images(images, basis, window, ones=ones)
    patches = F.unfold(
        images.to(basis.dtype),
        window.kernel_size,
        dilation=window.dilation,
        padding=window.padding,
        stride=window.stride,
    )  # [N, k, oh ow]
    count = patches.shape[0] * patches.shape[2]
    gram = torch.bmm(patches, patches.mT).sum(0)
    if ones:
        last = torch.cat([patches.sum((0, 2)), gram.new_full((1,), count)])
        gram = torch.cat([torch.cat([gram, last[None, :-1]]), last[:, None]], dim=1)
    sketch = gram @ basis
    return basis.T @ sketch, sketch, gram.trace(), count


def _sketch_pixels(
    images: Tensor, basis: Tensor, window: Window, *, ones: bool
) -> tuple[Tensor, Tensor, Tensor, int]:
    for dim, step in enumerate(window.stride, start=2):
        images = images[(slice(None),) * dim + (slice(None, None, step),)]
    pixels = images.flatten(2)  # [N, c, oh ow]
    channels, count = pixels.shape[1], pixels.shape[0] * pixels.shape[2]
    y = basis[:channels].T @ pixels  # [N, r, oh ow]
    trace = pixels.square().sum()
    if ones:
        y = y + basis[channels, :, None]
        trace = trace + count
    sketch = torch.bmm(pixels, y.mT).sum(0)
    if ones:
        sketch = torch.cat([sketch, y.sum((0, 2))[None]])
    return torch.bmm(y, y.mT).sum(0), sketch, trace, count
