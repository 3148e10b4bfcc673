"""How names and figures are written in the tables of a convergence experiment."""

from __future__ import annotations

from benchmarks.convergence.summary import BySeed, Spread
from benchmarks.harness.tables import NOTHING
from benchmarks.workloads.optimizers import OPTIMIZERS
from benchmarks.workloads.tasks import TASKS


def title(name: str) -> str:
    """Of a task or an optimizer."""
    return TASKS[name].name if name in TASKS else OPTIMIZERS[name].title


def rate(by_seed: BySeed) -> str:
    """The learning rates of the runs."""
    return ", ".join(f"{lr:g}" for lr in sorted({run[0].lr for run in by_seed.values()}))


def weight_decay(by_seed: BySeed) -> str:
    """The weight decays of the runs that were given one."""
    decays = {run[0].weight_decay for run in by_seed.values()}
    given = sorted(decay for decay in decays if decay is not None)
    return ", ".join(f"{decay:g}" for decay in given) or NOTHING


def spread_cell(values: Spread | None, digits: int = 4) -> str:
    """Mean [least, greatest]."""
    if values is None:
        return NOTHING
    if values.count == 1:
        return number(values.mean, digits)
    low, high = number(values.low, digits), number(values.high, digits)
    return f"{number(values.mean, digits)} [{low}, {high}]"


def number(value: float, digits: int = 4) -> str:
    """A figure; a diverging but finite loss has no use for decimals."""
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.3g}"
