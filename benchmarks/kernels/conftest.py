"""The machine's own ceilings, measured in the same session, beside every figure."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from benchmarks.heap import hold_freed_memory
from benchmarks.kernels.report import Ceilings

# Far more than the caches hold, and long enough to be timed.
COPY_FLOATS = 2**25
GEMM_SIZE = 1536
ATTEMPTS = 7


def _fastest(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(ATTEMPTS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@pytest.fixture(scope="session")
def ceilings() -> Ceilings:
    """Bytes per second of a copy, read and written, and flops per second of a float32 GEMM."""
    hold_freed_memory()
    source = torch.ones(COPY_FLOATS)
    target = torch.empty_like(source)
    left = torch.ones(GEMM_SIZE, GEMM_SIZE)
    product = torch.empty_like(left)
    return Ceilings(
        copy=2 * source.nbytes / _fastest(lambda: target.copy_(source)),
        gemm=2 * GEMM_SIZE**3 / _fastest(lambda: torch.mm(left, left, out=product)),
    )
