"""The table of what was searched, and with which loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.convergence.cells import number, title
from benchmarks.convergence.records import EpochRecord, Run, RunKey
from benchmarks.convergence.summary import best_validation, last_loss
from benchmarks.harness.tables import Table

# What a search goes by, in words.
SELECTED = {"train": "training loss of the last epoch", "validation": "lowest validation loss"}


def make_search_table(
    records: Sequence[EpochRecord], order: Sequence[tuple[str, str]], config: Mapping[str, Any]
) -> Table:
    """The loss of each setting that was tried, one row per task and optimizer."""
    settings, first = config["settings"], config["seeds"][0]
    search = settings.get("search", {"seed": first, "tries": None, "select": "train"})
    seed, epochs = search["seed"], settings["grid_epochs"]
    loss_of = last_loss if search["select"] == "train" else best_validation
    searches: dict[tuple[str, str], list[Run]] = {}
    for run in by_run(records):
        if (run[0].phase, run[0].seed, run[0].epochs) == ("search", seed, epochs):
            searches.setdefault((run[0].task, run[0].optimizer), []).append(run)
    rows = []
    for key in order:
        losses = {_settings_of(run): loss_of(run) for run in searches.get(key, [])}
        if not losses:
            continue
        finite = {tried: loss for tried, loss in losses.items() if loss is not None}
        best = min(finite, key=lambda tried: (finite[tried], tried), default=None)
        cells = []
        for tried, loss in sorted(losses.items()):
            shown = f"{tried[0]:g}" if search["tries"] is None else f"{tried[0]:g}, {tried[1]:g}"
            cell = f"{shown}: {'diverged' if loss is None else number(loss)}"
            cells.append(f"**{cell}**" if tried == best else cell)
        separator = "; " if search["tries"] else ", "
        rows.append((title(key[0]), title(key[1]), separator.join(cells)))
    what = SELECTED[search["select"]].capitalize()
    if search["tries"] is None:
        return Table(
            "Learning rates searched",
            f"{what} at each learning rate, {epochs} epochs, seed {seed}; "
            "the best in bold. A grid whose best is at its edge was extended.",
            ("task", "optimizer", "lr: loss"),
            tuple(rows),
            labels=3,
        )
    return Table(
        "Learning rates and weight decays searched",
        f"{what} at each, {epochs} epochs, seed {seed}; the best in bold.",
        ("task", "optimizer", "lr, weight decay: loss"),
        tuple(rows),
        labels=3,
    )


def _settings_of(run: Run) -> tuple[float, float]:
    return run[0].lr, run[0].weight_decay or 0.0


def by_run(records: Sequence[EpochRecord]) -> list[Run]:
    """The records of each run together."""
    runs: dict[RunKey, Run] = {}
    for record in records:
        runs[record.key] = (*runs.get(record.key, ()), record)
    return list(runs.values())
