"""Keeping freed memory: that it ends the page faults of large blocks that come and go."""

import platform
import subprocess
import sys

import pytest

from benchmarks.harness import heap

# Blocks above glibc's threshold for mapping, whose pages are touched and given back each time.
COUNT = """
import sys, torch
from benchmarks.harness.heap import hold_freed_memory, minor_faults
if sys.argv[1] == "held":
    assert "kept" in hold_freed_memory()
# The heap grows until the block fits between what else was allocated.
for step in range(16):
    before = minor_faults()
    torch.ones(2 ** 24)
print(minor_faults() - before)
"""


def count_faults(how: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", COUNT, how], check=True, stdout=subprocess.PIPE, text=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc only")
def test_held_memory_is_not_faulted_in_again():
    # 64 MiB; fewer faults than pages of 4 KiB where the system's are larger.
    assert count_faults("held") == 0 < count_faults("free")


def test_without_glibc_nothing_is_changed_and_said(monkeypatch):
    monkeypatch.setattr(heap, "_state", "")
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", lambda _: pytest.fail("malloc was touched"))
    assert heap.hold_freed_memory() == heap.describe_heap() == "as the system has it (no glibc)"
