"""Captured layers in graphs that torch.compile traces: ops of tensors and plain values alone.

A traced backward can leave nothing in a Python object, so the sums over the rows leave it as the
gradient of one more input, the tally: autograd then adds them up over calls and micro-batches, and
counts them when the weight's gradient is counted. The ops are composite: tracing goes through them,
and the graph holds only torch's ops and the backend's. All that changes from step to step is an
argument, so that layers of one shape share a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from gls_fused.backends.dispatch import resolve_backend
from gls_fused.capture.rows import Conv2d, ImageRows, Linear, LinearRows, Rows
from gls_fused.reference import DenseInverse, Inverse, SubspaceInverse, Window

RowsT = TypeVar("RowsT", bound=Rows)

_ARGUMENTS = (
    "Tensor inputs, Tensor weight, Tensor? bias, Tensor? tally, Tensor? test_matrix,"
    " Tensor[] inverse, bool ones, bool at_backward, str backend"
)
_library = torch.library.Library("gls_fused", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(f"traced_linear({_ARGUMENTS}) -> Tensor")  # type: ignore[no-untyped-call]
_library.define(f"traced_conv2d({_ARGUMENTS}, int[] window) -> Tensor")  # type: ignore[no-untyped-call]


def traced_linear(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: LinearRows,
    backend: str,
    tally: Tensor | None,
) -> Tensor:
    """`rows.Linear` of what `rows` holds now; the sums become the gradient of `tally`."""
    arguments = _flatten(rows, backend, tally)
    return torch.ops.gls_fused.traced_linear(inputs, weight, bias, *arguments)  # type: ignore[no-any-return]


def traced_conv2d(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: ImageRows,
    backend: str,
    tally: Tensor | None,
) -> Tensor:
    """`gls_fused.capture.rows.Conv2d`, as `traced_linear`."""
    arguments = _flatten(rows, backend, tally)
    window = [size for pair in rows.window for size in pair]
    return torch.ops.gls_fused.traced_conv2d(images, weight, bias, *arguments, window)  # type: ignore[no-any-return]


def _flatten(
    rows: Rows, backend: str, tally: Tensor | None
) -> tuple[Tensor | None, Tensor | None, list[Tensor], bool, bool, str]:
    inverse = [] if rows.inverse is None else list(rows.inverse)
    tally = tally if rows.gathers else None
    return tally, rows.test_matrix, inverse, rows.ones, rows.at_backward, backend


def _fill(
    rows: RowsT,
    tally: Tensor | None,
    test_matrix: Tensor | None,
    inverse: Sequence[Tensor],
    ones: bool,
    at_backward: bool,
    backend: str,
) -> RowsT:
    """What `_flatten` took apart, as the rows of one call."""
    parts: Inverse | None = None
    if inverse:
        parts = DenseInverse(*inverse) if len(inverse) == 1 else SubspaceInverse(*inverse)
    rows.name = "in a compiled graph"
    rows.backend = resolve_backend(backend, ())
    rows.inverse, rows.test_matrix = parts, test_matrix
    rows.ones, rows.at_backward = ones, at_backward
    rows.gathers = tally is not None
    if tally is not None:
        rows.statistics_dtype = tally.dtype
    return rows


def _run_linear(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, tally: Tensor | None, *arguments: Any
) -> Tensor:
    rows = _fill(LinearRows(), tally, *arguments)
    return Linear.apply(inputs, weight, bias, tally, rows)  # type: ignore[no-any-return]


def _run_conv2d(
    images: Tensor, weight: Tensor, bias: Tensor | None, tally: Tensor | None, *arguments: Any
) -> Tensor:
    rows = _fill(ImageRows(), tally, *arguments[:-1])
    window = arguments[-1]
    rows.window = Window(*zip(window[::2], window[1::2], strict=True))
    return Conv2d.apply(images, weight, bias, tally, rows)  # type: ignore[no-any-return]


for _name, _run in (("traced_linear", _run_linear), ("traced_conv2d", _run_conv2d)):
    _library.impl(_name, _run, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
