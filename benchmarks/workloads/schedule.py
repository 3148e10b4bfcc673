"""How a learning rate goes over a run: the same for every optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

KINDS = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """A rise over the first `warmup` steps, then constant, or down to 0 at the run's end.

    Attributes:
        kind: one of KINDS.
        warmup: steps until the rate is reached; it rises linearly.
    """

    kind: str = "constant"
    warmup: int = 0

    def factor(self, step: int, steps: int) -> float:
        """What the rate is multiplied by in step 0, 1, ... of `steps`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        left = (steps - step) / (steps - self.warmup)
        if self.kind == "linear":
            return left
        if self.kind == "cosine":
            return 0.5 * (1 - math.cos(math.pi * left))
        return 1.0


CONSTANT = Schedule()


def follow(schedule: Schedule, optimizer: Any, steps: int) -> Callable[[int], None]:
    """A function that sets the rates of an optimizer's groups before step 0, 1, ... of `steps`.

    A constant schedule leaves the groups alone.
    """
    if schedule == CONSTANT:
        return lambda step: None
    rates = [group["lr"] for group in optimizer.param_groups]

    def set_rates(step: int) -> None:
        factor = schedule.factor(step, steps)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = factor * rate

    return set_rates
