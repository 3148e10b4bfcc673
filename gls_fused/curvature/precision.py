"""Curvature in float32, where torch may let products be TF32 on a GPU, or bfloat16 on a CPU.

Their bits, ten and seven, hide eigenvalues of Sigma that are small beside the largest, but not
beside the damping.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch

# What holds the setting, by device. mkldnn.matmul is missing from torch's annotations.
_mkldnn: Any = torch.backends.mkldnn
_OWNERS: tuple[Any, ...] = (torch.backends.cuda.matmul, _mkldnn.matmul)


class _Inside:
    """How many are inside of `without_tf32`, in all threads, and what the first one found."""

    lock = threading.Lock()
    count = 0
    before: ClassVar[list[str]] = []


@contextmanager
def without_tf32() -> Iterator[None]:
    """Inside, products of float32 are float32's own; the setting is the process's."""
    with _Inside.lock:
        if not _Inside.count:
            _Inside.before = [owner.fp32_precision for owner in _OWNERS]
            for owner in _OWNERS:
                owner.fp32_precision = "ieee"
        _Inside.count += 1
    try:
        yield
    finally:
        with _Inside.lock:
            _Inside.count -= 1
            if not _Inside.count:
                for owner, value in zip(_OWNERS, _Inside.before, strict=True):
                    owner.fp32_precision = value


@contextmanager
def without_autocast() -> Iterator[None]:
    """Inside, ops have the dtypes of their tensors, whatever a loop under torch.autocast asks."""
    accelerator = torch.accelerator.current_accelerator()
    devices = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    with ExitStack() as stack:
        for device in devices:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
