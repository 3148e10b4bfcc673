"""What the machine itself reaches: the rates that bounds are made from."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Far more than the caches hold, and long enough to be timed.
COPY_FLOATS = 2**25
GEMM_SIZE = 1536
ATTEMPTS = 7


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second of a large copy, and flops per second of a large float32 GEMM."""

    copy: float
    gemm: float


def measure_ceilings() -> Ceilings:
    """On the CPU, the fastest of some attempts; a copy's bytes are read and written."""
    source = torch.ones(COPY_FLOATS)
    target = torch.empty_like(source)
    left = torch.ones(GEMM_SIZE, GEMM_SIZE)
    product = torch.empty_like(left)
    return Ceilings(
        copy=2 * source.nbytes / _fastest(lambda: target.copy_(source)),
        gemm=2 * GEMM_SIZE**3 / _fastest(lambda: torch.mm(left, left, out=product)),
    )


def _fastest(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(ATTEMPTS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
