"""Captured layers in graphs that torch.compile traces: ops of tensors and plain values alone.

A traced backward can leave nothing in a Python object, so the sums over the rows leave it as the
gradient of one more input, the tally: autograd then adds them up over calls, and gives them to the
layer when the weight gets its gradient. The ops are composite: tracing goes through them,
and the graph holds only torch's ops and the backend's. All that changes from step to step is an
argument, so that layers of one shape share a graph. A kind of layer defines its op in its own file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from gls_fused.backends.dispatch import resolve_backend
from gls_fused.capture.passes import Passes
from gls_fused.capture.rows import Rows
from gls_fused.reference import DenseInverse, Inverse, SubspaceInverse

RowsT = TypeVar("RowsT", bound=Rows)

_ARGUMENTS = (
    "Tensor inputs, Tensor weight, Tensor? bias, Tensor? tally, Tensor? test_matrix,"
    " Tensor? draw, Tensor[] inverse, bool ones, bool at_backward, str backend"
)
_library = torch.library.Library("gls_fused", "FRAGMENT")  # type: ignore[no-untyped-call]


def define_traced(name: str, run: Callable[..., Tensor], more: str = "") -> None:
    """An op of torch's that runs a layer's forward on what `flatten_rows` gave.

    Args:
        run: takes inputs, weight, bias, tally and then the rest for `fill_rows`.
        more: the schema of the arguments after these.
    """
    _library.define(f"{name}({_ARGUMENTS}{more}) -> Tensor")  # type: ignore[no-untyped-call]
    _library.impl(name, run, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]


def flatten_rows(
    layer: Passes,
) -> tuple[Tensor | None, Tensor | None, Tensor | int | None, list[Tensor], bool, bool, str]:
    """What is in force for a layer, as arguments of its op."""
    inverse = [] if layer.inverse is None else list(layer.inverse)
    # What a graph leaves in p.grad has no marks by which the step would know it.
    parts = inverse, layer.ones, layer.at_backward and layer.promised, layer.backend_name
    if not layer.gathers:
        return None, None, None, *parts
    return layer.tally, layer.test_matrix, layer.draw, *parts


def fill_rows(
    rows: RowsT,
    tally: Tensor | None,
    test_matrix: Tensor | None,
    draw: Tensor | None,
    inverse: Sequence[Tensor],
    ones: bool,
    at_backward: bool,
    backend: str,
) -> RowsT:
    """What `flatten_rows` took apart, as the rows of one call."""
    parts: Inverse | None = None
    if inverse:
        parts = DenseInverse(*inverse) if len(inverse) == 1 else SubspaceInverse(*inverse)
    rows.name = "in a compiled graph"
    rows.backend = resolve_backend(backend, ())
    rows.inverse, rows.test_matrix = parts, test_matrix
    rows.ones, rows.at_backward = ones, at_backward
    rows.draw = 0 if draw is None else draw
    rows.gathers = tally is not None and tally.numel() > 0
    if tally is not None:
        rows.statistics_dtype = tally.dtype
        if not rows.gathers:
            # Of an idle layer, which is told by them that it has been called.
            rows.sums = torch.zeros_like(tally)
    return rows
