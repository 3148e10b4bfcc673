"""The gate before any figure: GLS as it will be timed does what the reference does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contenders import RATE, Trainer
from benchmarks.data import Dataset
from benchmarks.shapes import in_double
from benchmarks.tasks import Task
from gls_fused import GLS

# A start, gatherings at steps 5 and 10, a move of the basis, and a step that rests on it.
STEPS = 12
# Times the error that the reference itself makes in float32: the order of summation differs.
HEADROOM = 10
# Where the reference happens to err by less than this, so may the other.
LEAST_ALLOWED = 1e-4


class GateError(Exception):
    """A backend computes something else than the reference; nothing is timed."""


@dataclass(frozen=True)
class Verdict:
    """How far GLS is from the reference in float64, relative to how far the weights moved.

    Attributes:
        error: of GLS as it is timed.
        allowed: HEADROOM times the error of the reference in float32.
    """

    error: float
    allowed: float


def check_gls(task: Task, dataset: Dataset, batch_size: int, **options: Any) -> Verdict:
    """Train `STEPS` steps thrice: with GLS as it is timed, and with the reference in two dtypes.

    Args:
        dataset: with float32 images, on the device that is timed.
        options: of GLS.
    Raises:
        GateError: the weights that GLS arrives at are further from the reference's in float64
            than HEADROOM times the reference's own in float32, or not finite.
    """
    start, exact = _train(task, in_double(dataset), batch_size, backend="reference", **options)
    _, reference = _train(task, dataset, batch_size, backend="reference", **options)
    _, timed = _train(task, dataset, batch_size, **options)
    moved = torch.linalg.vector_norm(exact - start)
    own = float(torch.linalg.vector_norm(reference - exact) / moved)
    verdict = Verdict(
        error=float(torch.linalg.vector_norm(timed - exact) / moved),
        allowed=max(HEADROOM * own, LEAST_ALLOWED),
    )
    # Written so that a NaN fails.
    if not verdict.error <= verdict.allowed:
        raise GateError(
            f"{task.name}, batch {batch_size}: GLS is {verdict.error:.1e} of the way off after "
            f"{STEPS} steps, the reference allows {verdict.allowed:.1e}; nothing is reported"
        )
    return verdict


def _train(
    task: Task, dataset: Dataset, batch_size: int, **options: Any
) -> tuple[Tensor, Tensor]:
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
