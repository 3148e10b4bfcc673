"""What a backward pass computes of a layer's rows: their sums, and the gradients with P applied.

Functions of tensors and of what the step asks; `gls_fused.capture.layers` alone knows modules.
`Rows` are those of a layer, which keeps the sums of the running step, or of one call in a traced
graph, where the sums leave the backward as the gradient of a tensor of their own (`gls_fused.capture.traced`).
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gls_fused.curvature.estimate import add_sums
from gls_fused.curvature.precision import without_tf32
from gls_fused.reference import DenseInverse, Inverse, SubspaceInverse, Window

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


class LinearRows(Rows):
    """Of F.linear: every leading dimension of the inputs is rows."""

    def sample(self, inputs: Tensor) -> tuple[Tensor, int]:
        return _every(inputs.reshape(-1, inputs.shape[-1]), SKETCH_ROWS)

    def sum_gram(self, rows: Tensor) -> tuple[int, Tensor, Tensor]:
        gram, trace = self.backend.sum_gram(rows, dtype=self.statistics_dtype, ones=self.ones)
        return rows.shape[0], trace, gram

    def sketch(self, rows: Tensor, basis: Tensor) -> tuple[int, Tensor, Tensor, Tensor]:
        core, sketch, trace = self.backend.sketch_rows(rows, basis, ones=self.ones)
        return rows.shape[0], trace, core, sketch

    def weight_gradient(
        self, inputs: Tensor, output_gradient: Tensor, with_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """G'A and the column sums of G; of A P instead of A where P applies at the backward."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        gradient = output_gradient.reshape(-1, output_gradient.shape[-1])
        if with_bias and not self.ones:
            # The module's bias is not the layer's: its gradient stays true.
            return self.weight_gradient(inputs, output_gradient, False)[0], gradient.sum(0)
        if not self.at_backward:
            return gradient.T @ rows, gradient.sum(0) if with_bias else None
        inverse = self.inverse_for(with_bias)
        if rows.dtype == torch.float16:
            # The entries of A P are of the order of 1 / sqrt(lambda'): more than it holds where the
            # inputs are small. With that factor on the gradients all is as large as the direction.
            inverse, root = _times_root(inverse)
            gradient = (gradient / root).to(gradient.dtype)
        if rows.shape[0] <= gradient.shape[1]:
            product, ones = self.backend.precondition_rows(rows, inverse, ones=with_bias)
            return gradient.T @ product, None if ones is None else gradient.T @ ones
        # Fewer outputs than rows: by linearity, P is cheaper on this call's gradient.
        return self.backend.precondition_gradient(  # type: ignore[no-any-return]
            gradient.T @ rows, gradient.sum(0) if with_bias else None, inverse
        )


class ImageRows(Rows):
    """Of F.conv2d with one group: every output position is a row, its im2col patch."""

    window: Window

    def sample(self, inputs: Tensor) -> tuple[Tensor, int]:
        return _every(inputs, SKETCH_IMAGES)

    def sum_gram(self, inputs: Tensor) -> tuple[int, Tensor, Tensor]:
        rows = self.backend.unfold_images(inputs, self.window)
        gram, trace = self.backend.sum_gram(rows, dtype=self.statistics_dtype, ones=self.ones)
        return rows.shape[0], trace, gram

    def sketch(self, inputs: Tensor, basis: Tensor) -> tuple[int, Tensor, Tensor, Tensor]:
        core, sketch, trace, count = self.backend.sketch_images(
            inputs, basis, self.window, ones=self.ones
        )
        return count, trace, core, sketch


def _outside_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
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


class Linear(torch.autograd.Function):
    """F.linear whose backward shows the rows.

    With `tally`, whose values do not matter, the sums are its gradient.
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
        ctx.save_for_backward(inputs, weight)
        ctx.rows = rows
        outputs = F.linear(inputs, weight, bias)
        # A view made in here could not be modified in place, as ReLU(inplace=True) does.
        if outputs._is_view():
            outputs = torch.ops.aten._unsafe_view(outputs, outputs.shape)
        return outputs

    @staticmethod
    @_outside_autocast
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        rows: LinearRows = ctx.rows
        needs_inputs, needs_weight, needs_bias, tallies, _ = ctx.needs_input_grad
        input_gradient = gradient @ weight if needs_inputs else None
        if not needs_weight:
            bias_gradient = gradient.reshape(-1, gradient.shape[-1]).sum(0) if needs_bias else None
            return input_gradient, None, bias_gradient, None, None
        rows.show(inputs)
        sums = rows.take_sums() if tallies else None
        return input_gradient, *rows.weight_gradient(inputs, gradient, needs_bias), sums, None


class Conv2d(torch.autograd.Function):
    """F.conv2d whose backward shows the images; `tally` as in `Linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tally: Tensor | None,
        rows: ImageRows,
    ) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.rows = rows
        window = rows.window
        return F.conv2d(images, weight, bias, window.stride, window.padding, window.dilation)

    @staticmethod
    @_outside_autocast
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        rows: ImageRows = ctx.rows
        needs: list[bool] = list(ctx.needs_input_grad[:3])
        window = rows.window
        image_gradient, weight_gradient, bias_gradient = torch.ops.aten.convolution_backward(
            gradient,
            images,
            weight,
            [weight.shape[0]],
            window.stride,
            window.padding,
            window.dilation,
            False,
            [0, 0],
            1,
            needs,
        )
        if not needs[1]:
            return image_gradient, None, bias_gradient, None, None
        rows.show(images)
        sums = rows.take_sums() if ctx.needs_input_grad[3] else None
        if rows.at_backward:
            # Patches overlap, so A P is no image: by linearity, P goes on this call's gradient.
            owned = needs[2] and rows.ones
            directions = rows.direction(
                [weight_gradient, bias_gradient] if owned else [weight_gradient]
            )
            weight_gradient, bias_gradient = (*directions, bias_gradient)[:2]
        return image_gradient, weight_gradient, bias_gradient, sums, None


def _times_root(inverse: Inverse) -> tuple[Inverse, Tensor]:
    """sqrt(lambda') P and sqrt(lambda') [1]; 1 / lambda' is the largest diagonal of a dense P."""
    if isinstance(inverse, DenseInverse):
        root = inverse.matrix.diagonal().amax().rsqrt()
        return DenseInverse(inverse.matrix * root), root[None]
    root = inverse.shift.sqrt()
    return inverse._replace(core_inverse=inverse.core_inverse * root, shift=root), root[None]


def _every(inputs: Tensor, most: int) -> tuple[Tensor, int]:
    """At most `most` of the inputs, spread over all of them, and of how many each is one."""
    every = max(1, -(-inputs.shape[0] // most))
    return inputs[::every], every
