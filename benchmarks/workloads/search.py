"""The search of a learning rate, and of a weight decay with it, over half decades."""

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


def search_settings(
    grid: Sequence[float],
    decays: Sequence[float],
    tries: int,
    evaluate: Callable[[float, float], float],
) -> tuple[float, float]:
    """The learning rate and the weight decay of the lowest loss, of exactly `tries` tries.

    First the grid at the first decay. Each further try is next to the best pair so far, the first
    of these that is new: the next higher rate, the next lower one, another decay (another decay
    first, where the best pair's is not the first decay); next to the second best where none of
    them is new, and so on. So a grid whose best is at its edge is extended, then every decay is
    tried, and every optimizer has the same number of tries. A grid of one rate keeps it, and only
    the decays are tried, each once.

    Args:
        grid: at most `tries` rates.
        evaluate: learning rate, weight decay -> loss, infinite when it diverged.
    """
    losses = {(lr, decays[0]): evaluate(lr, decays[0]) for lr in grid}
    if len(grid) == 1:
        losses |= {(grid[0], decay): evaluate(grid[0], decay) for decay in decays[1:tries]}
        tries = len(losses)
    while len(losses) < tries:
        ranked = sorted(losses, key=lambda pair: (losses[pair], pair))
        further = next(
            pair for best in ranked for pair in _neighbours(best, decays) if pair not in losses
        )
        losses[further] = evaluate(*further)
    return min(losses, key=lambda pair: (losses[pair], pair))


def _neighbours(pair: tuple[float, float], decays: Sequence[float]) -> list[tuple[float, float]]:
    lr, decay = pair
    rates = [next_half_decade(lr, up=True), next_half_decade(lr, up=False)]
    nearby = [(rate, decay) for rate in rates]
    others = [(lr, other) for other in decays]
    return [*nearby, *others] if decay == decays[0] else [*others, *nearby]


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
