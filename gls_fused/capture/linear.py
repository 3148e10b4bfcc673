"""nn.Linear: every leading dimension of the inputs is rows. Its weight may be turned: [k, m]."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gls_fused.capture.autocast import autocast_inputs
from gls_fused.capture.derived import Place, source_of
from gls_fused.capture.layer import bias_of
from gls_fused.capture.lending import Lender
from gls_fused.capture.modules import why_not_own
from gls_fused.capture.observed import observe_factor
from gls_fused.capture.rows import SKETCH_ROWS, Rows, outside_autocast, take_sample
from gls_fused.capture.traced import define_traced, fill_rows, flatten_rows
from gls_fused.curvature.estimate import Subspace
from gls_fused.reference import Inverse

# As it was before anybody could have replaced it here.
_FORWARD = nn.Linear.forward


class LinearRows(Rows):
    """Of F.linear: every leading dimension of the inputs is rows."""

    def sample(self, inputs: Tensor) -> tuple[Tensor, float]:
        return take_sample(inputs.reshape(-1, inputs.shape[-1]), SKETCH_ROWS, self.draw)

    def sum_at_once(self, sums: Tensor | None, inputs: Tensor, basis: Tensor) -> Tensor | None:
        sum_rows: Any = getattr(self.backend, "sum_rows", None)
        if sum_rows is None:
            return None
        rows, most = inputs.reshape(-1, inputs.shape[-1]), SKETCH_ROWS
        found: Tensor | None = sum_rows(
            rows, basis, sums, ones=self.ones, most=most, draw=self.draw
        )
        return found


class Linear(torch.autograd.Function):
    """F.linear whose backward has rows and gradients at once, so that P can act on the rows.

    Its weight is [m, k], a view where that of the layer is turned. With `tally`, whose values do
    not matter, the sums are its gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tally: Tensor | None,
        rows: LinearRows,
    ) -> Tensor:
        rows.set_out(ctx)
        # As torch's own op: the weight may change where nobody needs it, and the bias always. The
        # memory that the weight has now is kept, as somebody may swap it for another.
        ctx.save_for_backward(inputs, weight.detach() if ctx.needs_input_grad[0] else None)
        ctx.rows, ctx.weight, ctx.bias = rows, weight, bias
        # As where nothing is kept of a forward that was not asked for its rows.
        ctx.shows = rows.gathers
        outputs = F.linear(inputs, weight, bias)
        # A view made in here could not be modified in place, as ReLU(inplace=True) does.
        if outputs._is_view():
            outputs = torch.ops.aten._unsafe_view(outputs, outputs.shape)
        return outputs

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, factor = ctx.saved_tensors
        rows: LinearRows = ctx.rows
        needs_inputs, needs_weight, needs_bias, tallies, _ = ctx.needs_input_grad
        counts = applies = False
        if needs_weight:
            counts, applies = rows.enter(ctx, 1)
        input_gradient = None
        if needs_inputs:
            if torch.is_grad_enabled() and needs_weight:
                shown = observe_factor(ctx, inputs, rows.turn(ctx.weight), biased=needs_bias)
                factor = rows.turn(shown)
            input_gradient = gradient @ factor
        if not needs_weight:
            bias_gradient = gradient.reshape(-1, gradient.shape[-1]).sum(0) if needs_bias else None
            return input_gradient, None, bias_gradient, None, None
        if counts and ctx.shows:
            rows.gather_once(ctx, inputs)
        sums = rows.take_sums() if tallies else None
        gradients = rows.weight_gradient(inputs, gradient, needs_bias, applies)
        if applies:
            rows.deposit(rows.turn(gradients[0]), gradients[1])
        return input_gradient, *gradients, sums, None


class LinearLayer(LinearRows, Lender):
    """nn.Linear: every leading dimension of the inputs is rows."""

    kind = "Linear"
    by_rows = True

    def begin(self) -> None:
        super().begin()
        # Backends may have an autograd function of their own, for the subspace.
        self.native = self.through = None
        has_own = hasattr(self.backend, "LinearCapture") and not self.turned
        if has_own and isinstance(self.curvature, Subspace):
            # Not this layer itself, which then nothing would free but the cycle collector.
            leave = functools.partial(_leave, weakref.ref(self))
            self.native = self.backend.LinearCapture(
                self.name, self.ones, self.promised, *self.marked_places(), leave
            )
            self.marks, self.through = self.native, self.native.call

    def expect(self, inverse: Inverse | None, *, gathers: bool, at_backward: bool) -> None:
        super().expect(inverse, gathers=gathers, at_backward=at_backward)
        if self.native is not None:
            self.native.expect(*(inverse if at_backward and inverse else (None, None, None)))
        self._let_through()

    def take_over(self, inverse: Inverse) -> None:
        super().take_over(inverse)
        if self.native is not None and self.at_backward:
            self.native.expect(*inverse)

    def train_bias(self, trains: bool) -> None:
        super().train_bias(trains)
        self._let_through()

    def _let_through(self) -> None:
        """Have calls that need nothing of `forward` but P be the native module's alone."""
        if self.native is None:
            return
        alone = self.at_backward and self.captured and not (self.gathers or self.derived)
        own = self.shards is None and self.fits and (self.bias_trains or not self.ones)
        shown = (self.weight, self.bias) if alone and own else (None, None)
        self.native.let_through(*shown)

    def compute(
        self, module: nn.Module, inputs: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        return F.linear(inputs, self.turn(weight), bias)

    def precondition(self, module: nn.Module, inputs: Tensor) -> Tensor:
        if not self.takes_rows(module, inputs):
            return super().precondition(module, inputs)
        inputs, weight, bias = self._operands(module, inputs)
        if self.native is not None and not self.gathers:
            return self.backend.captured_linear(inputs, weight, bias, self.native)  # type: ignore[no-any-return]
        return Linear.apply(inputs, weight, bias, None, self)  # type: ignore[no-any-return]

    def takes_rows(self, module: nn.Module, inputs: Tensor) -> bool:
        # torch's own op spreads a bias of another shape over the outputs.
        bias = None if self.ones else bias_of(module)
        fits = bias is None or bias.shape == (self.outputs,)
        return fits and super().takes_rows(module, inputs)

    def traced(self, module: nn.Module, inputs: Tensor) -> Tensor:
        inputs, weight, bias = self._operands(module, inputs)
        if bias is None or (self.ones and self.owns_bias_of(module)):
            return self.traced_product(inputs, weight, bias)
        # P is not for the gradient of somebody else's bias.
        return self.traced_product(inputs, weight, None) + bias

    def traced_product(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        arguments = flatten_rows(self)
        return torch.ops.gls_fused.traced_linear(inputs, weight, bias, *arguments)  # type: ignore[no-any-return]

    def _operands(self, module: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of F.linear, as autocast has them."""
        inputs, weight, bias = autocast_inputs(inputs, self.used_by(module), bias_of(module))
        return inputs, self.turn(weight), bias


class TurnedLinearLayer(LinearLayer):
    """y = x W + b, as Conv1D of transformers: nn.Linear with a weight [k, m]."""

    kind = "turned Linear"
    turned = True

    def find_holders(self, holders: Mapping[int, Sequence[nn.Module]]) -> None:
        """Nobody is known to use such a weight without its module."""


def why_not_linear(modules: Sequence[nn.Module]) -> str | None:
    """See `gls_fused.capture.find.Kind`."""
    for module in modules:
        problem = why_not_own(module, _FORWARD)
        if problem is not None:
            return problem
        # Not module.weight, which spectral_norm moves when it is asked for.
        weight = (source_of(module) or Place(module, "weight")).param
        if weight is not None and weight.ndim != 2:
            return f"its weight has {weight.ndim} dimensions, not 2"
    return None


def _leave(layer: weakref.ref[LinearLayer]) -> None:
    found = layer()
    if found is not None:
        found.leave_backward_site()


def _run_linear(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, tally: Tensor | None, *arguments: Any
) -> Tensor:
    rows = fill_rows(LinearRows(), tally, *arguments)
    return Linear.apply(inputs, weight, bias, tally, rows)  # type: ignore[no-any-return]


define_traced("traced_linear", _run_linear)
