"""Convolutions, transposed ones too: every output position is a row, its im2col patch.

With groups, it is a row for each group, the patch of that group's channels. All are rows of one
matrix, and so the groups share a P. A transposed convolution is one of images with zeros between
the pixels, of which a row is a patch, and its weight is turned.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

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
# As they were before anybody could have replaced them here.
_KINDS: tuple[Any, ...] = (*CONVOLUTIONS, *TRANSPOSED)
_FORWARDS = {kind: kind.forward for kind in _KINDS}
_CONV_FORWARDS = tuple(kind._conv_forward for kind in CONVOLUTIONS)
# Of a convolution, one for all dimensions or for each.
Numbers: TypeAlias = int | Sequence[int]

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
        rows.set_out(ctx)
        # As torch's own op: the bias may change.
        ctx.save_for_backward(images, weight)
        ctx.rows, ctx.bias, ctx.shows = rows, bias, rows.gathers
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
        if counts and ctx.shows:
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


class Geometry(NamedTuple):
    """What a convolution's module computes beside its weight and bias.

    Attributes:
        mode, amounts: how images are padded before, as F.pad takes it; amounts are empty where the
            window pads them itself.
    """

    window: Window
    groups: int
    mode: str
    amounts: tuple[int, ...]


class ConvLayer(ImageRows, Layer):
    """A convolution: every output position is a row for each group, the group's im2col patch."""

    def __init__(self, found: Found) -> None:
        module = found.modules[0]
        assert isinstance(module, _ConvNd)
        # Of which the weight's shape tells nothing where it is turned.
        self.groups = module.groups
        super().__init__(found)
        self.by_rows = self.groups == 1 and not self.turned and not self.derived
        self.geometry = self.geometry_in(module)
        self.window = self.geometry.window
        self.kind = f"Conv{'Transpose' * self.turned}{len(module.kernel_size)}d"

    def forward(self, module: nn.Module, inputs: Tensor) -> Tensor:
        problem = why_not_padded(module)
        if problem is not None:
            return self.forward_otherwise(module, problem, inputs)
        return super().forward(module, inputs)

    def gains_by_rows(self, rows: float) -> bool:
        # Patches have to be built.
        return self.by_rows and self.size * (self.outputs - 2 * rows) >= LEAST_SAVED

    def precondition(self, module: nn.Module, inputs: Tensor) -> Tensor:
        if not (self.by_rows and self.takes_rows(module, inputs)):
            return super().precondition(module, inputs)
        geometry = self.geometry_in(module)
        images = pad_images(inputs, geometry)
        if geometry != self.geometry or not self.are_few(images, self.outputs):
            return super().precondition(module, inputs)
        operands = autocast_inputs(images, self.used_by(module), bias_of(module))
        outputs: Tensor = Convolution.apply(*operands, None, self)
        return outputs if inputs.ndim == images.ndim else outputs[0]

    def geometry_in(self, module: nn.Module) -> Geometry:
        """What the module computes now, which somebody may change between two calls."""
        return geometry_of(module, tuple(self.shape[2:]))

    def observed(self, module: nn.Module, inputs: Tensor) -> Tensor:
        return self.observed_in(self.geometry_in(module), module, inputs)

    def observed_in(self, geometry: Geometry, module: nn.Module, inputs: Tensor) -> Tensor:
        """`observed` of a call with this geometry."""
        gather = functools.partial(self.gather_in, geometry)
        pad = functools.partial(pad_images, geometry=geometry)
        inputs = self.op_inputs_in(geometry, inputs)
        weight, bias = self.seen_operands(module, inputs, gather, pad)
        return self.compute_in(geometry, module, inputs, weight, bias)

    def rows_of(self, inputs: Tensor) -> Tensor:
        images = super().rows_of(inputs)
        # `vmap` has put axes before those of one call.
        more = images.ndim - len(self.shape)
        return images.flatten(0, more) if more > 0 else images

    def op_inputs_in(self, geometry: Geometry, inputs: Tensor) -> Tensor:
        """`op_inputs` of a call with this geometry."""
        # They are padded as they are, and cast then.
        return inputs if geometry.amounts else self.op_inputs(inputs)

    def gather_in(self, geometry: Geometry, images: Tensor) -> None:
        """`gather` of a call with this geometry."""
        if geometry == self.geometry:
            self.gather(images)
            return
        self.called = True
        rows = ImageRows()
        rows.backend, rows.ones, rows.draw = self.backend, self.ones, self.draw
        rows.statistics_dtype = self.statistics_dtype
        rows.window, rows.groups = geometry.window, geometry.groups
        with torch.no_grad():
            self.sums = rows.add_rows(self.sums, images, self.sketched_with())

    def compute(
        self, module: nn.Module, inputs: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        return self.compute_in(self.geometry_in(module), module, inputs, weight, bias)

    def compute_in(self, geometry: Geometry, module: Any, *operands: Any) -> Tensor:
        """`compute` of a call with this geometry."""
        outputs: Tensor = module._conv_forward(*operands)
        return outputs

    def traced(self, module: nn.Module, inputs: Tensor) -> Tensor:
        return self.traced_in(self.geometry_in(module), module, inputs)

    def traced_in(self, geometry: Geometry, module: nn.Module, inputs: Tensor) -> Tensor:
        """`traced` of a call with this geometry."""
        assert isinstance(module, _ConvNd)
        inputs = self.op_inputs_in(geometry, inputs)
        weight, bias = autocast_inputs(module.weight, module.bias)
        if bias is None or self.owns_bias_of(module):
            return self.traced_product(geometry, inputs, weight, bias)
        # P is not for the gradient of somebody else's bias.
        bias = bias.view(-1, *[1] * len(geometry.window.kernel_size))
        outputs: Tensor = self.traced_product(geometry, inputs, weight, None) + bias
        return outputs

    def traced_product(
        self, geometry: Geometry, inputs: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """The output of inputs, weight and bias in a graph that torch.compile traces."""
        images = pad_images(inputs, geometry)
        arguments = flatten_rows(self)
        outputs: Tensor = torch.ops.gls_fused.traced_convolution(
            images, weight, bias, *arguments, *geometry.window, geometry.groups
        )
        return outputs if inputs.ndim == images.ndim else outputs[0]


class ConvTransposeLayer(ConvLayer):
    """A transposed convolution: a row is the patch of a group's images with zeros between.

    Its weight is [g c, m / g, kh, kw].
    """

    turned = True

    def __init__(self, found: Found) -> None:
        super().__init__(found)
        self.filled = 1 / math.prod(self.window.stride)

    def compute_in(self, geometry: Geometry, module: Any, *operands: Any) -> Tensor:
        op = next(op for kind, op in TRANSPOSED.items() if isinstance(module, kind))
        _, stride, padding, dilation, more = geometry.window
        return op(*operands, stride, padding, more, geometry.groups, dilation)

    def forward_more(
        self,
        module: Any,
        input: Tensor,  # noqa: A002  # torch's name
        output_size: list[int] | None = None,
    ) -> Tensor:
        """The output of a size that is asked for, by the output padding that gives it."""
        geometry = self.geometry_in(module)
        kernel_size, stride, padding, dilation, _ = geometry.window
        more = module._output_padding(
            input, output_size, stride, padding, kernel_size, len(kernel_size), dilation
        )
        geometry = geometry._replace(window=geometry.window._replace(output_padding=tuple(more)))
        if torch.compiler.is_compiling():
            return self.traced_in(geometry, module, input)
        self.leave_where_in_use(module)
        return self.observed_in(geometry, module, input)


def why_not_conv(modules: Sequence[nn.Module]) -> str | None:
    """See `gls_fused.capture.find.Kind`; of transposed ones, too."""
    own = next(kind for kind in _FORWARDS if isinstance(modules[0], kind))
    for module in modules:
        assert isinstance(module, own)
        problem = why_not_own(module, _FORWARDS[own]) or why_not_padded(module)
        if problem is not None:
            return problem
        if _geometry(module) != _geometry(modules[0]):
            return "its modules differ in stride, padding, dilation or groups"
    return None


def why_not_padded(module: Any) -> str | None:
    """Why a convolution does not pad its images as torch's own does, or None if it does."""
    if module.transposed:
        return None
    if "_conv_forward" in module.__dict__:
        return "its _conv_forward is replaced on the instance"
    # Asked of the module, which guards graphs of torch.compile; 2.11 knows no `__func__`.
    found = module._conv_forward
    own = getattr(found, "__func__", plain_class(module)._conv_forward)
    if any(own is each for each in _CONV_FORWARDS):
        return None
    return f"{describe_class(plain_class(module))} overrides _conv_forward"


def _geometry(module: Any) -> Geometry:
    return geometry_of(module, module.kernel_size)


def geometry_of(module: Any, kernel_size: tuple[int, ...]) -> Geometry:
    """What a convolution's module computes now, by torch's own forward.

    Its attributes may have been assigned since it was made, as where strides become dilation.
    """
    more = module.output_padding if module.transposed else None
    zeros = module.padding_mode == "zeros"
    padding = module.padding if zeros else 0
    geometry = make_geometry(
        kernel_size, module.stride, padding, module.dilation, module.groups, more
    )
    if zeros:
        return geometry
    amounts = tuple(module._reversed_padding_repeated_twice)
    return geometry._replace(mode=module.padding_mode, amounts=amounts)


def make_geometry(
    kernel_size: tuple[int, ...],
    stride: Numbers,
    padding: Numbers | str,
    dilation: Numbers,
    groups: int,
    more: Numbers | None = None,
) -> Geometry:
    """Of torch's op with zeros around the images."""
    stride, dilation = _for_each(kernel_size, stride), _for_each(kernel_size, dilation)
    more = None if more is None else _for_each(kernel_size, more)
    inside = (0,) * len(kernel_size)
    amounts: tuple[int, ...] = ()
    if padding == "same":
        spans = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
        if any(span % 2 for span in spans):
            # left, right, top, bottom and so on: the last dimension first.
            pairs = [(span // 2, span - span // 2) for span in reversed(spans)]
            amounts = tuple(itertools.chain.from_iterable(pairs))
        else:
            inside = tuple(span // 2 for span in spans)
    elif not isinstance(padding, str):
        inside = _for_each(kernel_size, padding)
    return Geometry(
        Window(kernel_size, stride, inside, dilation, more), groups, "constant", amounts
    )


def _for_each(kernel_size: tuple[int, ...], numbers: Numbers) -> tuple[int, ...]:
    """One for each dimension, as torch's ops take them."""
    found = (numbers,) if isinstance(numbers, int) else tuple(numbers)
    return found * len(kernel_size) if len(found) == 1 else found


def pad_images(inputs: Tensor, geometry: Geometry) -> Tensor:
    """The images [N, c, h, w], padded by what the window does not pad itself."""
    if geometry.amounts:
        (inputs,) = autocast_inputs(F.pad(inputs, geometry.amounts, geometry.mode))
    batched = inputs.ndim == 2 + len(geometry.window.kernel_size)
    return inputs if batched else inputs[None]


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
