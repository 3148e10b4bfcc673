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

from gls_fused.backends.dispatch import backend_name
from gls_fused.capture.rows import SKETCH_ROWS, Conv2d, ImageRows, Linear, LinearRows, Rows
from gls_fused.capture.traced import traced_conv2d, traced_linear
from gls_fused.curvature.estimate import Curvature, Subspace
from gls_fused.distributed.sharding import is_sharded, sharding_problem, shards_of
from gls_fused.reference import Inverse, Window


class Layer(Rows):
    """A weight and bias with the modules that use them, and what passes between them and a step.

    Attributes:
        name: qualified name of the weight's first module.
        weight: [m, k], or [m, c, kh, kw].
        bias: [m] or None.
        dim: d, the length of a row with its one.
        curvature: the kind of running estimate, set by `assign`.
        tally: in graphs that torch.compile traces, the leaf whose gradient is the sums; one number
            in memory. None before the first step that gathers.
        captured: False once another optimizer has taken the modules over.
        shards: over which ranks the rows of weight and bias are spread, see
            gls_fused.distributed.sharding.
    """

    kind: ClassVar[str]

    def __init__(self, name: str, modules: list[nn.Module], bias: Tensor | None) -> None:
        self.name = name
        self.modules = modules
        weight = modules[0].weight
        assert isinstance(weight, Tensor)
        self.weight = weight
        self.bias = bias
        self.shards = shards_of(weight)
        self.ones = bias is not None
        self.size = weight.shape[1:].numel()
        self.dim = self.size + self.ones
        self.statistics_dtype = torch.promote_types(weight.dtype, torch.float32)
        self.tally: Tensor | None = None
        self.captured = False

    def __reduce__(self) -> tuple[type[Layer], tuple[Any, ...]]:
        # A copy has statistics of its own, and captures nothing until it is told to.
        return type(self), (self.name, self.modules, self.bias)

    def assign(self, curvature: Curvature) -> None:
        """Choose the kind of running estimate."""
        self.curvature = curvature
        self.backend = curvature.backend
        self.backend_name = backend_name(curvature.backend)

    def expect(self, inverse: Inverse | None, *, gathers: bool, at_backward: bool) -> None:
        """What the coming step asks of the layer; see `Rows`."""
        self.inverse = inverse
        if inverse is not None:
            self.test_matrix = None
        elif self.test_matrix is None:
            device = self.weight.device
            self.test_matrix = self.curvature.test_matrix(self.statistics_dtype, device)
        self.gathers = gathers
        self.at_backward = at_backward
        if gathers and self.tally is None:
            zero = torch.zeros(1, dtype=self.statistics_dtype, device=self.weight.device)
            self.tally = zero.expand(self.curvature.sums_size).requires_grad_()

    @property
    def outputs(self) -> int:
        """The number m of outputs."""
        return self.weight.shape[0]

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
        sums = super().take_sums()
        if self.tally is None or self.tally.grad is None:
            return sums
        traced, self.tally.grad = self.tally.grad, None
        return traced if sums is None else sums + traced

    def no_sums(self) -> Tensor:
        """The sums over no row."""
        size = self.curvature.sums_size
        return torch.zeros(size, dtype=self.statistics_dtype, device=self.weight.device)

    @abc.abstractmethod
    def forward(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """The module's output, through the autograd function that sees rows and gradients."""


class LinearLayer(LinearRows, Layer):
    """nn.Linear: every leading dimension of the inputs is rows."""

    kind = "Linear"

    def assign(self, curvature: Curvature) -> None:
        super().assign(curvature)
        # Backends may have an autograd function of their own, for the subspace.
        self.native = None
        if hasattr(self.backend, "LinearCapture") and isinstance(curvature, Subspace):
            self.native = self.backend.LinearCapture(self.name, self.ones, SKETCH_ROWS)

    def expect(self, inverse: Inverse | None, *, gathers: bool, at_backward: bool) -> None:
        super().expect(inverse, gathers=gathers, at_backward=at_backward)
        if self.native is not None:
            parts = (self.test_matrix, None, None) if inverse is None else inverse
            self.native.expect(*parts, gathers, at_backward)

    def take_sums(self) -> Tensor | None:
        if self.native is not None:
            self.sums = self.native.take_sums()
        return super().take_sums()

    def forward(self, module: nn.Module, inputs: Tensor) -> Tensor:
        assert isinstance(module, nn.Linear)
        inputs, weight, bias = _autocast(inputs, module.weight, module.bias)
        if torch.compiler.is_compiling():
            return traced_linear(inputs, weight, bias, self, self.backend_name, self.tally)
        if self.native is not None:
            return self.backend.captured_linear(inputs, weight, bias, self.native)  # type: ignore[no-any-return]
        return Linear.apply(inputs, weight, bias, None, self)  # type: ignore[no-any-return]


class Conv2dLayer(ImageRows, Layer):
    """nn.Conv2d with one group: every output position is a row, its im2col patch."""

    kind = "Conv2d"

    def __init__(self, name: str, modules: list[nn.Module], bias: Tensor | None) -> None:
        super().__init__(name, modules, bias)
        module = modules[0]
        assert isinstance(module, nn.Conv2d)
        self.window, self.padding_before = _window(module)

    def forward(self, module: nn.Module, inputs: Tensor) -> Tensor:
        assert isinstance(module, nn.Conv2d)
        inputs, weight, bias = _autocast(inputs, module.weight, module.bias)
        mode, amounts = self.padding_before
        if any(amounts):
            inputs = F.pad(inputs, amounts, mode)
        images = inputs[None] if inputs.ndim == 3 else inputs
        if torch.compiler.is_compiling():
            outputs = traced_conv2d(images, weight, bias, self, self.backend_name, self.tally)
        else:
            outputs = Conv2d.apply(images, weight, bias, None, self)
        return outputs[0] if inputs.ndim == 3 else outputs


class CapturedForward:
    """Stands in for the forward of a module, on the instance, while a layer captures it.

    A copy or a pickle of the module gets its class's forward instead.
    """

    def __init__(self, module: nn.Module, layer: Layer) -> None:
        self.module = module
        self.layer = layer

    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002  # nn.Module's own name for it
        module, layer = self.module, self.layer
        if torch.is_grad_enabled() and module.weight.requires_grad:
            if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
                raise RuntimeError(
                    f"layer {layer.name!r}: torch.func's transforms (grad, vmap, ...) would give "
                    "gradients of rows that GLS does not see; use a copy.deepcopy of the model, "
                    "or call detach() of the optimizer first"
                )
            if layer.at_backward or layer.gathers:
                if layer.shards is not None and is_sharded(module.weight):
                    raise RuntimeError(
                        f"layer {layer.name!r}: expected its weight whole in the forward, as under "
                        "fully_shard, got a DTensor; GLS does not cover tensor parallelism, pass "
                        "such parameters as a list"
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
