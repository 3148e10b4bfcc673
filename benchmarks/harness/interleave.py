"""Seconds compared within rounds, so that what disturbs the machine disturbs all alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

# A contender so slow that its slice would exceed this many of the baseline's takes fewer steps.
LONGEST_SLICE = 3


class Runs(Protocol):
    """What is timed."""

    def run(self, steps: int) -> float:
        """Take so many steps, and return their seconds."""


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles."""

    median: float
    low: float
    high: float


def quartiles(values: Sequence[float]) -> Quartiles:
    """Of at least one value."""
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(median, low, high)


def pair_ratios(rounds: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Seconds over the baseline's seconds of the same round."""
    return [mine / its for mine, its in zip(rounds, baseline, strict=True)]


def turn(names: Sequence[str], index: int) -> list[str]:
    """The order of a round: rotated, and backwards in odd rounds.

    So each is first, last and between others equally often, and follows either neighbour.
    """
    start = (index // 2) % len(names)
    order = [*names[start:], *names[:start]]
    return order[::-1] if index % 2 else order


def choose_steps(
    seconds: Mapping[str, float], periods: Mapping[str, int], baseline: str, slice_seconds: float
) -> dict[str, int]:
    """Steps of a slice: the same for all, about `slice_seconds` of the baseline's.

    They are a multiple of every period, so that each slice holds the same work. Who is too slow for
    that, and has no period, takes fewer.

    Args:
        seconds: of one step, by name.
        periods: steps after which the work repeats, by name.
    """
    period = max(periods.values())
    steps = period * max(1, round(slice_seconds / (period * seconds[baseline])))
    longest = LONGEST_SLICE * steps * seconds[baseline]
    return {
        name: steps if periods[name] > 1 else max(1, min(steps, int(longest / seconds[name])))
        for name in seconds
    }


def calibrate(runner: Runs, period: int) -> float:
    """Seconds of one step once warm; ends on a multiple of the period."""
    steps = max(period, 2)
    runner.run(steps)
    return runner.run(steps) / steps


def run_rounds(
    runners: Mapping[str, Runs],
    steps: Mapping[str, int],
    rounds: int,
    on_round: Callable[[int], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Seconds per step of every slice, by name; entry i of each list is of round i."""
    taken: dict[str, list[float]] = {name: [] for name in runners}
    for index in range(rounds):
        for name in turn(list(runners), index):
            taken[name].append(runners[name].run(steps[name]) / steps[name])
        on_round(index)
    return taken
