"""Curvature in float32, where torch may let products and convolutions be TF32 on a GPU.

cuDNN's are TF32 unless the user says otherwise. Its ten bits hide eigenvalues of Sigma that are
small beside the largest, but not beside the damping.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# What holds the setting, and what it is: since torch 2.9, and before.
_OWNERS: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
_NAME = "allow_tf32"
_EXACT: object = False
if hasattr(torch.backends.cudnn, "conv"):
    _OWNERS = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    _NAME, _EXACT = "fp32_precision", "ieee"


@contextmanager
def without_tf32() -> Iterator[None]:
    """Inside, products and convolutions of float32 are float32's own."""
    before = [getattr(owner, _NAME) for owner in _OWNERS]
    for owner in _OWNERS:
        setattr(owner, _NAME, _EXACT)
    try:
        yield
    finally:
        for owner, value in zip(_OWNERS, before, strict=True):
            setattr(owner, _NAME, value)
