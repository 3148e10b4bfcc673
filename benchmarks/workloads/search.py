"""The search of a learning rate over a grid of half decades."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

MOST_EXTENSIONS = 2


def search_rate(grid: Sequence[float], evaluate: Callable[[float], float]) -> float:
    """The rate of the lowest loss, the grid being extended where its best is an edge.

    Args:
        evaluate: learning rate -> loss, infinite when it diverged.
    """
    losses = {lr: evaluate(lr) for lr in grid}
    for _ in range(MOST_EXTENSIONS):
        best = min(losses, key=lambda lr: (losses[lr], lr))
        if min(losses) < best < max(losses):
            break
        further = next_half_decade(best, up=best == max(losses))
        losses[further] = evaluate(further)
    return min(losses, key=lambda lr: (losses[lr], lr))


def next_half_decade(value: float, *, up: bool) -> float:
    """The next of ..., 0.1, 0.3, 1, 3, ... above or below."""
    exponent = math.floor(math.log10(value))
    ladder = [
        float(f"{digit}e{power}") for power in range(exponent - 1, exponent + 3) for digit in (1, 3)
    ]
    # The margin keeps 0.1 from being its own neighbour.
    if up:
        return min(step for step in ladder if step > value * 1.001)
    return max(step for step in ladder if step < value / 1.001)
