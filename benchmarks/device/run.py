"""The kernels checked and timed on a GPU, each run from memory, beside their yardsticks."""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gls_fused import available_backends, build_info, reference
from gls_fused.backends.dispatch import resolve_backend
from gls_fused.reference import SubspaceInverse

RUNS, WARM_UP = 30, 5
# More than any L2.
FLUSH_BYTES = 256 * 2**20
WIDTHS = (3072, 1024, 512, 10)
BATCH, RANK = 128, 32
TOLERANCE = 1e-5
COPY = "device copy of 256 MiB"


def seconds(action: Callable[[], object]) -> float:
    """Median of single runs, each from memory."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    taken = []
    for index in range(WARM_UP + RUNS):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        action()
        end.record()
        end.synchronize()
        if index >= WARM_UP:
            taken.append(start.elapsed_time(end) / 1e3)
    return statistics.median(taken)


def replay(action: Callable[[], object]) -> Callable[[], object]:
    """The action as a CUDA graph, so that launches cost the host nothing."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        action()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    return graph.replay


def make_inverse(dim: int) -> SubspaceInverse:
    """P of a random basis."""
    basis = torch.linalg.qr(torch.randn(dim, RANK, device="cuda"))[0].contiguous()
    root = torch.randn(RANK, RANK, device="cuda")
    core = root @ root.T
    return SubspaceInverse(basis, *reference.invert_core(core, 2 * core.trace(), dim, 0.3))


class Update:
    """The 3-layer MLP's update; P of its last layer applies at the step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        shapes = [
            shape
            for before, after in itertools.pairwise(WIDTHS)
            for shape in ((after, before), (after,))
        ]
        self.params = [torch.randn(shape, device="cuda") for shape in shapes]
        self.gradients = [torch.randn(shape, device="cuda") for shape in shapes]
        self.averages = [torch.zeros(shape, device="cuda") for shape in shapes]
        self.squares = [torch.zeros((), device="cuda") for _ in range(3)]
        self.steps = [torch.zeros((), device="cuda") for _ in range(3)]
        self.inverses = [None, None, make_inverse(WIDTHS[-2] + 1)]

    def run(self, backend: Any) -> None:
        """One step."""
        backend.update_layers_(
            self.params, self.gradients, self.averages, self.squares, self.steps, self.inverses,
            layer_sizes=[2, 2, 2], normalize="rms", lr=1e-3, momentum=0.9, beta2=0.95, eps=1e-8,
            weight_decay=0.0,
        )  # fmt: skip


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    gap = torch.linalg.vector_norm(found.double() - expected.double())
    return float(gap / torch.linalg.vector_norm(expected.double()))


def check(backend: Any) -> list[float]:
    """The errors of rows and update against the reference; no figure without them."""
    inverse = make_inverse(WIDTHS[0] + 1)
    rows = torch.randn(BATCH, WIDTHS[0], device="cuda")
    found, _ = backend.precondition_rows(rows, inverse, ones=True)
    errors = [error(found, reference.precondition_rows(rows, inverse, ones=True)[0])]
    mine, its = Update(), Update()
    its.inverses = mine.inverses
    for _ in range(3):
        mine.run(backend)
        its.run(reference)
    pairs = zip(mine.params, its.params, strict=True)
    return errors + [error(one, two) for one, two in pairs]


def find_backends() -> dict[str, Any]:
    """Those with kernels for CUDA here; says which have none, and why."""
    found, reasons = {}, available_backends()
    if reasons["native"] is None:
        reasons["native"] = build_info()["cuda_failure"]  # type: ignore[assignment]
    for name in ("triton", "native"):
        if reasons[name] is None:
            found[name] = resolve_backend(name, ["cuda"])
        else:
            print(f"device: without {name}: {reasons[name]}", file=sys.stderr)
    return found


def measure_yardsticks() -> dict[str, float]:
    """Seconds by name, of what the backends are compared with."""
    update = Update()
    for param, gradient in zip(update.params, update.gradients, strict=True):
        param.grad = gradient
    adam = torch.optim.Adam(update.params, fused=True, capturable=True)
    source = torch.empty(2**28, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return {
        COPY: seconds(lambda: target.copy_(source)),
        "torch's fused Adam, MLP": seconds(adam.step),
        "torch's fused Adam, MLP, as a graph": seconds(replay(adam.step)),
    }


def measure(name: str, backend: Any) -> dict[str, float]:
    """Seconds by name, of one backend."""
    inverse = make_inverse(WIDTHS[0] + 1)
    rows = torch.randn(BATCH, WIDTHS[0], device="cuda")
    update = Update()
    found = {
        "precondition_rows [128, 3072]": seconds(
            lambda: backend.precondition_rows(rows, inverse, ones=True)
        ),
        "sketch_rows [128, 3072]": seconds(
            lambda: backend.sketch_rows(rows, inverse.basis, ones=True)
        ),
        "update_layers_, MLP": seconds(lambda: update.run(backend)),
        "update_layers_, MLP, as a graph": seconds(replay(lambda: update.run(backend))),
    }
    return {f"{name}: {what}": value for what, value in found.items()}
