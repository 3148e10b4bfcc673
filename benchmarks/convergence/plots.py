"""The figure of a convergence experiment: one row of panels per task."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from benchmarks.convergence.records import EpochRecord, Run
from benchmarks.convergence.summary import (
    cumulative_seconds,
    epoch_steps,
    final_runs,
    spread,
)
from benchmarks.harness.files import write_atomically
from benchmarks.workloads.optimizers import OPTIMIZERS
from benchmarks.workloads.tasks import TASKS

# Okabe and Ito's palette, told apart with colour-blind eyes too, and three darker ones.
COLOURS = {
    "sgd": "#7A7A7A",
    "adam": "#0072B2",
    "gls": "#D55E00",
    "gls-sgd": "#E69F00",
    "muon": "#009E73",
    "sgd-momentum": "#CC79A7",
    "adamw": "#56B4E9",
    "gls-tuned": "#8B2500",
    "soap": "#F0E442",
    "shampoo": "#4B3B9C",
    "psgd-kron": "#7B4B2A",
}
MARKERS = {
    "sgd": "s",
    "adam": "^",
    "gls": "o",
    "gls-sgd": "D",
    "muon": "v",
    "sgd-momentum": "P",
    "adamw": "X",
    "gls-tuned": "h",
    "soap": "<",
    "shampoo": ">",
    "psgd-kron": "*",
}
MOST_MARKED_EPOCHS = 12
# A loss further above the smallest is cut off, so that one bad run does not flatten the others.
LARGEST_RANGE = 1000.0


class Curve(NamedTuple):
    """One optimizer's mean over the seeds, with the smallest and the largest."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def plot_convergence(config: Mapping[str, Any], records: Sequence[EpochRecord], path: Path) -> None:
    """Draw training and validation loss over epochs and steps, and over seconds."""
    runs = final_runs(records, config["seeds"], config["settings"]["epochs"])
    tasks = [task for task in config["tasks"] if any(key[0] == task for key in runs)]
    names = [name for name in config["optimizers"] if any(key[1] == name for key in runs)]
    panels: tuple[tuple[str, str, Callable[[EpochRecord], float | None], bool], ...] = (
        ("Training loss", "epoch", lambda record: record.train_loss, False),
        ("Validation loss", "epoch", lambda record: record.validation_loss, False),
        ("Training loss", "seconds of training", lambda record: record.train_loss, True),
        ("Validation loss", "seconds of training", lambda record: record.validation_loss, True),
    )
    figure = Figure(figsize=(16.5, 0.9 + 3.4 * max(len(tasks), 1)), layout="constrained", dpi=150)
    grid = figure.subplots(max(len(tasks), 1), len(panels), squeeze=False)
    for row, task in zip(grid, tasks, strict=False):
        for axes, (title, x_label, loss, over_seconds) in zip(row, panels, strict=True):
            for name in names:
                by_seed = runs.get((task, name), {})
                curve = _mean_curve(list(by_seed.values()), loss, over_seconds)
                _draw(axes, name, curve)
            _finish(axes, x_label, over_seconds)
            if task == tasks[0]:
                # At one height, with a second axis below and without.
                axes.set_title(title, fontsize=12, y=1.22)
        data = config["settings"][f"data of {task}"]
        for axes in row[:2]:
            _add_steps(axes, epoch_steps(config["settings"], task))
        row[0].set_ylabel(f"{TASKS[task].title}\n{data['name']}", fontsize=10)
    handles = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
    if handles:
        figure.legend(
            list(handles.values()),
            [str(label) for label in handles],
            loc="outside upper center",
            ncols=len(handles),
            frameon=False,
            fontsize=11,
        )
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomically(path, image.getvalue())


def _add_steps(axes: Axes, steps_per_epoch: int) -> None:
    """A second axis above an axis of epochs."""

    def to_steps(epochs: Any) -> Any:
        return epochs * steps_per_epoch

    def to_epochs(steps: Any) -> Any:
        return steps / steps_per_epoch

    above = axes.secondary_xaxis("top", functions=(to_steps, to_epochs))
    above.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    above.set_xlabel("steps", fontsize=9)
    above.tick_params(color="#999999", labelsize=8)
    above.spines["top"].set_visible(False)


def _mean_curve(
    runs: Sequence[Run], loss: Callable[[EpochRecord], float | None], over_seconds: bool
) -> Curve:
    """The mean over the seeds, up to the last epoch that all of them reached with a finite loss."""
    curve = Curve([], [], [], [])
    times = [cumulative_seconds(run) for run in runs]
    for index in range(min((len(run) for run in runs), default=0)):
        losses = [value for run in runs if (value := loss(run[index])) is not None]
        found = spread(losses)
        if found is None or found.count < len(runs) or found.low <= 0:
            break
        x = sum(time[index] for time in times) / len(times) if over_seconds else index + 1
        curve.x.append(x)
        curve.mean.append(found.mean)
        curve.low.append(found.low)
        curve.high.append(found.high)
    return curve


def _draw(axes: Axes, name: str, curve: Curve) -> None:
    if not curve.x:
        return
    colour = COLOURS[name]
    # The subject of the comparison lies on top.
    above = 1 if name.startswith("gls") else 0
    axes.fill_between(
        curve.x, curve.low, curve.high, color=colour, alpha=0.2, linewidth=0, zorder=2 + above
    )
    axes.plot(
        curve.x,
        curve.mean,
        color=colour,
        linewidth=1.8,
        marker=MARKERS[name] if len(curve.x) <= MOST_MARKED_EPOCHS else None,
        markersize=4.5,
        label=OPTIMIZERS[name].title,
        zorder=3 + above,
    )


def _finish(axes: Axes, x_label: str, over_seconds: bool) -> None:
    axes.set_yscale("log")
    losses = [np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.get_lines()]
    if losses:
        least = min(float(values.min()) for values in losses)
        top = min(max(float(values.max()) for values in losses), LARGEST_RANGE * least)
        bottom, top = least / 1.15, top * 1.15
        axes.set_ylim(bottom, top)
        _tick_logarithmically(axes, top / bottom)
    axes.set_xlabel(x_label, fontsize=10)
    if over_seconds:
        axes.set_xlim(left=0)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(which="major", color="#D9D9D9", linewidth=0.6)
    axes.tick_params(which="both", color="#999999", labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#999999")


def _tick_logarithmically(axes: Axes, span: float) -> None:
    """Label enough of a decade's values that a narrow range has labels, too."""
    decades = math.log10(span)
    if decades < 0.5:
        subs: tuple[float, ...] = (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)
    elif decades < 1.6:
        subs = (1, 2, 3, 5, 7)
    elif decades < 3:
        subs = (1, 3)
    else:
        subs = (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=100))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
