"""nn.Conv2d with one group: every output position is a row, its im2col patch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gls_fused.capture.layer import Layer, autocast_inputs
from gls_fused.capture.modules import describe_class, plain_class, why_not_own
from gls_fused.capture.rows import SKETCH_IMAGES, Rows, outside_autocast, take_sample
from gls_fused.capture.traced import define_traced, fill_rows, flatten_rows
from gls_fused.reference import Window


class ImageRows(Rows):
    """Of F.conv2d with one group: every output position is a row, its im2col patch."""

    window: Window

    def sample(self, inputs: Tensor) -> tuple[Tensor, float]:
        return take_sample(inputs, SKETCH_IMAGES, self.draw)

    def sum_gram(self, inputs: Tensor) -> tuple[int, Tensor, Tensor]:
        rows = self.backend.unfold_images(inputs, self.window)
        gram, trace = self.backend.sum_gram(rows, dtype=self.statistics_dtype, ones=self.ones)
        return rows.shape[0], trace, gram

    def sketch(self, inputs: Tensor, basis: Tensor) -> tuple[int, Tensor, Tensor, Tensor]:
        core, sketch, trace, count = self.backend.sketch_images(
            inputs, basis, self.window, ones=self.ones
        )
        return count, trace, core, sketch


class Conv2d(torch.autograd.Function):
    """F.conv2d in a traced graph, whose backward gives the sums over the rows to `tally`."""

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
    @outside_autocast
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
        counts, applies = rows.enter(ctx, 1)
        if counts:
            rows.gather(images)
        sums = rows.take_sums() if ctx.needs_input_grad[3] else None
        if applies:
            # Patches overlap, so A P is no image: by linearity, P goes on this call's gradient.
            owned = needs[2] and rows.ones
            directions = rows.direction(
                [weight_gradient, bias_gradient] if owned else [weight_gradient]
            )
            weight_gradient, bias_gradient = (*directions, bias_gradient)[:2]
        return image_gradient, weight_gradient, bias_gradient, sums, None


class Conv2dLayer(ImageRows, Layer):
    """nn.Conv2d with one group: every output position is a row, its im2col patch."""

    kind = "Conv2d"

    def __init__(
        self, name: str, modules: list[nn.Module], bias: Tensor | None, table: str | None = None
    ) -> None:
        super().__init__(name, modules, bias, table)
        module = modules[0]
        assert isinstance(module, nn.Conv2d)
        self.window, self.padding_before = window_of(module)

    def gather(self, inputs: Tensor) -> None:
        super().gather(self._pad(inputs))

    def compute(
        self, module: nn.Module, inputs: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        assert isinstance(module, nn.Conv2d)
        outputs: Tensor = module._conv_forward(inputs, weight, bias)
        return outputs

    def traced(self, module: nn.Module, inputs: Tensor) -> Tensor:
        assert isinstance(module, nn.Conv2d)
        inputs, weight, bias = autocast_inputs(inputs, module.weight, module.bias)
        images = self._pad(inputs)
        arguments = flatten_rows(self, self.backend_name, self.tally)
        window = [size for pair in self.window for size in pair]
        outputs: Tensor = torch.ops.gls_fused.traced_conv2d(
            images, weight, bias, *arguments, window
        )
        return outputs[0] if inputs.ndim == 3 else outputs

    def _pad(self, inputs: Tensor) -> Tensor:
        """[N, c, h, w], padded by what the window does not pad itself."""
        mode, amounts = self.padding_before
        if any(amounts):
            inputs = F.pad(inputs, amounts, mode)
        return inputs[None] if inputs.ndim == 3 else inputs


def why_not_conv2d(modules: Sequence[nn.Module]) -> str | None:
    """See `gls_fused.capture.find.Kind`."""
    for module in modules:
        assert isinstance(module, nn.Conv2d)
        if module.groups > 1:
            return f"it has {module.groups} groups"
        plain = plain_class(module)
        if plain._conv_forward is not nn.Conv2d._conv_forward:
            return f"{describe_class(plain)} overrides _conv_forward"
        problem = why_not_own(module, nn.Conv2d.forward)
        if problem is not None:
            return problem
        if window_of(module) != window_of(modules[0]):  # type: ignore[arg-type]
            return "its modules differ in stride, padding or dilation"
    return None


def window_of(module: nn.Conv2d) -> tuple[Window, tuple[str, list[int]]]:
    """The convolution's geometry, and the padding (mode, amounts) to apply before it."""
    amounts = list(module._reversed_padding_repeated_twice)  # left, right, top, bottom
    left, right, top, bottom = amounts
    inside = module.padding_mode == "zeros" and left == right and top == bottom
    padding = (top, left) if inside else (0, 0)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    window = Window(
        _pair(module.kernel_size), _pair(module.stride), padding, _pair(module.dilation)
    )
    return window, (mode, [0, 0, 0, 0] if inside else amounts)


def _pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    height, width = sizes
    return height, width


def _run_conv2d(
    images: Tensor, weight: Tensor, bias: Tensor | None, tally: Tensor | None, *arguments: Any
) -> Tensor:
    rows = fill_rows(ImageRows(), tally, *arguments[:-1])
    window = arguments[-1]
    rows.window = Window(*zip(window[::2], window[1::2], strict=True))
    return Conv2d.apply(images, weight, bias, tally, rows)  # type: ignore[no-any-return]


define_traced("traced_conv2d", _run_conv2d, ", int[] window")
