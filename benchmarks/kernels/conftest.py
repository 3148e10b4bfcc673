"""The machine's own ceilings, measured in the same session, beside every figure."""

from __future__ import annotations

import pytest

from benchmarks.harness.ceilings import Ceilings, measure_ceilings
from benchmarks.harness.heap import hold_freed_memory


@pytest.fixture(scope="session")
def ceilings() -> Ceilings:
    """Measured once."""
    hold_freed_memory()
    return measure_ceilings()
