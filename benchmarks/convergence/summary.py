"""The figures of the comparison, computed from the recorded runs alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.convergence.records import EpochRecord, Run, is_complete

CHALLENGER, BASELINE = "gls", "adam"
# Runs of one task and optimizer, by seed.
BySeed = Mapping[int, Run]


@dataclass(frozen=True)
class Spread:
    """Mean, smallest and largest of the values over the seeds."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class SpeedUp:
    """How long a challenger takes to reach the best training loss of a baseline, for one seed.

    Attributes:
        target: the baseline's lowest mean training loss of an epoch.
        baseline_epochs, baseline_seconds: until the end of that epoch.
        epochs, seconds: until the end of the challenger's first epoch at or below the target;
            None if it has none. Nothing is interpolated.
    """

    target: float
    baseline_epochs: int
    baseline_seconds: float
    epochs: int | None
    seconds: float | None

    @property
    def epoch_factor(self) -> float | None:
        """How many times fewer epochs the challenger takes."""
        return None if self.epochs is None else self.baseline_epochs / self.epochs

    @property
    def second_factor(self) -> float | None:
        """How many times fewer seconds the challenger takes."""
        return None if self.seconds is None else self.baseline_seconds / self.seconds


def baseline_of(optimizers: Sequence[str]) -> str:
    """What the others are compared with: Adam, or AdamW where it stands for it."""
    return "adamw" if BASELINE not in optimizers and "adamw" in optimizers else BASELINE


def epoch_steps(settings: Mapping[str, Any], task: str) -> int:
    """Steps of an epoch of a recorded experiment."""
    batch_size: int = settings.get(f"batch size of {task}", settings["batch_size"])
    images: int = settings[f"data of {task}"]["train_images"]
    return images // batch_size


def spread(values: Iterable[float]) -> Spread | None:
    """Mean and range; None of nothing."""
    found = list(values)
    if not found:
        return None
    return Spread(sum(found) / len(found), min(found), max(found), len(found))


def final_runs(
    records: Iterable[EpochRecord], seeds: Sequence[int], epochs: int
) -> dict[tuple[str, str], dict[int, Run]]:
    """The complete final runs of these seeds and this length, by (task, optimizer) and seed."""
    runs: dict[tuple[str, str], dict[int, Run]] = {}
    for record in records:
        if record.phase == "final" and record.seed in seeds and record.epochs == epochs:
            by_seed = runs.setdefault((record.task, record.optimizer), {})
            by_seed[record.seed] = (*by_seed.get(record.seed, ()), record)
    for by_seed in runs.values():
        for seed in [seed for seed, run in by_seed.items() if not is_complete(run)]:
            del by_seed[seed]
    return {key: by_seed for key, by_seed in runs.items() if by_seed}


def last_loss(run: Run) -> float | None:
    """The last epoch's mean training loss; None if the run diverged."""
    return None if run[-1].diverged else run[-1].train_loss


def best_validation(run: Run) -> float | None:
    """The lowest validation loss of an epoch; None if there is none."""
    losses = [record.validation_loss for record in run if record.validation_loss is not None]
    return min(losses, default=None)


def loss_ratios(challenger: BySeed, baseline: BySeed) -> list[float]:
    """The challenger's last training loss over the baseline's, per seed that has both."""
    ratios = []
    for seed in sorted(challenger.keys() & baseline.keys()):
        above, below = last_loss(challenger[seed]), last_loss(baseline[seed])
        if above is not None and below is not None and below > 0:
            ratios.append(above / below)
    return ratios


def second_ratios(challenger: BySeed, baseline: BySeed) -> list[float]:
    """The challenger's seconds per epoch over the baseline's, per seed that has both."""
    return [
        seconds_per_epoch(challenger[seed]) / seconds_per_epoch(baseline[seed])
        for seed in sorted(challenger.keys() & baseline.keys())
    ]


def seconds_per_epoch(run: Run) -> float:
    """Mean training time of an epoch."""
    return sum(record.seconds for record in run) / len(run)


def cumulative_seconds(run: Run) -> list[float]:
    """Training time until the end of each epoch."""
    total, times = 0.0, []
    for record in run:
        total += record.seconds
        times.append(total)
    return times


def first_reached(run: Run, target: float) -> int | None:
    """The first epoch, from 1, whose mean training loss is at or below the target."""
    for record in run:
        if record.train_loss is not None and record.train_loss <= target:
            return record.epoch
    return None


def speed_up(challenger: Run, baseline: Run) -> SpeedUp | None:
    """The challenger's way to the baseline's best training loss; None if the baseline has none."""
    losses = [record.train_loss for record in baseline if record.train_loss is not None]
    if not losses:
        return None
    target = min(losses)
    baseline_epochs = first_reached(baseline, target)
    assert baseline_epochs is not None
    epochs = first_reached(challenger, target)
    return SpeedUp(
        target=target,
        baseline_epochs=baseline_epochs,
        baseline_seconds=cumulative_seconds(baseline)[baseline_epochs - 1],
        epochs=epochs,
        seconds=None if epochs is None else cumulative_seconds(challenger)[epochs - 1],
    )
