"""What is timed: every op on the arrays it meets in the tasks' models, at CIFAR-10's shape and the
text's, at batch 128.

Flops and bytes are what the equations need: leading orders, every array read and written once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.workloads.shapes import SHAPES, synthesise
from benchmarks.workloads.sizes import flops_of_factor
from benchmarks.workloads.tasks import TASKS
from gls_fused import reference
from gls_fused.capture.rows import SKETCH_ROWS, sample_places
from gls_fused.curvature.estimate import AUTO_RANK, auto_rank
from gls_fused.reference import SubspaceInverse, Window
from tests.tolerances import ITERATION, PRODUCT, SOLVE, assert_near

BATCH = 128
RANK = AUTO_RANK
DAMPING = 1.0
FLOAT = 4
OPTIONS = {"normalize": "rms", "lr": 1e-3, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0}

# Those whose hidden layers take orthogonal steps by default.
ORTHOGONAL = ("cnn", "resnet", "transformer")

Call = Callable[[ModuleType], Any]


@dataclass(frozen=True)
class Case:
    """One op on one set of arrays.

    Attributes:
        make: the arrays in a dtype -> the op on them as a function of the backend; it may be called
            many times. In each dtype the arrays hold the same numbers.
        results: from the op's value, what backends agree on.
        tolerance: of the relative error in float32, of tests/tolerances.py.
    """

    op: str
    shape: str
    make: Callable[[torch.dtype], Call]
    flops: int
    bytes: int
    tolerance: float
    results: Callable[[Any], Sequence[Tensor]] = lambda value: [x for x in value if x is not None]

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape}"

    def check(self, backend: ModuleType) -> None:
        """Fails unless the backend gives what the reference gives in float64.

        Raises:
            AssertionError: a result is too far off, or not finite.
        """
        found = self.results(self.make(torch.float32)(backend))
        exact = self.results(self.make(torch.float64)(reference))
        for actual, expected in zip(found, exact, strict=True):
            assert_near(actual, expected, self.tolerance)


@dataclass(frozen=True)
class Layer:
    """A layer as its op sees it: the weight's shape, the bias, the inputs of a batch."""

    weight: torch.Size
    inputs: torch.Size
    window: Window | None
    bias: bool

    @property
    def outputs(self) -> int:
        return self.weight[0]

    @property
    def size(self) -> int:
        return self.weight[1:].numel()

    @property
    def dim(self) -> int:
        return self.size + self.bias

    @property
    def rows(self) -> int:
        """Of a linear layer."""
        return self.inputs[:-1].numel()

    @property
    def parameters(self) -> list[tuple[int, ...]]:
        """Their shapes."""
        return [tuple(self.weight), (self.outputs,)] if self.bias else [tuple(self.weight)]


def layers_of(task: str) -> list[Layer]:
    """The linear layers and convolutions of a task's model."""
    data = synthesise(SHAPES["text" if TASKS[task].text else "cifar10"].shape, BATCH)
    model = TASKS[task].build(data.shape)
    found: list[Layer] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, (nn.Linear, nn.Conv2d))
        window = None
        if isinstance(module, nn.Conv2d):
            # Paddings are pairs unless they are words, which no task uses.
            window = Window(module.kernel_size, module.stride, module.padding, module.dilation)  # type: ignore[arg-type]
        found.append(Layer(module.weight.shape, inputs[0].shape, window, module.bias is not None))

    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_pre_hook(note)
    with torch.no_grad():
        model(data.images)
    return found


def make_cases() -> list[Case]:
    """Every case; those that two layers share are there once."""
    layers = {task: layers_of(task) for task in TASKS}
    every = [layer for task in layers.values() for layer in task]
    cases = [
        *(case for layer in every if layer.window is None for case in _of_rows(layer)),
        *(case for layer in every if layer.window is not None for case in _of_images(layer)),
        *(_precondition_gradient(layer) for layer in every),
        *(_refresh(layer.dim) for layer in every),
        _invert_core(),
        *(_update(task, layers[task], momentum) for momentum in (0.9, 0.0) for task in layers),
        *(_orthogonal(task, layers[task]) for task in ORTHOGONAL),
    ]
    return list({case.name: case for case in cases}.values())


def normal(*shape: int, seed: int = 0) -> Tensor:
    """The same normal numbers, in float64, at every call."""
    generator = torch.Generator().manual_seed(seed)
    # Drawn in float32, so that both dtypes hold the same.
    return torch.randn(*shape, generator=generator).double()


def make_inverse(dim: int, dtype: torch.dtype, rank: int = RANK) -> SubspaceInverse:
    """P of a random Sigma."""
    rank = min(rank, dim)
    basis = torch.linalg.qr(normal(dim, rank))[0].float()
    core, trace = _core(rank)
    inverse, shift = reference.invert_core(core.double(), trace.double(), dim, DAMPING)
    return SubspaceInverse(basis.to(dtype), inverse.float().to(dtype), shift.float().to(dtype))


def _core(rank: int) -> tuple[Tensor, Tensor]:
    root = normal(rank, 2 * rank, seed=1)
    core = (root @ root.T / rank).float()
    return core, 2 * core.trace()


def _of_rows(layer: Layer) -> list[Case]:
    n, k = layer.rows, layer.size
    d, r = k + 1, min(RANK, k + 1)

    def precondition(dtype: torch.dtype) -> Call:
        rows, inverse = normal(n, k, seed=2).to(dtype), make_inverse(d, dtype)
        return lambda backend: backend.precondition_rows(rows, inverse, ones=True)

    return [
        Case(
            "precondition_rows", f"[{n}, {k}]", precondition, 4 * n * d * r,
            FLOAT * (2 * n * k + d * r), PRODUCT[torch.float32],
        ),
        _sketch(min(n, SKETCH_ROWS), layer),
    ]  # fmt: skip


def _of_images(layer: Layer) -> list[Case]:
    window = layer.window
    assert window is not None
    total = math.prod(reference.count_patches(torch.empty(layer.inputs, device="meta"), window))
    few = min(total, SKETCH_ROWS)

    def take(dtype: torch.dtype) -> Call:
        images = normal(*layer.inputs, seed=2).to(dtype)
        places = sample_places(total, few, 0, images.device)
        return lambda backend: backend.take_patches(images, window, places)

    shape = f"{list(layer.inputs)}, {window.kernel_size[0]}x{window.kernel_size[1]}"
    shape += "" if window.stride[0] == 1 else f" by {window.stride[0]}"
    return [
        Case(
            "take_patches", shape, take, 0, FLOAT * 2 * few * layer.size,
            PRODUCT[torch.float32], lambda value: [value],
        ),
        _sketch(few, layer),
    ]  # fmt: skip


def _sketch(few: int, layer: Layer) -> Case:
    k, d = layer.size, layer.dim
    r = min(auto_rank(layer.outputs), d)

    def make(dtype: torch.dtype) -> Call:
        rows, basis = normal(few, k, seed=2).to(dtype), make_inverse(d, dtype, r).basis
        return lambda backend: backend.sketch_rows(rows, basis, ones=layer.bias)

    return Case(
        "sketch_rows", f"[{few}, {k}]" + ("" if layer.bias else ", no bias"), make,
        4 * few * d * r + 2 * few * r * r, FLOAT * (few * k + 2 * d * r), PRODUCT[torch.float32],
    )  # fmt: skip


def _precondition_gradient(layer: Layer) -> Case:
    m, k, d = layer.outputs, layer.size, layer.dim
    r = min(RANK, d)

    def make(dtype: torch.dtype) -> Call:
        weight = normal(m, k, seed=2).to(dtype)
        bias = normal(m, seed=3).to(dtype) if layer.bias else None
        inverse = make_inverse(d, dtype)
        return lambda backend: backend.precondition_gradient(weight, bias, inverse)

    return Case(
        "precondition_gradient",
        f"[{m}, {k}]" + ("" if layer.bias else ", no bias"),
        make,
        4 * m * d * r,
        FLOAT * (2 * m * d + d * r),
        PRODUCT[torch.float32],
    )


def _refresh(d: int) -> Case:
    r = min(RANK, d)
    core, _ = _core(r)

    def make(dtype: torch.dtype) -> Call:
        # Z = Sigma U for a Sigma that keeps what U does not see.
        basis = make_inverse(d, torch.float64).basis
        rest = normal(d, r, seed=4)
        rest = rest - basis @ (basis.T @ rest)
        sketch = (basis @ core.double() + 0.1 * rest / d**0.5).float().to(dtype)
        return lambda backend: backend.refresh_subspace(core.to(dtype), sketch)

    def product(value: Any) -> Sequence[Tensor]:
        # U+ and M+ are unique up to the signs that QR chooses, U+ M+ U+' is unique.
        basis, moved = (x.double() for x in value)
        return [basis @ moved @ basis.T]

    # QR with its Q.
    return Case(
        "refresh_subspace", f"[{d}, {r}]", make, 4 * d * r * r, FLOAT * 2 * d * r,
        SOLVE[torch.float32], product,
    )  # fmt: skip


def _invert_core() -> Case:
    core, trace = _core(RANK)

    def make(dtype: torch.dtype) -> Call:
        arrays = core.to(dtype), trace.to(dtype)
        return lambda backend: backend.invert_core(*arrays, 4 * RANK, DAMPING)

    return Case(
        "invert_core", f"[{RANK}, {RANK}]", make, RANK**3, FLOAT * 2 * RANK**2,
        SOLVE[torch.float32],
    )  # fmt: skip


def _update(task: str, layers: Sequence[Layer], momentum: float) -> Case:
    """The update of all layers whose rows were preconditioned in the backward."""
    shapes = [shape for layer in layers for shape in layer.parameters]
    sizes = [len(layer.parameters) for layer in layers]
    count = sum(torch.Size(shape).numel() for shape in shapes)

    def make(dtype: torch.dtype) -> Call:
        params = parameters_of(shapes, 5, dtype)
        gradients = parameters_of(shapes, 6, dtype)
        averages = parameters_of(shapes, 7, dtype) if momentum else []
        squares = [torch.ones((), dtype=dtype) for _ in layers]
        steps = [torch.ones(()) for _ in layers]

        def call(backend: ModuleType) -> Sequence[Tensor]:
            backend.update_layers_(
                params, gradients, averages, squares, steps, [None] * len(layers),
                layer_sizes=sizes, momentum=momentum, **OPTIONS,
            )  # fmt: skip
            return [*params, *averages, *squares]

        return call

    # Parameter and average are read and written, the gradient is read.
    arrays = 5 if momentum else 3
    return Case(
        "update_layers_", f"{task}, momentum {momentum:g}", make, arrays * count,
        FLOAT * arrays * count, PRODUCT[torch.float32],
    )  # fmt: skip


def _orthogonal(task: str, layers: Sequence[Layer]) -> Case:
    """The orthogonal updates of all layers but the last."""
    shapes = [(layer.outputs, layer.size) for layer in layers[:-1]]

    def make(dtype: torch.dtype) -> Call:
        averages = parameters_of(shapes, 8, dtype)
        return lambda backend: backend.orthogonal_updates(averages)

    flops = sum(flops_of_factor(*sorted(shape)) for shape in shapes)
    count = sum(outputs * size for outputs, size in shapes)
    return Case(
        "orthogonal_updates", task, make, flops, FLOAT * 2 * count, ITERATION[torch.float32]
    )


def parameters_of(shapes: Sequence[tuple[int, ...]], seed: int, dtype: torch.dtype) -> list[Tensor]:
    """Normal numbers of these shapes."""
    return [normal(*shape, seed=seed + index).to(dtype) for index, shape in enumerate(shapes)]


def make_adam(task: str) -> tuple[torch.optim.Adam, int]:
    """torch's fused Adam with its gradients in place, and how many parameters it steps."""
    shapes = [shape for layer in layers_of(task) for shape in layer.parameters]
    params = [nn.Parameter(x) for x in parameters_of(shapes, 5, torch.float32)]
    for index, param in enumerate(params):
        param.grad = normal(*param.shape, seed=6 + index).float()
    return torch.optim.Adam(params, lr=1e-3, fused=True), sum(p.numel() for p in params)
