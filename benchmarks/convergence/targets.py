"""The way to a baseline's best loss, in steps and in seconds, interpolated between evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from benchmarks.convergence.records import EvaluationRecord
from benchmarks.convergence.summary import BySeed

Loss = Literal["train_loss", "validation_loss"]
# The evaluations of one run, in their order.
Curve = Sequence[EvaluationRecord]
Curves = Mapping[tuple[str, str], Mapping[int, Curve]]


class Way(NamedTuple):
    """Steps and seconds of training until a loss; or both over a baseline's, as shares.

    Infinite where a run does not get there.
    """

    steps: float
    seconds: float


NEVER = Way(math.inf, math.inf)


def curves_of(
    runs: Mapping[tuple[str, str], BySeed], evaluations: Sequence[EvaluationRecord]
) -> Curves:
    """The evaluations of these runs, by (task, optimizer) and seed."""
    wanted = {run[0].key for by_seed in runs.values() for run in by_seed.values()}
    found: dict[tuple[str, str], dict[int, list[EvaluationRecord]]] = {}
    for record in evaluations:
        if record.key in wanted:
            by_seed = found.setdefault((record.task, record.optimizer), {})
            by_seed.setdefault(record.seed, []).append(record)
    return found


def best_loss(curve: Curve, loss: Loss) -> float | None:
    """The lowest at an evaluation; None if there is none."""
    found = [value for record in curve if (value := getattr(record, loss)) is not None]
    return min(found, default=None)


def way_to(curve: Curve, loss: Loss, target: float) -> Way:
    """Until the loss first is at or below the target.

    Between the evaluation before and the one that is there the loss counts as linear. A run that is
    there at its first evaluation counts until then, which is at most too much.
    """
    before: EvaluationRecord | None = None
    for record in curve:
        value = getattr(record, loss)
        if value is not None and value <= target:
            if before is None:
                return Way(record.step, record.seconds)
            above = getattr(before, loss)
            part = (above - target) / (above - value)
            return Way(
                before.step + part * (record.step - before.step),
                before.seconds + part * (record.seconds - before.seconds),
            )
        before = record if value is not None else None
    return NEVER


def share_of(curve: Curve, baseline: Curve, loss: Loss) -> Way | None:
    """The way to the baseline's best loss over the baseline's own; None if it has none."""
    target = best_loss(baseline, loss)
    if target is None:
        return None
    mine, its = way_to(curve, loss, target), way_to(baseline, loss, target)
    return Way(mine.steps / its.steps, mine.seconds / its.seconds)
