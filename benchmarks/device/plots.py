"""Part `plots`: two pictures of what the parts have recorded."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.device.report import PLOTS, result_of

Row = Mapping[str, Any]


def draw_plots(parts: Path, out: Path) -> None:
    """kernels.png and steps.png, of the figures that are there."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed")
        return
    kernels, steps = (
        _rows(parts, *names) for names in (("kernels", "Kernels"), ("steps", "Steps"))
    )
    if kernels:
        labels = [f"{row['layers']}: {row['op']}, {row['of']}, {row['backend']}" for row in kernels]
        values = [row["× floor"] for row in kernels]
        _bars(out / PLOTS[0], labels, values, "time over its floor (1 is the bound)")
    ours = [row for row in steps if row["optimizer"] != "adam"]
    if ours:
        labels = [f"{row['model']}, {row['precision']}: {row['optimizer']}" for row in ours]
        values = [row["of Adam's"] for row in ours]
        _bars(out / PLOTS[1], labels, values, "time of a whole step over fused Adam's")


def _rows(parts: Path, name: str, table: str) -> Sequence[Row]:
    found = result_of(parts, name) or {"tables": {}}
    rows: Sequence[Row] = found["tables"].get(table, [])
    return rows


def _bars(path: Path, labels: Sequence[str], values: Sequence[float], title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.22 * len(labels)), layout="constrained")
    axes.barh(range(len(labels)), values, color="tab:blue")
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
