"""Convolutions, transposed ones too: every output position is a row, its im2col patch.

With groups, it is a row for each group, the patch of that group's channels. All are rows of one
matrix, and so the groups share a P. A transposed convolution is one of images with zeros between
the pixels, of which a row is a patch, and its weight is turned.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from gls_fused.capture.autocast import autocast_inputs
from gls_fused.capture.layer import Found, Layer, bias_of
from gls_fused.capture.modules import describe_class, plain_class, why_not_own
from gls_fused.capture.observed import observe_factor
from gls_fused.capture.rows import SKETCH_ROWS, Rows, outside_autocast, sample_places
from gls_fused.capture.traced import define_traced, fill_rows, flatten_rows
from gls_fused.reference import Window, convolve, convolve_backward, count_patches

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}


# Elements of a weight for which P on the rows must save its product with the gradient, so that it
# is worth a node of autograd's in Python: about half a millisecond on one thread.
LEAST_SAVED = 1 << 18


class ImageRows(Rows):
    """Of a convolution: every output position is a row for each group, the group's im2col patch."""

    window: Window

    def are_few(self, images: Tensor, outputs: int) -> bool:
        """Whether P takes less on all patches than on the gradient of so many outputs."""
        if self.groups > 1 or self.turned:
            return False
        return math.prod(count_patches(images, self.window)) < outputs

    def sample(self, inputs: Tensor) -> tuple[Tensor, float]:
        total = math.prod(count_patches(inputs, self.window, self.groups))
        if total <= SKETCH_ROWS:
            return self.backend.take_patches(inputs, self.window, None, self.groups), 1.0
        places = sample_places(total, SKETCH_ROWS, self.draw, inputs.device)
        rows = self.backend.take_patches(inputs, self.window, places, self.groups)
        return rows, total / SKETCH_ROWS

    def sum_at_once(self, sums: Tensor | None, inputs: Tensor, basis: Tensor) -> Tensor | None:
        sum_images: Any = getattr(self.backend, "sum_images", None)
        if sum_images is None:
            return None
        found: Tensor | None = sum_images(
            inputs, basis, sums, self.window,
            groups=self.groups, ones=self.ones, most=SKETCH_ROWS, draw=self.draw,
        )  # fmt: skip
        return found


class Convolution(torch.autograd.Function):
    """The convolution, whose backward has patches and gradients, so that P can act on either.

    In a traced graph the sums over the rows are the gradient of `tally`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tally: Tensor | None,
        rows: ImageRows,
    ) -> Tensor:
        # As torch's own op: the bias may change.
        ctx.save_for_backward(images, weight)
        ctx.rows, ctx.bias = rows, bias
        return convolve(images, weight, bias, rows.window, rows.groups)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        rows: ImageRows = ctx.rows
        needs_images, needs_weight, needs_bias, tallies, _ = ctx.needs_input_grad
        counts = applies = False
        if needs_weight:
            counts, applies = rows.enter(ctx, 1)
        # Patches overlap, so A P is no image, and P goes on the gradient unless they are few.
        by_rows = applies and rows.are_few(images, gradient.shape[1])
        factor = weight
        if needs_images and needs_weight and torch.is_grad_enabled():
            factor = observe_factor(ctx, images, weight, biased=needs_bias)
        needs = [needs_images, needs_weight and not by_rows, needs_bias and not by_rows]
        image_gradient, weight_gradient, bias_gradient = convolve_backward(
            gradient, images, factor, rows.window, needs, rows.groups
        )
        if not needs_weight:
            return image_gradient, None, bias_gradient, None, None
        if counts:
            rows.gather_once(ctx, images)
        sums = rows.take_sums() if tallies else None
        if by_rows:
            patches = rows.backend.take_patches(images, rows.window)
            by_outputs = gradient.flatten(2).transpose(1, 2)
            product, own = rows.weight_gradient(patches, by_outputs, needs_bias, True)
            weight_gradient = product.view(weight.shape)
            bias_gradient = bias_gradient if own is None else own
        elif applies:
            owned = needs_bias and rows.ones
            directions = rows.direction(
                [weight_gradient, bias_gradient] if owned else [weight_gradient]
            )
            weight_gradient = directions[0]
            bias_gradient = directions[1] if owned else bias_gradient
        if applies:
            rows.deposit(weight_gradient, bias_gradient)
        return image_gradient, weight_gradient, bias_gradient, sums, None


class ConvLayer(ImageRows, Layer):
    """A convolution: every output position is a row for each group, the group's im2col patch."""

    def __init__(self, found: Found) -> None:
        module = found.modules[0]
        assert isinstance(module, _ConvNd)
        # Of which the weight's shape tells nothing where it is turned.
        self.groups = module.groups
        super().__init__(found)
        self.by_rows = self.groups == 1 and not self.turned and not self.derived
        self.window, self.padding_before = window_of(module)
        self.kind = f"Conv{'Transpose' * self.turned}{len(module.kernel_size)}d"

    def gains_by_rows(self, rows: float) -> bool:
        # Patches have to be built.
        return self.by_rows and self.size * (self.outputs - 2 * rows) >= LEAST_SAVED

    def precondition(self, module: nn.Module, inputs: Tensor) -> Tensor:
        if not (self.by_rows and self.takes_rows(module, inputs)):
            return super().precondition(module, inputs)
        images = self.rows_source(inputs)
        if not self.are_few(images, self.outputs):
            return super().precondition(module, inputs)
        operands = autocast_inputs(images, self.used_by(module), bias_of(module))
        outputs: Tensor = Convolution.apply(*operands, None, self)
        return outputs if inputs.ndim == images.ndim else outputs[0]

    def compute(
        self, module: nn.Module, inputs: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        assert isinstance(module, CONVOLUTIONS)
        outputs: Tensor = module._conv_forward(inputs, weight, bias)
        return outputs

    def traced(self, module: nn.Module, inputs: Tensor) -> Tensor:
        return self.traced_in(self.window, module, inputs)

    def traced_in(self, window: Window, module: nn.Module, inputs: Tensor) -> Tensor:
        """`traced` with another output padding than the module's own."""
        assert isinstance(module, _ConvNd)
        inputs = self.op_inputs(inputs)
        weight, bias = autocast_inputs(module.weight, module.bias)
        if bias is None or self.owns_bias_of(module):
            return self.traced_product(inputs, weight, bias, window)
        # P is not for the gradient of somebody else's bias.
        bias = bias.view(-1, *[1] * len(window.kernel_size))
        return self.traced_product(inputs, weight, None, window) + bias  # type: ignore[no-any-return]

    def traced_product(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None, window: Window | None = None
    ) -> Tensor:
        """The output of inputs, weight and bias in a graph that torch.compile traces."""
        images = self.rows_source(inputs)
        arguments = flatten_rows(self, self.backend_name)
        outputs: Tensor = torch.ops.gls_fused.traced_convolution(
            images, weight, bias, *arguments, *(window or self.window), self.groups
        )
        return outputs if inputs.ndim == images.ndim else outputs[0]

    def op_inputs(self, inputs: Tensor) -> Tensor:
        # They are padded as they are, and cast then.
        return inputs if self.pads_before else super().op_inputs(inputs)

    @property
    def pads_before(self) -> bool:
        """Whether images are padded before the convolution."""
        return any(self.padding_before[1])

    def rows_source(self, inputs: Tensor) -> Tensor:
        """The images [N, c, h, w], padded by what the window does not pad itself."""
        if self.pads_before:
            mode, amounts = self.padding_before
            (inputs,) = autocast_inputs(F.pad(inputs, amounts, mode))
        batched = inputs.ndim == 2 + len(self.window.kernel_size)
        return inputs if batched else inputs[None]


class ConvTransposeLayer(ConvLayer):
    """A transposed convolution: a row is the patch of a group's images with zeros between.

    Its weight is [g c, m / g, kh, kw].
    """

    turned = True

    def compute(
        self, module: nn.Module, inputs: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        return self.compute_in(self.window, module, inputs, weight, bias)

    def compute_in(
        self,
        window: Window,
        module: nn.Module,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """`compute` with another output padding than the module's own."""
        op = next(op for kind, op in TRANSPOSED.items() if isinstance(module, kind))
        _, stride, padding, dilation, more = window
        return op(inputs, weight, bias, stride, padding, more, self.groups, dilation)

    def gather_in(self, window: Window, inputs: Tensor) -> None:
        """`gather` with another output padding than the module's own."""
        self.called = True
        rows = ImageRows()
        rows.backend, rows.ones, rows.groups, rows.draw = (
            self.backend, self.ones, self.groups, self.draw
        )  # fmt: skip
        rows.statistics_dtype, rows.window = self.statistics_dtype, window
        with torch.no_grad():
            self.sums = rows.add_rows(self.sums, inputs, self.sketched_with())

    def forward_more(
        self,
        module: Any,
        input: Tensor,  # noqa: A002  # torch's name
        output_size: list[int] | None = None,
    ) -> Tensor:
        """The output of a size that is asked for, by the output padding that gives it."""
        more = module._output_padding(
            input, output_size, module.stride, module.padding, module.kernel_size,
            len(module.kernel_size), module.dilation,
        )  # fmt: skip
        window = self.window._replace(output_padding=tuple(more))
        if torch.compiler.is_compiling():
            return self.traced_in(window, module, input)
        self.leave_where_in_use(module)
        gather = functools.partial(self.gather_in, window)
        return self.compute_in(window, module, *self.operands(module, input, gather))


def why_not_conv(modules: Sequence[nn.Module]) -> str | None:
    """See `gls_fused.capture.find.Kind`."""
    own = next(kind for kind in CONVOLUTIONS if isinstance(modules[0], kind))
    for module in modules:
        assert isinstance(module, own)
        plain = plain_class(module)
        if plain._conv_forward is not own._conv_forward:
            return f"{describe_class(plain)} overrides _conv_forward"
        problem = why_not_own(module, own.forward)
        if problem is not None:
            return problem
        if not _compute_alike(module, modules[0]):
            return "its modules differ in stride, padding, dilation or groups"
    return None


def why_not_transposed(modules: Sequence[nn.Module]) -> str | None:
    """See `gls_fused.capture.find.Kind`."""
    own: Any = next(kind for kind in TRANSPOSED if isinstance(modules[0], kind))
    for module in modules:
        assert isinstance(module, own)
        problem = why_not_own(module, own.forward)
        if problem is not None:
            return problem
        if not _compute_alike(module, modules[0]):
            return "its modules differ in stride, padding, dilation or groups"
    return None


def _compute_alike(module: Any, other: Any) -> bool:
    return module.groups == other.groups and window_of(module) == window_of(other)


def window_of(module: _ConvNd) -> tuple[Window, tuple[str, list[int]]]:
    """The convolution's geometry, and the padding (mode, amounts) to apply before it."""
    # left, right, top, bottom and so on: the last dimension first.
    amounts = list(module._reversed_padding_repeated_twice)
    before, after = amounts[::2], amounts[1::2]
    inside = module.padding_mode == "zeros" and before == after
    padding = tuple(reversed(before)) if inside else (0,) * len(before)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    more = module.output_padding if module.transposed else None
    window = Window(module.kernel_size, module.stride, padding, module.dilation, more)
    return window, (mode, [0] * len(amounts) if inside else amounts)


def _run_convolution(
    images: Tensor, weight: Tensor, bias: Tensor | None, tally: Tensor | None, *arguments: Any
) -> Tensor:
    *of_rows, kernel_size, stride, padding, dilation, more, groups = arguments
    rows = fill_rows(ImageRows(), tally, *of_rows)
    kernel_size, stride, padding, dilation = map(tuple, (kernel_size, stride, padding, dilation))
    more = None if more is None else tuple(more)
    rows.window = Window(kernel_size, stride, padding, dilation, more)
    rows.turned, rows.groups = more is not None, groups
    return Convolution.apply(images, weight, bias, tally, rows)  # type: ignore[no-any-return]


define_traced(
    "traced_convolution",
    _run_convolution,
    ", int[] kernel_size, int[] stride, int[] padding, int[] dilation, int[]? output_padding"
    ", int groups",
)
