"""The tables and the heat maps of a stability experiment."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from benchmarks.harness.files import write_atomically
from benchmarks.harness.runs import describe_machine
from benchmarks.harness.tables import NOTHING, Table
from benchmarks.stability.run import Cell
from benchmarks.workloads.tasks import TASKS

DIVERGED = "diverged"
# Of the colours, in powers of 10 of the ratio to Adam's loss: what is further off looks the same.
FURTHEST = 1.0
# Beyond it a colour is too dark for black letters.
DARK = 0.6 * FURTHEST
DIVERGED_COLOUR = "#555555"


def plot_name(task: str) -> str:
    """The file of a task's heat map."""
    return f"stability-{task}.png"


def cells_in(results: Mapping[str, Any]) -> list[Cell]:
    """Of the results as they are in JSON."""
    return [Cell(**cell) for cell in results["cells"]]


def make_tables(results: Mapping[str, Any]) -> list[Table]:
    """The counts, then every loss."""
    cells = cells_in(results)
    tables = [make_count_table(results), *(_loss_table(cells, task) for task in tasks_of(cells))]
    return [table for table in tables if table.rows]


def make_count_table(results: Mapping[str, Any]) -> Table:
    """How many cells of each task and way to scale diverged, and how many beat Adam."""
    cells = cells_in(results)
    rows = []
    for task in tasks_of(cells):
        adam = {cell.lr: cell for cell in cells if cell.task == task and cell.normalize is None}
        for normalize in normalizes_of(cells, task):
            mine = _of(cells, task, normalize)
            against = adam if normalize is not None else {}
            ahead = sum(
                ratio_to(cell, against.get(cell.lr)) < 1 for cell in mine if not cell.diverged
            )
            best = min(
                (cell for cell in mine if not cell.diverged and cell.loss is not None),
                key=lambda cell: cell.loss or 0.0,
                default=None,
            )
            rows.append(
                (
                    task,
                    "Adam" if normalize is None else f'GLS, "{normalize}"',
                    f"{sum(cell.diverged for cell in mine)} of {len(mine)}",
                    NOTHING if normalize is None else f"{ahead} of {len(mine)}",
                    NOTHING if best is None else _number(best.loss),
                    NOTHING if best is None else f"{best.lr:g}",
                    NOTHING if best is None or best.damping is None else f"{best.damping:g}",
                )
            )
    settings = results["settings"]
    return Table(
        "Stability",
        f"Loss after {settings['steps']} steps, the mean of the last {settings['last_steps']} "
        "minibatches', over a grid of learning rates and dampings. A run has diverged when that is "
        "not finite, or above the loss before the first step. It is ahead when it is below Adam's "
        "loss at the same learning rate, or Adam diverged there.",
        ("task", "optimizer", "diverged", "ahead of Adam", "lowest loss", "at lr", "at damping"),
        tuple(rows),
    )


def render_report(results: Mapping[str, Any]) -> str:
    """The whole report.md."""
    settings = results["settings"]
    lines = [*describe_machine(results)]
    for task, data in settings["tasks"].items():
        lines.append(
            f"- {TASKS[task].title}: {data['data']}, {data['train_images']} to train on, batches "
            f"of {data['batch_size']}"
        )
    lines.append(
        f"- Seed {settings['seed']}: all runs of a task have the same initial weights and batches"
    )
    if settings["gls"]:
        options = ", ".join(f"{name}={value}" for name, value in settings["gls"].items())
        lines.append(f"- GLS options other than its defaults: {options}")
    images = [
        f"![{TASKS[task].title}: loss over learning rates and dampings]({plot_name(task)})"
        for task in tasks_of(cells_in(results))
    ]
    tables = [table.markdown() for table in make_tables(results)]
    return "\n\n".join(["# Stability", "\n".join(lines), *images, *tables]) + "\n"


def plot_task(cells: Sequence[Cell], task: str, path: Path) -> None:
    """A panel per way to scale: rates x dampings, coloured by the loss over Adam's."""
    normalizes = [name for name in normalizes_of(cells, task) if name is not None]
    adam = {cell.lr: cell for cell in _of(cells, task, None)}
    figure = Figure(
        figsize=(1.2 + 4.2 * max(len(normalizes), 1), 4.2), layout="constrained", dpi=150
    )
    panels = figure.subplots(1, max(len(normalizes), 1), squeeze=False)[0]
    norm = TwoSlopeNorm(0.0, -FURTHEST, FURTHEST)
    image = None
    for axes, normalize in zip(panels, normalizes, strict=False):
        mine = {(cell.damping, cell.lr): cell for cell in _of(cells, task, normalize)}
        rates = sorted({lr for _, lr in mine})
        dampings = sorted({damping for damping, _ in mine if damping is not None})
        shades = np.full((len(dampings), len(rates)), np.nan)
        for row, damping in enumerate(dampings):
            for column, lr in enumerate(rates):
                cell = mine.get((damping, lr))
                if cell is not None:
                    shades[row, column] = _shade(cell, adam.get(lr))
                    _write(axes, column, row, cell, shades[row, column])
        colours = colormaps["RdBu_r"].with_extremes(bad=DIVERGED_COLOUR)
        image = axes.imshow(shades, cmap=colours, norm=norm, origin="lower", aspect="auto")
        axes.set_xticks(range(len(rates)), [f"{lr:.2g}" for lr in rates], fontsize=8)
        axes.set_yticks(range(len(dampings)), [f"{value:g}" for value in dampings], fontsize=8)
        axes.set_xlabel("learning rate", fontsize=9)
        axes.set_title(f'normalize="{normalize}"', fontsize=10)
    panels[0].set_ylabel("damping", fontsize=9)
    figure.suptitle(f"{TASKS[task].title}: loss at the end; × diverged", fontsize=11)
    if image is not None:
        bar = figure.colorbar(image, ax=list(panels), shrink=0.9)
        bar.set_label("over Adam's at the same rate, power of 10", fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomically(path, content.getvalue())


def tasks_of(cells: Sequence[Cell]) -> list[str]:
    """In the order of the tasks."""
    found = {cell.task for cell in cells}
    return [task for task in TASKS if task in found]


def normalizes_of(cells: Sequence[Cell], task: str) -> list[str | None]:
    """In the order they were trained; Adam first."""
    return list(dict.fromkeys(cell.normalize for cell in cells if cell.task == task))


def ratio_to(cell: Cell, adam: Cell | None) -> float:
    """The loss over Adam's at the same rate: infinite where it diverged, NaN without Adam.

    0 where Adam's loss is not finite, or is 0.
    """
    if adam is None:
        return math.nan
    if cell.diverged or cell.loss is None:
        return math.inf
    if not adam.loss:
        return 0.0
    return cell.loss / adam.loss


def _shade(cell: Cell, adam: Cell | None) -> float:
    """The power of 10 of the ratio to Adam's, within the colours; NaN where it diverged."""
    ratio = ratio_to(cell, adam)
    if not math.isfinite(ratio):
        return math.nan
    return max(-FURTHEST, min(FURTHEST, math.log10(max(ratio, 1e-9))))


def _write(axes: Axes, column: int, row: int, cell: Cell, shade: float) -> None:
    text = "×" if cell.diverged else _number(cell.loss, 2)
    colour = "white" if cell.diverged or abs(shade) > DARK else "black"
    axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)


def _loss_table(cells: Sequence[Cell], task: str) -> Table:
    rates = sorted({cell.lr for cell in cells if cell.task == task})
    rows = []
    for normalize in normalizes_of(cells, task):
        mine = {(cell.damping, cell.lr): cell for cell in _of(cells, task, normalize)}
        name = "Adam" if normalize is None else f'GLS, "{normalize}"'
        for damping in dict.fromkeys(damping for damping, _ in mine):
            shown = NOTHING if damping is None else f"{damping:g}"
            rows.append((name, shown, *(_loss_cell(mine.get((damping, lr))) for lr in rates)))
    return Table(
        f"Losses of {task}",
        "At the end, by learning rate; what diverged but is finite stands in brackets.",
        ("optimizer", "damping", *(f"{lr:.2g}" for lr in rates)),
        tuple(rows),
    )


def _loss_cell(cell: Cell | None) -> str:
    if cell is None:
        return NOTHING
    if cell.loss is None:
        return DIVERGED
    return f"({_number(cell.loss)})" if cell.diverged else _number(cell.loss)


def _of(cells: Sequence[Cell], task: str, normalize: str | None) -> list[Cell]:
    return [cell for cell in cells if (cell.task, cell.normalize) == (task, normalize)]


def _number(value: float | None, digits: int = 4) -> str:
    if value is None:
        return NOTHING
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.1e}"
