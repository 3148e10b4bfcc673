"""Convolutions whose module standardizes the weight, or pads the images, before torch.conv2d.

timm's StdConv2d and the like, and transformers' of BiT:

    W_i = the weight's row less its mean, over its standard deviation, times a gain or not

As in `gls_fused.capture.derived`: the rows are those of the op with W, and P acts at the step on
the gradient of the module's own parameter. timm's Conv2dSame, whose W is that parameter, pads by
the size of the images.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gls_fused.capture.autocast import autocast_inputs
from gls_fused.capture.conv import ConvLayer, Numbers, make_geometry, pad_images
from gls_fused.capture.layer import Found
from gls_fused.capture.modules import plain_class
from gls_fused.capture.observed import observe
from gls_fused.capture.transforms import outside_transforms


class StandardizedConv2dLayer(ConvLayer):
    """See above."""

    def __init__(self, found: Found) -> None:
        super().__init__(found)
        self.kind, self.derived = "standardized Conv2d", True

    def forward(self, module: nn.Module, inputs: Tensor) -> Tensor:
        plain: Any = plain_class(module)
        with _Shown(self):
            outputs: Tensor = plain.forward(module, inputs)
        return outputs

    def convolve(
        self,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Numbers = 1,
        padding: Numbers | str = 0,
        dilation: Numbers = 1,
        groups: int = 1,
    ) -> Tensor:
        """torch.conv2d of a weight that the module has made, seen."""
        geometry = make_geometry(tuple(weight.shape[2:]), stride, padding, dilation, groups)
        if torch.compiler.is_compiling():
            inputs, weight, bias = autocast_inputs(inputs, weight, bias)
            return self.traced_product(geometry, inputs, weight, bias)
        (inputs,) = autocast_inputs(inputs)
        if self.gathers and self.sees(inputs):
            gather = functools.partial(self.gather_in, geometry)
            with outside_transforms():
                images = pad_images(self.rows_of(inputs), geometry)
            weight, _ = observe(self, images, weight, None, gather)
        return torch.conv2d(inputs, weight, bias, stride, padding, dilation, groups)


class SamePaddedConv2dLayer(StandardizedConv2dLayer):
    """Of timm's Conv2dSame."""

    def __init__(self, found: Found) -> None:
        super().__init__(found)
        self.kind = "Conv2dSame"


class _Shown(TorchFunctionMode):
    """Hands the convolution in a module's forward to its layer."""

    def __init__(self, layer: StandardizedConv2dLayer) -> None:
        super().__init__()
        self.layer = layer

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.conv2d and not kwargs and torch.is_grad_enabled():
            return self.layer.convolve(*args)
        return func(*args, **(kwargs or {}))
