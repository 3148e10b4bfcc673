"""How kernels are started, and the tables that tell one launch about many tensors."""

from __future__ import annotations

import contextlib
import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

# Tables that are kept: a step's gradients come back to a few addresses once training is under way.
KEPT_TABLES = 256

ELEMENTS = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

# Ops that a traced backward contains: torch.compile looks at their shapes, and not inside.
_library = torch.library.Library("gls_fused_triton", "DEF")

_Expand = Callable[[Sequence[Any]], Sequence[int]]

_tables: dict[tuple[torch.device, _Expand, tuple[Any, ...]], tuple[Tensor, Tensor]] = {}
# What the replays of captured graphs read, for good.
_captured: list[tuple[Tensor, Tensor]] = []


def launch(kernel: Any, programs: tuple[int, ...], device: torch.device, **arguments: Any) -> None:
    """Run a kernel on the current stream of `device`; no program, no launch."""
    if not all(programs):
        return
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[programs](**arguments)


def upload(values: Sequence[Any], device: torch.device, expand: _Expand = tuple) -> Tensor:
    """An int64 table on the device, without a host synchronisation; kept for the same values.

    Args:
        expand: makes the table's words from the values, where those are fewer.
    """
    key = (device, expand, tuple(values))
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    pair = _tables.pop(key, None)
    # One uploaded in a capture is filled only when the graph is replayed: of no use to others.
    kept = pair is not None or not capturing
    if pair is None:
        host = torch.tensor(expand(values), dtype=torch.int64, device="cpu")
        if device.type == "cuda":
            host = host.pin_memory()
        pair = host, host.to(device, non_blocking=True)
    if kept:
        # The one unused for longest stands first.
        _tables[key] = pair
        if len(_tables) > KEPT_TABLES:
            _tables.pop(next(iter(_tables)))
    if capturing:
        _captured.append(pair)
    return pair[1]


def block_table(counts: Sequence[int]) -> list[int]:
    """int64 [programs, 2] for `upload`: the entry, and which of its blocks, of every program."""
    return [
        word
        for entry, count in enumerate(counts)
        for block in range(count)
        for word in (entry, block)
    ]


def traceable(schema: str, shaped: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Make a function of tensors an op of torch's, under which it runs from then on.

    Args:
        schema: such as "double(Tensor x) -> Tensor".
        shaped: gives results of the right shapes, strides and dtypes, whose values do not matter.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    torch.library.register_fake(f"{_library.ns}::{name}", shaped, lib=_library)

    def register(function: Callable[..., Any]) -> Any:
        for device in ("CUDA", "CPU"):
            _library.impl(name, function, device)
        return getattr(torch.ops.gls_fused_triton, name)

    return register


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
