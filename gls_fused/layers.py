"""Capture: the only file that knows nn.Linear and nn.Conv2d.

A layer is a weight, with its bias, and the modules that use it. While it is captured, its modules'
forward runs through an autograd function whose backward sees the rows A and the gradients G at
once. That is where the sums over the rows are taken, so they count a row exactly when its weight
gradient is counted: not in evaluation, once under activation checkpointing, twice when a module is
called twice. There too the rows are preconditioned when the layer's site is the backward.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter

from gls_fused.curvature import Curvature, Subspace, add_sums
from gls_fused.reference import DenseInverse, Inverse, SubspaceInverse, Window
from gls_fused.sharding import is_sharded, shard_group, sharding_problem

# Of more rows in one backward pass, or images of a convolution, so many stand for all: some tens of
# directions are known from them, and the sketch's cost does not grow with the batch.
SKETCH_ROWS, SKETCH_IMAGES = 1024, 16


class Layer(abc.ABC):
    """A weight and bias with the modules that use them, and what passes between them and a step.

    Attributes:
        name: qualified name of the weight's first module.
        weight: [m, k], or [m, c, kh, kw].
        bias: [m] or None.
        dim: d, the length of a row with its one.
        curvature: the kind of running estimate, set by `assign`.
        inverse: P, None until the statistics have started.
        test_matrix: stands in for the basis until then; None for the dense curvature.
        at_backward: whether the backward leaves D in the gradients instead of D0.
        gathers: whether the rows of this step count.
        sums: over the rows of this step, see gls_fused.curvature; None before the first.
        captured: False once another optimizer has taken the modules over.
        shards: the process group over which the rows of weight and bias are spread, or None.
    """

    kind: ClassVar[str]

    def __init__(self, name: str, modules: list[nn.Module], bias: Tensor | None) -> None:
        self.name = name
        self.modules = modules
        weight = modules[0].weight
        assert isinstance(weight, Tensor)
        self.weight = weight
        self.bias = bias
        self.shards = shard_group(weight)
        self.size = weight.shape[1:].numel()
        self.dim = self.size + (bias is not None)
        self.inverse: Inverse | None = None
        self.test_matrix: Tensor | None = None
        self.at_backward = False
        self.gathers = True
        self.sums: Tensor | None = None
        self.captured = False

    def __reduce__(self) -> tuple[type[Layer], tuple[Any, ...]]:
        # A copy has statistics of its own, and captures nothing until it is told to.
        return type(self), (self.name, self.modules, self.bias)

    def assign(self, curvature: Curvature) -> None:
        """Choose the kind of running estimate."""
        self.curvature = curvature
        self.backend = curvature.backend

    def expect(self, inverse: Inverse | None, *, gathers: bool, at_backward: bool) -> None:
        """What the coming step asks of the layer; see the class's attributes."""
        self.inverse = inverse
        self.test_matrix = None
        if inverse is None:
            device = self.weight.device
            self.test_matrix = self.curvature.test_matrix(self.statistics_dtype, device)
        self.gathers = gathers
        self.at_backward = at_backward

    @property
    def outputs(self) -> int:
        """The number m of outputs."""
        return self.weight.shape[0]

    @property
    def statistics_dtype(self) -> torch.dtype:
        """At least float32."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def resharded(self) -> bool:
        """Whether the weight that a module has is sharded, and not the one known here."""
        held = [module._parameters["weight"] for module in self.modules]
        return any(weight is not self.weight and is_sharded(weight) for weight in held)

    @property
    def params(self) -> list[Tensor]:
        """Weight and bias."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def capture(self) -> None:
        """Route the modules' forward through this layer."""
        for module in self.modules:
            earlier = module.__dict__.get("forward")
            if isinstance(earlier, CapturedForward):
                earlier.layer.release()
            module.__dict__["forward"] = CapturedForward(module, self)
        self.captured = True

    def release(self) -> None:
        """Give the modules their own forward back."""
        for module in self.modules:
            forward = module.__dict__.get("forward")
            if isinstance(forward, CapturedForward) and forward.layer is self:
                del module.__dict__["forward"]
        self.captured = False

    def take_sums(self) -> Tensor | None:
        """The sums of this step, which are then forgotten."""
        sums, self.sums = self.sums, None
        return sums

    def no_sums(self) -> Tensor:
        """The sums over no row."""
        size = self.curvature.sums_size
        return torch.zeros(size, dtype=self.statistics_dtype, device=self.weight.device)

    @torch.no_grad()
    def gather(self, inputs: Tensor) -> None:
        """Add the rows of these inputs to the sums of the step."""
        inputs, every = self.sample(inputs)
        if not inputs.numel():
            return
        basis = self.test_matrix
        if isinstance(self.inverse, SubspaceInverse):
            basis = self.inverse.basis
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

    @abc.abstractmethod
    def sample(self, inputs: Tensor) -> tuple[Tensor, int]:
        """Every so-manyth of the inputs, which the sums are taken over, and of how many each is."""

    @abc.abstractmethod
    def sum_gram(self, inputs: Tensor) -> tuple[int, Tensor, Tensor]:
        """n, ||A||_F^2, A'A."""

    @abc.abstractmethod
    def sketch(self, inputs: Tensor, basis: Tensor) -> tuple[int, Tensor, Tensor, Tensor]:
        """n, ||A||_F^2, Y'Y, A'Y."""

    @abc.abstractmethod
    def forward(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """The module's output, through the autograd function that sees rows and gradients."""

    def inverse_for(self, with_bias: bool) -> Inverse:
        """P, which is known, cut to the weight's columns where the bias has no gradient."""
        assert self.inverse is not None
        if with_bias or self.bias is None:
            return self.inverse
        if isinstance(self.inverse, DenseInverse):
            return DenseInverse(self.inverse.matrix[: self.size, : self.size])
        return self.inverse._replace(basis=self.inverse.basis[: self.size])


class LinearLayer(Layer):
    """nn.Linear: every leading dimension of the inputs is rows."""

    kind = "Linear"

    def assign(self, curvature: Curvature) -> None:
        super().assign(curvature)
        # Backends may have an autograd function of their own, for the subspace.
        self.native = None
        if hasattr(self.backend, "LinearCapture") and isinstance(curvature, Subspace):
            self.native = self.backend.LinearCapture(self.name, self.bias is not None, SKETCH_ROWS)

    def expect(self, inverse: Inverse | None, *, gathers: bool, at_backward: bool) -> None:
        super().expect(inverse, gathers=gathers, at_backward=at_backward)
        if self.native is not None:
            parts = (self.test_matrix, None, None) if inverse is None else inverse
            self.native.expect(*parts, gathers, at_backward)

    def take_sums(self) -> Tensor | None:
        if self.native is not None:
            return self.native.take_sums()  # type: ignore[no-any-return]
        return super().take_sums()

    def sample(self, inputs: Tensor) -> tuple[Tensor, int]:
        return _every(inputs.reshape(-1, self.size), SKETCH_ROWS)

    def sum_gram(self, rows: Tensor) -> tuple[int, Tensor, Tensor]:
        gram, trace = self.backend.sum_gram(
            rows, dtype=self.statistics_dtype, ones=self.bias is not None
        )
        return len(rows), trace, gram

    def sketch(self, rows: Tensor, basis: Tensor) -> tuple[int, Tensor, Tensor, Tensor]:
        core, sketch, trace = self.backend.sketch_rows(rows, basis, ones=self.bias is not None)
        return len(rows), trace, core, sketch

    def forward(self, module: nn.Module, inputs: Tensor) -> Tensor:
        assert isinstance(module, nn.Linear)
        inputs, weight, bias = _autocast(inputs, module.weight, module.bias)
        if self.native is not None:
            return self.backend.captured_linear(inputs, weight, bias, self.native)  # type: ignore[no-any-return]
        return _Linear.apply(inputs, weight, bias, self)  # type: ignore[no-any-return]

    def weight_gradient(
        self, inputs: Tensor, output_gradient: Tensor, with_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """G'A and the column sums of G; of A P instead of A where P applies at the backward."""
        rows = inputs.reshape(-1, self.size)
        gradient = output_gradient.reshape(-1, self.outputs)
        if with_bias and self.bias is None:
            # The module's bias is not the layer's: its gradient stays true.
            return self.weight_gradient(inputs, output_gradient, False)[0], gradient.sum(0)
        if self.at_backward and len(rows) <= self.outputs:
            product, ones = self.backend.precondition_rows(
                rows, self.inverse_for(with_bias), ones=with_bias
            )
            return gradient.T @ product, None if ones is None else gradient.T @ ones
        direction = gradient.T @ rows
        bias_direction = gradient.sum(0) if with_bias else None
        if not self.at_backward:
            return direction, bias_direction
        # Fewer outputs than rows: by linearity, P is cheaper on this call's gradient.
        return self.backend.precondition_gradient(  # type: ignore[no-any-return]
            direction, bias_direction, self.inverse_for(with_bias)
        )


class Conv2dLayer(Layer):
    """nn.Conv2d with one group: every output position is a row, its im2col patch."""

    kind = "Conv2d"

    def __init__(self, name: str, modules: list[nn.Module], bias: Tensor | None) -> None:
        super().__init__(name, modules, bias)
        module = modules[0]
        assert isinstance(module, nn.Conv2d)
        self.window, self.padding_before = _window(module)

    def sample(self, inputs: Tensor) -> tuple[Tensor, int]:
        return _every(inputs if inputs.ndim == 4 else inputs[None], SKETCH_IMAGES)

    def sum_gram(self, inputs: Tensor) -> tuple[int, Tensor, Tensor]:
        rows = self.backend.unfold_images(inputs, self.window)
        gram, trace = self.backend.sum_gram(
            rows, dtype=self.statistics_dtype, ones=self.bias is not None
        )
        return len(rows), trace, gram

    def sketch(self, inputs: Tensor, basis: Tensor) -> tuple[int, Tensor, Tensor, Tensor]:
        core, sketch, trace, count = self.backend.sketch_images(
            inputs, basis, self.window, ones=self.bias is not None
        )
        return count, trace, core, sketch

    def forward(self, module: nn.Module, inputs: Tensor) -> Tensor:
        assert isinstance(module, nn.Conv2d)
        inputs, weight, bias = _autocast(inputs, module.weight, module.bias)
        mode, amounts = self.padding_before
        if any(amounts):
            inputs = F.pad(inputs, amounts, mode)
        if inputs.ndim == 3:
            return _Conv2d.apply(inputs[None], weight, bias, self)[0]  # type: ignore[no-any-return]
        return _Conv2d.apply(inputs, weight, bias, self)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    """F.linear whose backward shows the layer its rows."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, layer: LinearLayer
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.layer = layer
        outputs = F.linear(inputs, weight, bias)
        # A view made in here could not be modified in place, as ReLU(inplace=True) does.
        if outputs._is_view():
            outputs = torch.ops.aten._unsafe_view(outputs, outputs.shape)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        inputs, weight = ctx.saved_tensors
        needs_inputs, needs_weight, needs_bias, _ = ctx.needs_input_grad
        input_gradient = gradient @ weight if needs_inputs else None
        if not needs_weight:
            bias_gradient = gradient.reshape(-1, gradient.shape[-1]).sum(0) if needs_bias else None
            return input_gradient, None, bias_gradient, None
        layer: LinearLayer = ctx.layer
        _show_rows(layer, inputs)
        return input_gradient, *layer.weight_gradient(inputs, gradient, needs_bias), None


class _Conv2d(torch.autograd.Function):
    """F.conv2d whose backward shows the layer its images."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, layer: Conv2dLayer
    ) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.layer = layer
        window = layer.window
        return F.conv2d(images, weight, bias, window.stride, window.padding, window.dilation)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        images, weight = ctx.saved_tensors
        layer: Conv2dLayer = ctx.layer
        needs: list[bool] = list(ctx.needs_input_grad[:3])
        window = layer.window
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
            return image_gradient, None, bias_gradient, None
        _show_rows(layer, images)
        if layer.at_backward:
            # Patches overlap, so A P is no image: by linearity, P goes on this call's gradient.
            owned = needs[2] and layer.bias is not None
            directions = layer.direction(
                [weight_gradient, bias_gradient] if owned else [weight_gradient]
            )
            weight_gradient, bias_gradient = (*directions, bias_gradient)[:2]
        return image_gradient, weight_gradient, bias_gradient, None


def _every(inputs: Tensor, most: int) -> tuple[Tensor, int]:
    """At most `most` of the inputs, spread over all of them, and of how many each is one."""
    every = max(1, -(-len(inputs) // most))
    return inputs[::every], every


def _show_rows(layer: Layer, inputs: Tensor) -> None:
    if layer.at_backward and torch.is_grad_enabled():
        raise RuntimeError(
            f"layer {layer.name!r}: a backward with create_graph=True would differentiate through "
            'the preconditioned gradient; use site="step"'
        )
    if layer.gathers:
        layer.gather(inputs)


class CapturedForward:
    """Stands in for the forward of a module, on the instance, while a layer captures it.

    A copy or a pickle of the module gets its class's forward instead.
    """

    def __init__(self, module: nn.Module, layer: Layer) -> None:
        self.module = module
        self.layer = layer

    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002  # nn.Module's own name for it
        module, layer = self.module, self.layer
        watched = layer.at_backward or layer.gathers
        if watched and torch.is_grad_enabled() and module.weight.requires_grad:
            if layer.shards is not None and is_sharded(module.weight):
                raise RuntimeError(
                    f"layer {layer.name!r}: expected its weight whole in the forward, as under "
                    "fully_shard, got a DTensor; GLS does not cover tensor parallelism, pass such "
                    "parameters as a list"
                )
            return layer.forward(module, input)
        return type(module).forward(module, input)  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return getattr, (self.module, "forward")


def find_layers(roots: Iterable[tuple[str, nn.Module]]) -> tuple[list[Layer], dict[str, str]]:
    """The layers GLS covers below these modules, and why it does not cover the rest.

    Returns:
        The layers, and for every other parameter, by its qualified name, the reason.
    """
    users: dict[int, list[tuple[str, nn.Module, str]]] = {}
    params: dict[int, nn.Parameter] = {}
    seen: set[int] = set()
    for root_name, root in roots:
        for name, module in root.named_modules(prefix=root_name):
            if id(module) in seen:
                continue
            seen.add(id(module))
            for key, param in module._parameters.items():
                if param is not None:
                    params[id(param)] = param
                    users.setdefault(id(param), []).append((name, module, key))

    layers: list[Layer] = []
    owned: set[int] = set()
    reasons: dict[str, str] = {}
    for key, uses in users.items():
        names, modules, roles = zip(*uses, strict=True)
        if "weight" not in roles or isinstance(params[key], UninitializedParameter):
            continue
        problem = next(filter(None, map(_uncovered, modules)), None)
        if problem is None and len({type(module) for module in modules}) > 1:
            problem = "its weight is shared by modules of different kinds"
        if problem is None and isinstance(modules[0], nn.Conv2d):
            geometry = _window(modules[0])
            if any(_window(module) != geometry for module in modules):
                problem = "its modules differ in stride, padding or dilation"
        if problem is None and any(role != "weight" for role in roles):
            problem = "its weight is used in two roles"
        if problem is None and not params[key].numel():
            problem = "its weight is empty"
        if problem is None:
            problem = sharding_problem(params[key], modules[0].bias)
        if problem is not None:
            if len(uses) > 1:
                problem = f"shared by {', '.join(names)}: {problem}"
            reasons[_join(names[0], roles[0])] = problem
            continue
        biases = {id(module.bias): module.bias for module in modules}
        # A bias belongs to the layer when it is used exactly where the weight is.
        bias = next(iter(biases.values())) if len(biases) == 1 else None
        if bias is not None and len(users[id(bias)]) != len(uses):
            bias = None
        kind = LinearLayer if isinstance(modules[0], nn.Linear) else Conv2dLayer
        layers.append(kind(names[0], list(modules), bias))
        owned.update((key,) if bias is None else (key, id(bias)))

    for key, uses in users.items():
        name, module, role = uses[0]
        if key not in owned and _join(name, role) not in reasons:
            reasons[_join(name, role)] = _reason(module, role, params[key])
    return layers, reasons


def _uncovered(module: nn.Module) -> str | None:
    """Why GLS does not cover this module, or None if it does."""
    name = type(module).__name__
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention uses its weight without calling it"
    forward: Callable[..., Tensor]
    if isinstance(module, nn.Linear):
        forward = nn.Linear.forward
    elif isinstance(module, nn.Conv2d):
        forward = nn.Conv2d.forward
        if module.groups > 1:
            return f"it has {module.groups} groups"
        if type(module)._conv_forward is not nn.Conv2d._conv_forward:
            return f"{name} overrides _conv_forward"
    else:
        return f"{name} is not covered"
    if type(module).forward is not forward:
        return f"{name} overrides forward"
    instance = module.__dict__.get("forward")
    # A copy of a captured module has its class's own forward on the instance.
    plain = isinstance(instance, CapturedForward) or getattr(instance, "__func__", None) is forward
    if instance is not None and not plain:
        return "its forward is replaced on the instance"
    if "weight" not in module._parameters or "bias" not in module._parameters:
        return "its weight or bias is parametrized"
    return None


def _reason(module: nn.Module, role: str, param: nn.Parameter) -> str:
    if isinstance(param, UninitializedParameter):
        return "not initialised yet: run the model once before building the optimizer"
    problem = _uncovered(module)
    if problem is not None:
        return problem
    return "shared otherwise than the weight it belongs to" if role == "bias" else "not covered"


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _window(module: nn.Conv2d) -> tuple[Window, tuple[str, list[int]]]:
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


def _autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """What torch's own op would do under autocast, seen by autograd."""
    device = next(x for x in tensors if x is not None).device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x if x is None or x.dtype == torch.float64 or not x.is_floating_point() else x.to(dtype)
        for x in tensors
    )
