"""How kernels are started, and the tables that tell one launch about many tensors."""

from __future__ import annotations

import contextlib
import functools
import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

# Tables that are kept: a step's gradients come back to a few addresses once training is under way.
KEPT_TABLES = 64

ELEMENTS = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

_tables: dict[tuple[torch.device, tuple[int, ...]], tuple[Tensor, Tensor]] = {}
# Uploads that a captured graph repeats read their host side again at each replay.
_captured: list[tuple[Tensor, Tensor]] = []


def launch(kernel: Any, programs: tuple[int, ...], device: torch.device, **arguments: Any) -> None:
    """Run a kernel on the current stream of `device`; no program, no launch."""
    if not all(programs):
        return
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[programs](**arguments)


def upload(values: Sequence[int], device: torch.device) -> Tensor:
    """An int64 table on the device, without a host synchronisation; kept for the same values."""
    key = (device, tuple(values))
    if key in _tables:
        return _tables[key][1]
    host = torch.tensor(key[1], dtype=torch.int64)
    if device.type == "cuda":
        host = host.pin_memory()
    table = host.to(device, non_blocking=True)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # Filled only when the graph is replayed, so of no use to anyone else.
        _captured.append((host, table))
        return table
    if len(_tables) >= KEPT_TABLES:
        _tables.pop(next(iter(_tables)))
    _tables[key] = (host, table)
    return table


@functools.cache
def bits(value: float) -> int:
    """A float64 as the int64 of the same bits, for a table; kernels cast it back."""
    (found,) = struct.unpack("<q", struct.pack("<d", value))
    return int(found)


def needs_reference(dtype: torch.dtype, rank: int, most: int) -> bool:
    """Whether the kernels with matrix products leave this to the reference's ops.

    They take float32 statistics (of float32, bfloat16 and float16 layers) and ranks up to `most`.
    """
    return dtype != torch.float32 or rank > most or rank == 0
