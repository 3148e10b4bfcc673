"""Curvature in float32, where torch may let products be TF32 on a GPU, or bfloat16 on a CPU.

Their bits, ten and seven, hide eigenvalues of Sigma that are small beside the largest, but not
beside the damping.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar

import torch

# What holds the setting, by device. mkldnn.matmul is missing from torch's annotations.
_mkldnn: Any = torch.backends.mkldnn
_OWNERS: tuple[Any, ...] = (torch.backends.cuda.matmul, _mkldnn.matmul)

# Where autocast may be on: the CPU, and the accelerator that torch was built for.
_ACCELERATOR = torch.accelerator.current_accelerator()
_DEVICES = ("cpu",) if _ACCELERATOR is None else ("cpu", _ACCELERATOR.type)


class _Inside:
    """How many are inside of `without_tf32`, in all threads, and what the first one found."""

    lock = threading.Lock()
    count = 0
    before: ClassVar[list[str]] = []


@contextmanager
def without_tf32() -> Iterator[None]:
    """Inside, products of float32 are float32's own; the setting is the process's."""
    entered = False
    # Interrupts may come in anywhere.
    try:
        with _Inside.lock:
            if not _Inside.count:
                _Inside.before = [owner.fp32_precision for owner in _OWNERS]
            _Inside.count, entered = _Inside.count + 1, True
            for owner in _OWNERS:
                owner.fp32_precision = "ieee"
        yield
    finally:
        if entered:
            with _Inside.lock:
                _Inside.count -= 1
                if not _Inside.count:
                    for owner, value in zip(_OWNERS, _Inside.before, strict=True):
                        owner.fp32_precision = value


def without_autocast() -> AbstractContextManager[None]:
    """Inside, ops have the dtypes of their tensors, whatever a loop under torch.autocast asks."""
    enabled = [device for device in _DEVICES if torch.is_autocast_enabled(device)]
    # Nothing is entered in most steps, nor in most layers' backwards.
    return _disable(enabled) if enabled else nullcontext()


def outside_modes() -> AbstractContextManager[None]:
    """Inside, a step is taken as it is without autocast and inference mode.

    What is made in inference mode, as the states of a first step would be, has no version, and
    cannot be written to outside of it.
    """
    return _leave_inference() if torch.is_inference_mode_enabled() else without_autocast()


@contextmanager
def _leave_inference() -> Iterator[None]:
    # It turns gradients on.
    with torch.inference_mode(False), torch.no_grad(), without_autocast():
        yield


@contextmanager
def _disable(devices: Sequence[str]) -> Iterator[None]:
    with ExitStack() as stack:
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
