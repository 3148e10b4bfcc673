"""The way to a baseline's best loss, in steps and in seconds, interpolated between measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from benchmarks.convergence.records import EvaluationRecord, Run, RunKey
from benchmarks.convergence.summary import BySeed, cumulative_seconds

Loss = Literal["train_loss", "validation_loss"]


class Point(NamedTuple):
    """A loss after some steps and seconds of training; None where it was not finite."""

    step: int
    seconds: float
    loss: float | None


Curve = Sequence[Point]
# By (task, optimizer), seed and loss.
Curves = Mapping[tuple[str, str], Mapping[int, Mapping[Loss, Curve]]]


class Way(NamedTuple):
    """Steps and seconds of training until a loss; or both over a baseline's, as shares.

    Infinite where a run does not get there.
    """

    steps: float
    seconds: float


NEVER = Way(math.inf, math.inf)


def curves_of(
    runs: Mapping[tuple[str, str], BySeed],
    evaluations: Sequence[EvaluationRecord],
    epoch_steps: Mapping[str, int],
) -> Curves:
    """The training losses of the evaluations; their validation losses, and those of epochs.

    Args:
        epoch_steps: steps of an epoch, by task.
    """
    by_run: dict[RunKey, list[EvaluationRecord]] = {}
    for record in evaluations:
        by_run.setdefault(record.key, []).append(record)
    return {
        (task, name): {
            seed: {
                "train_loss": [Point(e.step, e.seconds, e.train_loss) for e in found],
                "validation_loss": _validation_losses(run, found, epoch_steps[task]),
            }
            for seed, run in by_seed.items()
            if (found := by_run.get(run[0].key))
        }
        for (task, name), by_seed in runs.items()
    }


def _validation_losses(run: Run, evaluations: Sequence[EvaluationRecord], steps: int) -> Curve:
    ends = zip(run, cumulative_seconds(run), strict=True)
    found = {end.epoch * steps: (seconds, end.validation_loss) for end, seconds in ends}
    found.update((each.step, (each.seconds, each.validation_loss)) for each in evaluations)
    return [Point(step, *found[step]) for step in sorted(found)]


def best_loss(curve: Curve) -> float | None:
    """The lowest; None if there is none."""
    return min((point.loss for point in curve if point.loss is not None), default=None)


def way_to(curve: Curve, target: float) -> Way:
    """Until the loss first is at or below the target.

    Between the point before and the one that is there the loss counts as linear. A run that is
    there at its first point counts until then, which is at most too much.
    """
    above: Point | None = None
    for point in curve:
        if point.loss is not None and point.loss <= target:
            if above is None or above.loss is None:
                return Way(point.step, point.seconds)
            part = (above.loss - target) / (above.loss - point.loss)
            return Way(
                above.step + part * (point.step - above.step),
                above.seconds + part * (point.seconds - above.seconds),
            )
        above = point
    return NEVER


def share_of(curve: Curve, baseline: Curve) -> Way | None:
    """The way to the baseline's best loss over the baseline's own; None if it has none."""
    target = best_loss(baseline)
    if target is None:
        return None
    mine, its = way_to(curve, target), way_to(baseline, target)
    return Way(mine.steps / its.steps, mine.seconds / its.seconds)
