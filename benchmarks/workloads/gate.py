"""The gate before any figure: GLS as it will be timed does what the reference does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.workloads.contenders import Trainer
from benchmarks.workloads.data import Dataset
from benchmarks.workloads.shapes import in_double
from benchmarks.workloads.tasks import Task
from gls_fused import GLS, reference
from gls_fused.backends import factors

# A start, a commit after step 10, and a step that rests on it; no task diverges at this rate.
STEPS = 12
RATE = 1e-3
# As the tests' for tens of steps in float64; what is seen is 1e-13.
TOLERANCE = 1e-9
# In float32 a ReLU that flips sets two trajectories apart by some 1e-3 of their way, and the
# reference's is no better than another: so a multiple of its own distance, and a floor.
HEADROOM, LEAST_ALLOWED = 3, 1e-2


class GateError(Exception):
    """A backend computes something else than the reference; nothing is timed."""


@dataclass(frozen=True)
class Verdict:
    """Distances from the reference in float64, relative to the way that the weights went.

    Attributes:
        double: of GLS as it is timed, but in float64; at most TOLERANCE.
        single: of GLS as it is timed.
        allowed: for `single`.
    """

    double: float
    single: float
    allowed: float


def check_gls(task: Task, dataset: Dataset, batch_size: int, **options: Any) -> Verdict:
    """Train `STEPS` steps with GLS as it is timed and with the reference, in two dtypes each.

    Args:
        dataset: with float32 images, on the device that is timed.
        options: of GLS.
    Raises:
        GateError: the weights that GLS arrives at are too far from the reference's, or not finite.
    """
    exact_data = in_double(dataset)
    by_reference = {**options, "backend": "reference"}
    start, exact = _train(task, exact_data, batch_size, **by_reference)
    with _rounded_factors():
        _, plain = _train(task, dataset, batch_size, **by_reference)
    _, double = _train(task, exact_data, batch_size, **options)
    _, single = _train(task, dataset, batch_size, **options)

    def distance(weights: Tensor) -> float:
        way = torch.linalg.vector_norm(exact - start)
        return float(torch.linalg.vector_norm(weights - exact) / way)

    allowed = max(HEADROOM * distance(plain), LEAST_ALLOWED)
    verdict = Verdict(distance(double), distance(single), allowed)
    for dtype, error, bound in (
        ("float64", verdict.double, TOLERANCE),
        ("float32", verdict.single, verdict.allowed),
    ):
        # Written so that a NaN fails.
        if not error <= bound:
            raise GateError(
                f"{task.name}, batch {batch_size}: in {dtype} GLS is {error:.1e} of the way from "
                f"its reference after {STEPS} steps, more than {bound:.1e}; nothing is reported"
            )
    return verdict


@contextmanager
def _rounded_factors() -> Iterator[None]:
    """The reference's orthogonal factors in the dtype that backends take: bfloat16 on a GPU.

    What that rounding does to a trajectory is part of the reference's own distance.
    """
    exact = reference.orthogonalize

    def rounded(matrix: Tensor) -> Tensor:
        return exact(matrix.to(factors.factor_dtype(matrix))).to(matrix.dtype)

    with mock.patch.object(reference, "orthogonalize", rounded):
        yield


def _train(task: Task, dataset: Dataset, batch_size: int, **options: Any) -> tuple[Tensor, Tensor]:
    """All weights in float64 before and after, as one vector each."""

    def build(model: nn.Module) -> GLS:
        # Weights drawn in float32 are the same numbers in both dtypes.
        return GLS(model, lr=RATE, **options)

    trainer = Trainer(task, dataset, build, batch_size)
    start = _weights(trainer.model)
    trainer.next_steps(STEPS)
    return start, _weights(trainer.model)


def _weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])
