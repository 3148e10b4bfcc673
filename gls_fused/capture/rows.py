"""What a backward pass computes of a layer's rows: their sums, and gradients with P applied.

A function of tensors and of what the step asks, without modules. `Rows` are those of a layer, which
keeps the sums of the running step, or of one call in a traced graph, where the sums leave the
backward as the gradient of a tensor of their own (`gls_fused.capture.traced`). What is particular
to a kind of layer is in the file of that kind.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gls_fused.capture.graph import running_task
from gls_fused.curvature.estimate import add_sums
from gls_fused.curvature.precision import without_autocast, without_tf32
from gls_fused.reference import DenseInverse, Inverse, SubspaceInverse

# Of more rows in one backward pass so many stand for all: some tens of directions are known from
# them, and the sketch's cost grows neither with the batch nor with the size of images.
SKETCH_ROWS = 1024


class Rows(abc.ABC):
    """What the rows of a layer are summed and preconditioned with.

    Attributes:
        name: of the layer, for errors.
        backend: the ops.
        ones: whether a one belongs to every row, as the layer has a bias.
        turned: whether the weight's second axis, not its first, is its outputs.
        groups: how many matrices of as many outputs the weight is, each with inputs of its own.
        stacked: whether weight and bias are several of them along one more axis, their first.
        here: of a stack that is spread over ranks, which of its matrices are on this one.
        statistics_dtype: that of the sums, at least float32.
        inverse: P, None until the statistics have started.
        test_matrix: stands in for the basis until then; None for the dense curvature.
        at_backward: whether the backward leaves D in the gradients instead of D0.
        gathers: whether the rows of this step count.
        draw: 0-d int64; which sample of many rows this step takes.
        sums: over the rows of this step, see gls_fused.curvature.estimate; None before the first.
    """

    name: str
    backend: ModuleType
    ones: bool
    turned: bool = False
    groups: int = 1
    stacked: bool = False
    here: slice = slice(None)
    statistics_dtype: torch.dtype
    inverse: Inverse | None = None
    test_matrix: Tensor | None = None
    at_backward: bool = False
    gathers: bool = True
    draw: Tensor | int = 0
    sums: Tensor | None = None

    @property
    def couples(self) -> bool:
        """Whether weight and bias are observed together, where both are the layer's."""
        return True

    def leave_backward_site(self) -> None:  # noqa: B027  # a traced graph has no choice
        """From here on p.grad keeps the gradient."""

    def take_sums(self) -> Tensor | None:
        """The sums of this step, which are then forgotten."""
        sums, self.sums = self.sums, None
        return sums

    def set_out(self, ctx: Any) -> None:  # noqa: B027  # a traced graph has one backward pass
        """To be called first in a forward; keeps which backward pass it is part of, if any.

        Args:
            ctx: of the autograd function.
        """

    def enter(self, ctx: Any, weight: int) -> tuple[bool, bool]:
        """What a backward pass asks first, when the weight's gradient is to be computed.

        Args:
            ctx: of the autograd function.
            weight: which of its tensors the weight is.
        Returns:
            Whether its rows count, and whether P applies to this gradient.
        """
        return self.gathers, self.at_backward

    def deposit(  # noqa: B027  # a traced graph keeps nothing
        self, direction: Tensor, bias_direction: Tensor | None
    ) -> None:
        """Told of every part of D that goes into the gradients of weight and bias."""

    @torch.no_grad()
    def gather(self, inputs: Tensor) -> None:
        """Add the rows of these inputs to the sums of the step."""
        self.sums = self.add_rows(self.sums, inputs, self.sketched_with())

    def gather_once(self, ctx: Any, inputs: Tensor) -> None:
        """Add a call's rows once in a backward pass that reaches its weight by two ways.

        They are the op's own backward, and a product in that which has been differentiated.

        Args:
            ctx: of the call, which keeps the last pass.
        """
        task = running_task()
        if getattr(ctx, "task", None) != task:
            ctx.task = task
            self.gather(inputs)

    def sketched_with(self) -> Tensor | None:
        """U, or the test matrix; None where dense."""
        if isinstance(self.inverse, SubspaceInverse):
            return self.inverse.basis
        return self.test_matrix

    def add_rows(self, sums: Tensor | None, inputs: Tensor, basis: Tensor | None) -> Tensor | None:
        """The sums, with the rows of these inputs added."""
        if basis is not None and inputs.numel():
            found = self.sum_at_once(sums, inputs, basis)
            if found is not None:
                return found
        rows, weight = self.sample(inputs)
        return self.add_sample(sums, rows, weight, basis) if rows.numel() else sums

    def add_sample(
        self, sums: Tensor | None, rows: Tensor, weight: float, basis: Tensor | None
    ) -> Tensor:
        """The sums, with these rows added, each of which stands for `weight`."""
        with without_tf32():
            if basis is None:
                dtype = self.statistics_dtype
                *moments, trace = self.backend.sum_gram(rows, dtype=dtype, ones=self.ones)
            else:
                *moments, trace = self.backend.sketch_rows(rows, basis, ones=self.ones)
        return add_sums(sums, rows.shape[0], trace, moments, weight=weight)

    def turn(self, tensor: Tensor) -> Tensor:
        """What is shaped as weight or bias with its outputs first, and back."""
        if not self.turned or tensor.ndim < 2:
            return tensor
        if self.groups == 1:
            return tensor.transpose(0, 1)
        # Of each group its own outputs: [g c, m / g, ...] to [m, c, ...], by the same steps back.
        by_group = tensor.view(self.groups, -1, *tensor.shape[1:])
        return by_group.transpose(1, 2).flatten(0, 1)

    @property
    def turns_by_copy(self) -> bool:
        """Whether `turn` may give a copy, where no view has all outputs on one axis."""
        return self.turned and self.groups > 1

    def weight_gradient(
        self, inputs: Tensor, output_gradient: Tensor, with_bias: bool, applies: bool
    ) -> tuple[Tensor, Tensor | None]:
        """G'A, in memory as the weight lies, and the column sums of G; of A P where P applies.

        Args:
            inputs: the rows [..., k].
            output_gradient: G [..., m].
        """
        rows = inputs.reshape(-1, inputs.shape[-1])
        gradient = output_gradient.reshape(-1, output_gradient.shape[-1])
        if with_bias and not self.ones:
            # The module's bias is not the layer's: its gradient stays true.
            return self.weight_gradient(inputs, output_gradient, False, applies)[0], gradient.sum(0)
        if not applies:
            return self._multiply(gradient, rows), gradient.sum(0) if with_bias else None
        inverse = self.inverse_for(with_bias)
        if rows.dtype == torch.float16:
            # The entries of A P are of the order of 1 / sqrt(lambda'): more than it holds where the
            # inputs are small. With that factor on the gradients all is as large as the direction.
            inverse, root = _times_root(inverse)
            gradient = (gradient / root).to(gradient.dtype)
        if rows.shape[0] <= gradient.shape[1]:
            product, ones = self.backend.precondition_rows(rows, inverse, ones=with_bias)
            return self._multiply(gradient, product), None if ones is None else gradient.T @ ones
        # Fewer outputs than rows: by linearity, P is cheaper on this call's gradient.
        weight, bias = self.backend.precondition_gradient(
            self._multiply(gradient, rows), gradient.sum(0) if with_bias else None, inverse
        )
        if len(weight) == 1:
            # A part of D's one row, of whose strides DistributedDataParallel would warn.
            weight, bias = _copy(weight), None if bias is None else _copy(bias)
        return weight, bias

    def _multiply(self, gradient: Tensor, rows: Tensor) -> Tensor:
        return (rows.T @ gradient).T if self.turned else gradient.T @ rows

    def direction(self, gradients: list[Tensor]) -> list[Tensor]:
        """D = D0 P, in the parameters' shapes; of the weight alone where the bias is frozen."""
        if not self.stacked:
            return self._direction(gradients, self.inverse_for(len(gradients) == 2))
        inverses = self.inverses_for(len(gradients) == 2)
        if len(inverses) != len(gradients[0]):
            inverses = inverses[self.here]
        parts = zip(*(gradient.unbind() for gradient in gradients), strict=True)
        found = [self._direction(own, each) for own, each in zip(parts, inverses, strict=True)]
        return [torch.stack(each) for each in zip(*found, strict=True)]

    def _direction(self, gradients: Sequence[Tensor], inverse: Inverse) -> list[Tensor]:
        weight, *bias = self.upright_direction([self.turn(each) for each in gradients], inverse)
        return [self.turn(weight), *bias]

    def upright_direction(self, gradients: Sequence[Tensor], inverse: Inverse) -> list[Tensor]:
        """D = D0 P of one of the `matrices`, and of its bias where that has a gradient."""
        # Under autocast a bias of 32 bits may be beside a weight of 16.
        wide = functools.reduce(torch.promote_types, [each.dtype for each in gradients])
        weight, *bias = [each.to(wide) for each in gradients]
        direction, bias_direction = self.backend.precondition_gradient(
            weight.flatten(1), bias[0] if bias else None, inverse
        )
        found = [direction.view_as(weight)]
        found += [] if bias_direction is None else [bias_direction]
        return [each.to(own.dtype) for each, own in zip(found, gradients, strict=True)]

    def inverse_for(self, with_bias: bool) -> Inverse:
        """P, which is known, cut to the weight's columns where the bias has no gradient."""
        assert self.inverse is not None
        if with_bias or not self.ones:
            return self.inverse
        if isinstance(self.inverse, DenseInverse):
            return DenseInverse(self.inverse.matrix[..., :-1, :-1])
        return self.inverse._replace(basis=self.inverse.basis[..., :-1, :])

    def matrices(self, tensor: Tensor) -> list[Tensor]:
        """What is shaped as weight or bias, a matrix each, outputs first; of a stack, several.

        Views, unless `turns_by_copy`.
        """
        return [self.turn(each) for each in (tensor.unbind() if self.stacked else [tensor])]

    def inverses_for(self, with_bias: bool) -> list[Inverse]:
        """`inverse_for` of each of the `matrices`."""
        inverse = self.inverse_for(with_bias)
        if not self.stacked:
            return [inverse]
        kind: Any = type(inverse)
        return [kind(*parts) for parts in zip(*(part.unbind() for part in inverse), strict=True)]

    def sum_at_once(self, sums: Tensor | None, inputs: Tensor, basis: Tensor) -> Tensor | None:
        """`add_rows` where the backend samples, sketches and adds by itself; None where not."""
        return None

    @abc.abstractmethod
    def sample(self, inputs: Tensor) -> tuple[Tensor, float]:
        """The rows [n, k] that the sums are taken over, and how many each of them stands for."""


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _times_root(inverse: Inverse) -> tuple[Inverse, Tensor]:
    """sqrt(lambda') P and sqrt(lambda') [1]; 1 / lambda' is the largest diagonal of a dense P."""
    if isinstance(inverse, DenseInverse):
        root = inverse.matrix.diagonal().amax().rsqrt()
        return DenseInverse(inverse.matrix * root), root[None]
    root = inverse.shift.sqrt()
    return inverse._replace(core_inverse=inverse.core_inverse * root, shift=root), root[None]


def outside_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps the statistics in their own dtype, where autocast is on in a backward.

    It is where a graph whose forward runs under autocast is traced, or who calls backward under it.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Tensor | None) -> Any:
        with without_autocast():
            return backward(ctx, *gradients)

    return run


def take_sample(inputs: Tensor, most: int, draw: Tensor | int) -> tuple[Tensor, float]:
    """At most `most` of the inputs, and how many each of them stands for.

    One of each of `most` stretches of equal length, which may end inside an input, at a place that
    a hash of the stretch and of `draw` gives: no order of the inputs, sorted or periodic, favours
    some of them; the same on every backend and after a resume, and the host does not wait for it.

    Args:
        inputs: [n, ...].
        draw: changes the places from step to step; below 2^31.
    """
    n = inputs.shape[0]
    if n <= most:
        return inputs, 1.0
    return inputs.index_select(0, sample_places(n, most, draw, inputs.device)), n / most


def sample_places(n: int, most: int, draw: Tensor | int, device: torch.device) -> Tensor:
    """Which of n `take_sample` takes, [most]."""
    stretch = torch.arange(most, device=device)
    # In units of 2^-16 stretches, so that no product overflows.
    place = (stretch << 16) + (_hash(stretch, draw) >> 15)
    return place * n // (most << 16)


def _hash(index: Tensor, draw: Tensor | int) -> Tensor:
    """31 bits that look random, [n] int64. Odd factors below 2^32, so that no product overflows."""
    mask = (1 << 31) - 1
    bits = (index * 0x9E3779B1 + draw * 0x85EBCA6B) & mask
    bits = ((bits ^ (bits >> 15)) * 0x2C1B3C6D) & mask
    bits = ((bits ^ (bits >> 12)) * 0x297A2D39) & mask
    return bits ^ (bits >> 15)
