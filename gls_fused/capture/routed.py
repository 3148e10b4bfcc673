"""Rows that are routed to experts, each of which has sums of its own.

A node stands on the weight as one product uses it: its rows count when the weight's gradient is
needed. How many rows an expert has is no shape that a graph of torch.compile knows, so there an op
of ours adds them up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gls_fused.backends.dispatch import backend_name, resolve_backend
from gls_fused.capture.linear import LinearRows
from gls_fused.capture.rows import outside_autocast
from gls_fused.capture.traced import define_traced, fill_rows


def add_routed_(
    rows: LinearRows, sums: Tensor, whose: Tensor | int, inputs: Tensor, basis: Tensor | None
) -> None:
    """Add rows to the sums of their experts.

    Args:
        rows: what is the same for all experts.
        sums: [experts, ...].
        whose, inputs: see `ExpertsLayer.gather_routed`.
        basis: U of each, [experts, d, r]; the test matrix of all, [d, r]; None where dense.
    """
    for expert, mine in _by_expert(whose, inputs, len(sums)):
        own = basis[expert] if basis is not None and basis.ndim == 3 else basis
        found = rows.add_rows(None, mine, own)
        if found is not None:
            sums[expert] += found


def _by_expert(whose: Tensor | int, inputs: Tensor, experts: int) -> Iterator[tuple[int, Tensor]]:
    if isinstance(whose, int):
        yield whose, inputs
        return
    order = whose.argsort(stable=True)
    counts = torch.bincount(whose, minlength=experts + 1)[:experts].tolist()
    for expert, mine in enumerate(torch.split(order[: sum(counts)], counts)):
        yield expert, inputs[mine]


class Shown(torch.autograd.Function):
    """The identity on a weight as one product uses it; its backward has the rows gathered.

    In a traced graph the sums over them are the gradient of `tally`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Any,
        whose: Tensor | int,
        inputs: Tensor,
        tally: Tensor | None,
        weight: Tensor,
    ) -> Tensor:
        rows.set_out(ctx)
        expert, experts = (whose, None) if isinstance(whose, int) else (None, whose)
        ctx.rows, ctx.expert = rows, expert
        # Which of the tensors the weight is.
        ctx.place = 1 if experts is None else 2
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs, experts)
        return weight.detach()

    @staticmethod
    def jvp(
        ctx: Any,
        _rows: None,
        _whose: None,
        _inputs: Tensor | None,
        _tally: None,
        weight: Tensor | None,
    ) -> Tensor | None:
        return weight

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None, None, None
        if ctx.rows.enter(ctx, ctx.place)[0]:
            inputs, experts = ctx.saved_tensors
            with torch.no_grad():
                ctx.rows.gather_routed(ctx.expert if experts is None else experts, inputs)
        sums = ctx.rows.take_sums() if ctx.needs_input_grad[3] else None
        return None, None, None, sums, gradient


# ---- in graphs that torch.compile traces -------------------------------------------------------


class _TracedRows(LinearRows):
    """The rows of one product; `nothing` are the sums over no row, [experts, ...]."""

    nothing: Tensor

    def gather_routed(self, whose: Tensor, inputs: Tensor) -> None:
        """See `ExpertsLayer.gather_routed`."""
        found = torch.ops.gls_fused.sum_routed(
            self.nothing, whose, inputs, self.sketched_with(), self.draw, self.ones,
            backend_name(self.backend),
        )  # fmt: skip
        self.sums = found.flatten()


def _run_experts(
    inputs: Tensor, weight: Tensor, bias: None, tally: Tensor | None, *arguments: Any
) -> Tensor:
    *of_rows, whose, experts = arguments
    rows = fill_rows(_TracedRows(), tally, *of_rows)
    if tally is not None and rows.gathers:
        rows.nothing = torch.zeros_like(tally).view(experts, -1)
    return Shown.apply(rows, whose, inputs, tally, weight)  # type: ignore[no-any-return]


define_traced("traced_experts", _run_experts, ", Tensor whose, int experts")


@torch.library.custom_op("gls_fused::sum_routed", mutates_args=())
def _sum_routed(
    sums: Tensor,
    whose: Tensor,
    inputs: Tensor,
    basis: Tensor | None,
    draw: Tensor,
    ones: bool,
    backend: str,
) -> Tensor:
    """The sums with these rows added, see `add_routed_`."""
    rows = LinearRows()
    rows.backend = resolve_backend(backend, ())
    rows.ones, rows.draw, rows.statistics_dtype = ones, draw, sums.dtype
    sums = sums.clone()
    add_routed_(rows, sums, whose, inputs, basis)
    return sums


_sum_routed.register_fake(lambda sums, *_: torch.empty_like(sums))
