"""Weight and bias as one call of a module uses them: observed on the way back.

The values are the parameters' own, so the module computes with torch's own ops what it always does.
In the backward this node stands between those ops and the parameters. Autograd runs it exactly when
the weight's gradient is needed, with that gradient: not in evaluation, not for gradients of inputs
alone, once under activation checkpointing. That is where rows count, and where P applies at the
backward site, by linearity to whatever this call adds to the gradient, second derivatives included.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gls_fused.capture.rows import Rows, outside_autocast
from gls_fused.capture.transforms import beneath, outside_transforms, values_of


def observe(
    rows: Rows,
    inputs: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    gather: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`weight` and `bias`, observed.

    Args:
        inputs: whose rows count; None where they do not, or have been counted.
        bias: the layer's own, as P acts on both; None where it has none.
        gather: adds the rows of these inputs to the sums; None for `Rows.gather`.
    """
    with outside_transforms():
        # For gradients of the inputs alone, autograd need not come here.
        seen = None if inputs is None else values_of(inputs).detach()
        return Observed.apply(rows, gather or rows.gather, seen, beneath(weight), bias)  # type: ignore[no-any-return]


def observe_factor(ctx: Any, inputs: Tensor, weight: Tensor, *, biased: bool) -> Tensor:
    """The weight as the product of a backward has it, which is differentiated for second ones.

    P acts on what reaches the weight through it, too, and rows count once in a pass.

    Args:
        ctx: of the op, with its `rows` and `bias`.
        biased: whether the bias has a gradient in this backward.
    """
    rows: Rows = ctx.rows
    own = ctx.bias if rows.ones and biased else None
    seen = inputs if rows.gathers else None
    return observe(rows, seen, weight, own, functools.partial(rows.gather_once, ctx))[0]


class Observed(torch.autograd.Function):
    """The identity, see `observe`."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Rows,
        gather: Callable[[Tensor], None],
        inputs: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        rows.set_out(ctx)
        ctx.rows, ctx.gather = rows, gather
        # Which of the tensors the weight is.
        ctx.place = int(inputs is not None)
        ctx.set_materialize_grads(False)
        # Saved as autograd saves, so that checkpointing and offloading hold for it as well.
        ctx.save_for_backward(inputs)
        ctx.shape, ctx.bias_shape = weight.shape, None if bias is None else bias.shape
        ctx.coupled = rows.couples
        # Aliases that share the version: a weight that changes before the backward is noticed.
        return weight.detach(), None if bias is None else bias.detach()

    @staticmethod
    def jvp(
        ctx: Any,
        _rows: None,
        _gather: None,
        _inputs: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        return weight, bias

    @staticmethod
    @outside_autocast
    def backward(
        ctx: Any, weight_gradient: Tensor | None, bias_gradient: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        rows: Rows = ctx.rows
        if weight_gradient is None and bias_gradient is None:
            return None, None, None, None, None
        counts, applies = rows.enter(ctx, ctx.place)
        if applies and not ctx.coupled:
            # Of a forward before P was there, whose bias is not seen here.
            rows.leave_backward_site()
            applies = False
        (inputs,) = ctx.saved_tensors
        if counts and inputs is not None:
            ctx.gather(inputs)
        if applies:
            # P takes the gradient of one into the direction of the other.
            if weight_gradient is None:
                assert bias_gradient is not None
                weight_gradient = bias_gradient.new_zeros(ctx.shape)
            if bias_gradient is None and ctx.bias_shape is not None:
                bias_gradient = weight_gradient.new_zeros(ctx.bias_shape)
            gradients = [weight_gradient, bias_gradient]
            weight_gradient, *rest = rows.direction([g for g in gradients if g is not None])
            bias_gradient = rest[0] if rest else None
            rows.deposit(weight_gradient, bias_gradient)
        return None, None, None, weight_gradient, bias_gradient
