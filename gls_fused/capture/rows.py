"""What a backward pass computes of a layer's rows: their sums, and gradients with P applied.

A function of tensors and of what the step asks, without modules. `Rows` are those of a layer, which
keeps the sums of the running step, or of one call in a traced graph, where the sums leave the
backward as the gradient of a tensor of their own (`gls_fused.capture.traced`). What is particular
to a kind of layer is in the file of that kind.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gls_fused.curvature.estimate import add_sums
from gls_fused.curvature.precision import without_tf32
from gls_fused.reference import DenseInverse, Inverse, SubspaceInverse

# Of more rows in one backward pass, or images of a convolution, so many stand for all: some tens of
# directions are known from them, and the sketch's cost does not grow with the batch.
SKETCH_ROWS, SKETCH_IMAGES = 1024, 16


class Rows(abc.ABC):
    """What the rows of a layer are summed and preconditioned with.

    Attributes:
        name: of the layer, for errors.
        backend: the ops.
        ones: whether a one belongs to every row, as the layer has a bias.
        statistics_dtype: that of the sums, at least float32.
        inverse: P, None until the statistics have started.
        test_matrix: stands in for the basis until then; None for the dense curvature.
        at_backward: whether the backward leaves D in the gradients instead of D0.
        gathers: whether the rows of this step count.
        sums: over the rows of this step, see gls_fused.curvature.estimate; None before the first.
    """

    name: str
    backend: ModuleType
    ones: bool
    statistics_dtype: torch.dtype
    inverse: Inverse | None = None
    test_matrix: Tensor | None = None
    at_backward: bool = False
    gathers: bool = True
    sums: Tensor | None = None

    def take_sums(self) -> Tensor | None:
        """The sums of this step, which are then forgotten."""
        sums, self.sums = self.sums, None
        return sums

    def show(self, inputs: Tensor) -> None:
        """What every backward pass does first.

        Raises:
            RuntimeError: it would differentiate through the preconditioned gradient.
        """
        if self.at_backward and torch.is_grad_enabled():
            raise RuntimeError(
                f"layer {self.name!r}: a backward with create_graph=True would differentiate "
                'through the preconditioned gradient; use site="step"'
            )
        if self.gathers:
            self.gather(inputs)

    @torch.no_grad()
    def gather(self, inputs: Tensor) -> None:
        """Add the rows of these inputs to the sums of the step."""
        inputs, every = self.sample(inputs)
        if not inputs.numel():
            return
        basis = self.test_matrix
        if isinstance(self.inverse, SubspaceInverse):
            basis = self.inverse.basis
        with without_tf32():
            if basis is None:
                count, trace, *moments = self.sum_gram(inputs)
            else:
                count, trace, *moments = self.sketch(inputs, basis)
        self.sums = add_sums(self.sums, count, trace, tuple(moments), weight=every)

    def direction(self, gradients: list[Tensor]) -> list[Tensor]:
        """D = D0 P, in the parameters' shapes; of the weight alone where the bias is frozen."""
        assert self.inverse is not None
        weight_gradient = gradients[0].flatten(1)
        bias_gradient = gradients[1] if len(gradients) == 2 else None
        inverse = self.inverse_for(bias_gradient is not None)
        direction, bias_direction = self.backend.precondition_gradient(
            weight_gradient, bias_gradient, inverse
        )
        direction = direction.view_as(gradients[0])
        return [direction] if bias_direction is None else [direction, bias_direction]

    def inverse_for(self, with_bias: bool) -> Inverse:
        """P, which is known, cut to the weight's columns where the bias has no gradient."""
        assert self.inverse is not None
        if with_bias or not self.ones:
            return self.inverse
        if isinstance(self.inverse, DenseInverse):
            return DenseInverse(self.inverse.matrix[:-1, :-1])
        return self.inverse._replace(basis=self.inverse.basis[:-1])

    @abc.abstractmethod
    def sample(self, inputs: Tensor) -> tuple[Tensor, int]:
        """Every so-manyth of the inputs, which the sums are taken over, and of how many each is."""

    @abc.abstractmethod
    def sum_gram(self, inputs: Tensor) -> tuple[int, Tensor, Tensor]:
        """n, ||A||_F^2, A'A."""

    @abc.abstractmethod
    def sketch(self, inputs: Tensor, basis: Tensor) -> tuple[int, Tensor, Tensor, Tensor]:
        """n, ||A||_F^2, Y'Y, A'Y."""


def outside_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps the statistics in their own dtype, where autocast is on in a backward.

    It is where a graph whose forward runs under autocast is traced, or who calls backward under it.
    """

    @functools.wraps(backward)
    def run(ctx: Any, gradient: Tensor) -> Any:
        device = gradient.device.type
        if not torch.is_autocast_enabled(device):
            return backward(ctx, gradient)
        with torch.autocast(device, enabled=False):
            return backward(ctx, gradient)

    return run


def take_every(inputs: Tensor, most: int) -> tuple[Tensor, int]:
    """At most `most` of the inputs, spread over all of them, and of how many each is one."""
    every = max(1, -(-inputs.shape[0] // most))
    return inputs[::every], every
