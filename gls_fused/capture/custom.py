"""Weights whose rows their module's own forward shows, by `observe`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gls_fused.capture import observed
from gls_fused.capture.autocast import autocast_inputs
from gls_fused.capture.layer import Found, Layer
from gls_fused.capture.linear import LinearRows
from gls_fused.capture.modules import KEY, captured_by, tie_module
from gls_fused.capture.rows import outside_autocast
from gls_fused.capture.traced import define_traced, fill_rows, flatten_rows


def observe(module: nn.Module, inputs: Tensor) -> Tensor:
    """The weight of a module, to be multiplied by these inputs where it is used.

        outputs = inputs @ gls_fused.observe(self, inputs).T

    For a forward that is no layer GLS knows; `register(its class, "observed")` says so. The inputs
    are the rows: the last dimension is the weight's second, or for "turned observed", where
    outputs = inputs @ weight, its first. Whatever is added to the product, or done to it, is the
    module's own affair. A weight that several products use is observed for each.

    Args:
        module: whose `weight` it is.
        inputs: [*, k].
    Returns:
        The weight, or in steps that ask for it a tensor of the same memory, to be used this once.
    Raises:
        ValueError: inputs of another width.
    """
    capture = getattr(module, KEY, None)
    layer = capture.layer if capture is not None and capture.module is module else None
    weight: Any = module.weight
    if not isinstance(layer, ObservedLayer) or not layer.watches(module):
        return weight  # type: ignore[no-any-return]
    return layer.show(weight, inputs)


class Shown(torch.autograd.Function):
    """A weight in a traced graph, whose backward gives the sums over the rows to `tally`."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, tally: Tensor | None, rows: LinearRows
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.rows = rows
        return weight.view_as(weight)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows: LinearRows = ctx.rows
        counts, applies = rows.enter(ctx, 1)
        if counts:
            rows.gather(ctx.saved_tensors[0])
        sums = rows.take_sums() if ctx.needs_input_grad[2] else None
        if applies:
            (gradient,) = rows.direction([gradient])
        return None, gradient, sums, None


class ObservedLayer(LinearRows, Layer):
    """A weight [m, k] whose module's forward calls `observe`. A bias is no part of it."""

    kind = "observed"
    missed = "its module's forward does not call gls_fused.observe"

    def __init__(self, found: Found) -> None:
        super().__init__(found._replace(bias=None))

    def capture(self) -> None:
        for module in self.modules:
            earlier = captured_by(module)
            if earlier is not None and earlier is not self:
                earlier.release()
            tie_module(module, self)
        self.captured = True

    def recapture(self) -> None:
        """The forward is the module's own."""

    def show(self, weight: Tensor, inputs: Tensor) -> Tensor:
        """See `observe`; of a module that is watched."""
        if inputs.shape[-1] != self.size:
            raise ValueError(
                f"inputs: expected [..., {self.size}] for layer {self.name!r}, "
                f"got {list(inputs.shape)}"
            )
        (inputs,) = autocast_inputs(inputs.detach())
        if torch.compiler.is_compiling():
            arguments = flatten_rows(self)
            turned = self.turn(weight)
            shown = torch.ops.gls_fused.traced_observe(inputs, turned, None, *arguments)
            return self.turn(shown)
        if self.at_backward and not self.promised and self._gradient_is_in_use():
            self.leave_backward_site()
        seen = self.gathers and self.sees(inputs)
        if not (seen or self.by_node):
            return weight
        return observed.observe(self, inputs if seen else None, weight, None)[0]

    def compute(
        self, module: nn.Module, inputs: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        raise NotImplementedError("its module computes by itself")

    def traced(self, module: nn.Module, inputs: Tensor) -> Tensor:
        raise NotImplementedError("its module computes by itself")


class TurnedObservedLayer(ObservedLayer):
    """A weight [k, m]."""

    kind = "turned observed"
    turned = True


def why_not_observed(modules: Sequence[nn.Module]) -> str | None:
    """See `gls_fused.capture.find.Kind`."""
    for module in modules:
        weight = module._parameters.get("weight")
        if weight is None:
            return "its weight is parametrized"
        if weight.ndim != 2:
            return f"its weight has {weight.ndim} dimensions, not 2"
    return None


def _run_observe(
    inputs: Tensor, weight: Tensor, _bias: None, tally: Tensor | None, *arguments: Any
) -> Tensor:
    rows = fill_rows(LinearRows(), tally, *arguments)
    return Shown.apply(inputs, weight, tally, rows)  # type: ignore[no-any-return]


define_traced("traced_observe", _run_observe)
