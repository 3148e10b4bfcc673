"""The tables of best epochs, and of the way to the baseline's best losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.convergence.cells import number, rate, spread_cell, title, weight_decay
from benchmarks.convergence.records import EpochRecord, Run
from benchmarks.convergence.summary import (
    CHALLENGER,
    BySeed,
    baseline_of,
    final_runs,
    spread,
)
from benchmarks.convergence.targets import Curve, Curves, Loss, Way, share_of
from benchmarks.harness.tables import NOTHING, Table

Runs = Mapping[tuple[str, str], BySeed]
Order = Sequence[tuple[str, str]]
Config = Mapping[str, Any]
LOSSES: tuple[Loss, Loss] = ("train_loss", "validation_loss")


def make_first_table(experiments: Sequence[tuple[Config, Sequence[EpochRecord]]]) -> Table:
    """The lowest losses of every optimizer, one row per task of each experiment."""
    names = list(dict.fromkeys(name for config, _ in experiments for name in config["optimizers"]))
    baselines = list(dict.fromkeys(baseline_of(config["optimizers"]) for config, _ in experiments))
    rows = []
    for config, records in experiments:
        settings = config["settings"]
        runs = final_runs(records, config["seeds"], settings["epochs"])
        for task in config["tasks"]:
            mine = runs.get((task, CHALLENGER), {})
            its = runs.get((task, baseline_of(config["optimizers"])), {})
            ratios = [
                [
                    ours[0] / theirs[0]
                    for seed in sorted(mine.keys() & its.keys())
                    if (ours := best_epoch(mine[seed], loss))
                    and (theirs := best_epoch(its[seed], loss))
                    and theirs[0] > 0
                ]
                for loss in LOSSES
            ]
            rows.append(
                (
                    title(task),
                    settings[f"data of {task}"]["name"],
                    str(settings["epochs"]),
                    *(_lowest_cell(runs.get((task, name), {})) for name in names),
                    " / ".join(_mean(found, 3) for found in ratios),
                )
            )
    return Table(
        "Lowest losses",
        "The lowest training loss and validation loss of an epoch, training / validation, means "
        "over the seeds. The last column is GLS's over "
        f"{' or '.join(map(title, baselines))}'s, per seed.",
        (
            "task",
            "data",
            "epochs",
            *(title(name) for name in names),
            f"GLS / {' or '.join(map(title, baselines))}",
        ),
        tuple(rows),
        labels=3,
    )


def make_best_table(runs: Runs, order: Order, baseline: str) -> Table:
    """The lowest training loss, validation loss and error of an epoch, and at which."""
    rows = []
    for task, name in order:
        by_seed, reference = runs[task, name], runs.get((task, baseline), {})
        ratios = [
            mine[0] / its[0]
            for seed in sorted(by_seed.keys() & reference.keys())
            if (mine := best_epoch(by_seed[seed], "validation_loss"))
            and (its := best_epoch(reference[seed], "validation_loss"))
            and its[0] > 0
        ]
        rows.append(
            (
                title(task),
                title(name),
                rate(by_seed),
                weight_decay(by_seed),
                *_best_cells(by_seed, "train_loss", 1),
                *_best_cells(by_seed, "validation_loss", 1),
                *_best_cells(by_seed, "validation_error", 100),
                spread_cell(spread(ratios), 3),
            )
        )
    return Table(
        "Best epochs",
        "The lowest of an epoch, and the epoch it was: over the seeds, mean [least, greatest], and "
        "the first and the last. The last column is the lowest validation loss over "
        f"{title(baseline)}'s, per seed.",
        (
            "task",
            "optimizer",
            "lr",
            "weight decay",
            "training loss",
            "epoch",
            "validation loss",
            "epoch",
            "error, %",
            "epoch",
            f"validation loss over {title(baseline)}'s",
        ),
        tuple(rows),
    )


def make_share_table(curves: Curves, order: Order, baseline: str) -> Table:
    """The shares of the baseline's steps and seconds that each optimizer needs."""
    rows = []
    for task, name in order:
        mine, its = curves.get((task, name), {}), curves.get((task, baseline), {})
        cells: list[str] = []
        for loss in LOSSES:
            shares = shares_of(mine, its, loss)
            cells += [_share_cell([way.steps for way in shares])]
            cells += [_share_cell([way.seconds for way in shares])]
        if any(cell != NOTHING for cell in cells):
            rows.append((title(task), title(name), *cells))
    name = title(baseline)
    return Table(
        f"Until {name}'s best loss",
        f"The steps and the seconds of training until {name}'s lowest training loss, and until its "
        f"lowest validation loss, over {name}'s own, per seed: mean [least, greatest]. Training "
        "losses are those of the evaluations, means since the one before, validation losses those "
        "of the evaluations and of the epochs; between two they count as linear.",
        (
            "task",
            "optimizer",
            "steps, training",
            "seconds, training",
            "steps, validation",
            "seconds, validation",
        ),
        tuple(rows),
    )


def make_failure_table(records: Sequence[Run]) -> Table:
    """Runs that another package's error ended."""
    rows = [
        (
            title(run[-1].task),
            title(run[-1].optimizer),
            run[-1].phase,
            f"{run[-1].lr:g}",
            str(run[-1].seed),
            str(run[-1].failure).replace("|", "\\|"),
        )
        for run in records
        if run[-1].failure is not None
    ]
    return Table(
        "Failures",
        "Runs that an error of the optimizer's package ended; they count as diverged.",
        ("task", "optimizer", "phase", "lr", "seed", "error"),
        tuple(rows),
        labels=6,
    )


def best_epoch(run: Run, figure: str) -> tuple[float, int] | None:
    """The lowest value and its first epoch; None if there is none."""
    found = [
        (value, record.epoch) for record in run if (value := getattr(record, figure)) is not None
    ]
    return min(found, default=None)


def shares_of(
    mine: Mapping[int, Mapping[Loss, Curve]], its: Mapping[int, Mapping[Loss, Curve]], loss: Loss
) -> list[Way]:
    """Of every seed that both have."""
    seeds = sorted(mine.keys() & its.keys())
    found = [share_of(mine[seed][loss], its[seed][loss]) for seed in seeds]
    return [way for way in found if way is not None]


def _lowest_cell(by_seed: BySeed) -> str:
    """Both losses, of all seeds; those of runs that diverged up to there."""
    found = [
        [best[0] for run in by_seed.values() if (best := best_epoch(run, loss))] for loss in LOSSES
    ]
    return " / ".join(_mean(losses, 4) for losses in found) if any(found) else NOTHING


def _mean(values: Sequence[float], digits: int) -> str:
    return number(sum(values) / len(values), digits) if values else NOTHING


def _best_cells(by_seed: BySeed, figure: str, factor: float) -> tuple[str, str]:
    found = [best for run in by_seed.values() if (best := best_epoch(run, figure)) is not None]
    if not found:
        return NOTHING, NOTHING
    epochs = sorted(epoch for _, epoch in found)
    shown = str(epochs[0]) if epochs[0] == epochs[-1] else f"{epochs[0]} to {epochs[-1]}"
    values = spread(factor * value for value, _ in found)
    return spread_cell(values, 2 if factor > 1 else 4), shown


def _share_cell(shares: Sequence[float]) -> str:
    """Mean and range; of seeds of which some do not get there, how many."""
    if not shares:
        return NOTHING
    reached = [share for share in shares if math.isfinite(share)]
    if len(reached) < len(shares):
        missing = f"not reached ({len(shares) - len(reached)} of {len(shares)})"
        return missing if not reached else f"{missing}, else {number(min(reached), 3)}"
    return spread_cell(spread(reached), 3)
