"""Freed memory is kept, so that page faults do not decide a comparison of a few percent.

glibc gives the top of its heap back to the system when much of it is free, and maps large blocks
one by one. Whether a step then faults its pages in again depends on what happens to lie above
them: the same step of the CNN at batch 512 takes 10,000 to 50,000 faults, at about 2 µs each.
"""

from __future__ import annotations

import ctypes
import platform
import resource

# malloc.h: trim the top of the heap above this size, -1 for never; how many blocks may be mapped.
# With M_MMAP_THRESHOLD at 1 GiB instead, blocks above 64 MiB were still mapped.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4

_state = "as the system has it"


def hold_freed_memory() -> str:
    """Make this process keep the memory it frees, all contenders alike; returns what was done.

    Elsewhere than with glibc nothing is changed, which the returned words say.
    """
    global _state  # noqa: PLW0603  (malloc's settings are the process's, and so is this)
    library, version = platform.libc_ver()
    if library != "glibc":
        _state = f"as the system has it ({library or 'no glibc'})"
        return _state
    mallopt = ctypes.CDLL(None).mallopt
    done = [mallopt(M_TRIM_THRESHOLD, -1), mallopt(M_MMAP_MAX, 0)]
    _state = f"freed memory is kept (glibc {version})" if all(done) else "glibc refused to keep it"
    return _state


def describe_heap() -> str:
    """What `hold_freed_memory` did in this process."""
    return _state


def minor_faults() -> int:
    """Page faults of this process so far that needed no disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
