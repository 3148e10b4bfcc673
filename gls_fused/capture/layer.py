"""A layer: what a weight, with its bias, and the modules that use it are to GLS.

While it is captured, its modules' forward runs through an autograd function whose backward sees the
rows A and the gradients G at once. That is where the sums over the rows are taken, so they count a
row exactly when its weight gradient is counted: not in evaluation, once under activation
checkpointing, twice when a module is called twice. There too the rows are preconditioned when the
layer's site is the backward.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gls_fused.backends.dispatch import backend_name
from gls_fused.capture.rows import Rows
from gls_fused.curvature.estimate import Curvature
from gls_fused.distributed.sharding import is_sharded, shards_of
from gls_fused.reference import Inverse


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


def autocast_inputs(*tensors: Tensor | None) -> tuple[Any, ...]:
    """What torch's own op would do under autocast, seen by autograd."""
    device = next(x for x in tensors if x is not None).device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x if x is None or x.dtype == torch.float64 or not x.is_floating_point() else x.to(dtype)
        for x in tensors
    )
