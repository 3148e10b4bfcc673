"""The table of seconds to Adam's best training loss, as Markdown and for the terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness.interleave import pair_ratios, quartiles
from benchmarks.harness.runs import describe_machine
from benchmarks.harness.tables import NOTHING, Table, verdict
from benchmarks.time_to_loss.run import BASELINE, CHALLENGER, reach, target_of

# Of Adam's seconds, for 5 epochs on the whole of Fashion-MNIST.
BOUNDS = {"mlp": 0.45, "cnn": 0.45, "autoencoder": 0.5}
BOUND_SETTING = (5, "fashion-mnist", 60_000)


def bound_of(task: Mapping[str, Any], epochs: int) -> float | None:
    """The greatest share of Adam's seconds that is aimed at; None where nothing is."""
    setting = (epochs, task["data"], task["train_images"])
    return BOUNDS.get(task["task"]) if setting == BOUND_SETTING else None


def second_ratio(run: Mapping[str, Any]) -> float | None:
    """GLS's seconds over Adam's, infinite where GLS does not get there; None without a target."""
    target = target_of(run)
    if target is None:
        return None
    mine, its = reach(run, CHALLENGER, target), reach(run, BASELINE, target)
    assert its is not None
    return math.inf if mine is None else mine.seconds / its.seconds


def make_tables(results: Mapping[str, Any]) -> list[Table]:
    """Medians by task, and every seed."""
    tables = [make_ratio_table(results), _seed_table(results), _search_table(results)]
    return [table for table in tables if table.rows]


def make_ratio_table(results: Mapping[str, Any]) -> Table:
    """Seconds over Adam's by task, and the verdict."""
    settings = results["settings"]
    rows = []
    for task in results["tasks"]:
        ratios = [ratio for ratio in map(second_ratio, task["runs"]) if ratio is not None]
        bound = bound_of(task, settings["epochs"])
        middle = statistics.median(ratios) if ratios else math.nan
        rows.append(
            (
                task["task"],
                f"{task['data']}, {task['train_images']}",
                f"{task['lr'][BASELINE]:g}",
                f"{task['lr'][CHALLENGER]:g}",
                str(len(ratios)),
                f"{_ratio(middle)} [{_ratio(min(ratios))}, {_ratio(max(ratios))}]"
                if ratios
                else NOTHING,
                NOTHING if bound is None else f"{bound:.2f}",
                NOTHING
                if bound is None or not ratios
                else verdict(middle, bound)
                if math.isfinite(middle)
                else "missed: not reached",
            )
        )
    return Table(
        f"Seconds until Adam's best training loss of {settings['epochs']} epochs",
        "GLS's seconds of training over Adam's: over the seeds, median [least, greatest].",
        ("task", "data, images", "Adam lr", "GLS lr", "seeds", "ratio", "bound", "verdict"),
        tuple(rows),
    )


def render_report(results: Mapping[str, Any]) -> str:
    """The whole report.md."""
    sections = ["# Seconds to Adam's best training loss", _setting(results)]
    return "\n\n".join([*sections, *(table.markdown() for table in make_tables(results))]) + "\n"


def _setting(results: Mapping[str, Any]) -> str:
    settings = results["settings"]
    lines = [
        *describe_machine(results),
        f"- {settings['epochs']} epochs, batches of {_batch_sizes(results)}. The two optimizers "
        f"of a seed train in turn, a slice of 1/{settings['checkpoints_per_epoch']} epoch each, "
        "the first of a pair changing; they have the same initial weights and batches.",
        "- The training loss is the mean of the minibatch losses of the last epoch's worth of "
        f"steps, looked at every 1/{settings['checkpoints_per_epoch']} epoch from the end of the "
        "first one on. The target is the lowest that Adam has; seconds count up to the end of the "
        "first slice at or below it, training only. Nothing is interpolated.",
    ]
    if settings["gls"]:
        options = ", ".join(f"{name}={value}" for name, value in settings["gls"].items())
        lines.append(f"- GLS options other than its defaults: {options}")
    return "\n".join(lines)


def _batch_sizes(results: Mapping[str, Any]) -> str:
    """One for all, or those of the tasks."""
    general = results["settings"]["batch_size"]
    own = {task["task"]: task.get("batch_size", general) for task in results["tasks"]}
    others = [f"{size} ({task})" for task, size in own.items() if size != general]
    return ", ".join([str(general), *others])


def _seed_table(results: Mapping[str, Any]) -> Table:
    rows = []
    for task in results["tasks"]:
        for run in task["runs"]:
            target, ratio = target_of(run), second_ratio(run)
            if target is None or ratio is None:
                rows.append((task["task"], str(run["seed"]), "diverged", *(NOTHING,) * 7))
                continue
            mine, its = reach(run, CHALLENGER, target), reach(run, BASELINE, target)
            assert its is not None
            pairs = quartiles(pair_ratios(_slices(run, CHALLENGER), _slices(run, BASELINE)))
            faults = [
                quartiles(run["minor_faults_per_step"][n]).median for n in (BASELINE, CHALLENGER)
            ]
            rows.append(
                (
                    task["task"],
                    str(run["seed"]),
                    f"{target:.4f}",
                    f"{its.epochs:.1f}",
                    NOTHING if mine is None else f"{mine.epochs:.1f}",
                    f"{its.seconds:.2f}",
                    NOTHING if mine is None else f"{mine.seconds:.2f}",
                    _ratio(ratio),
                    f"{pairs.median:.3f}",
                    " / ".join(f"{value:.0f}" for value in faults),
                )
            )
    return Table(
        "Seed by seed",
        "The slices' ratio is of GLS's seconds to Adam's slice by slice, the median. Faults are "
        "minor page faults per step, the slices' median, Adam's / GLS's.",
        (
            "task",
            "seed",
            "target",
            "Adam epochs",
            "GLS epochs",
            "Adam s",
            "GLS s",
            "ratio",
            "slices' ratio",
            "faults",
        ),
        tuple(rows),
    )


def _search_table(results: Mapping[str, Any]) -> Table:
    rows = [
        (
            task["task"],
            ", ".join(
                f"{found['lr']:g}: "
                + ("diverged" if found["train_loss"] is None else f"{found['train_loss']:.4f}")
                for found in task["search"]
            ),
        )
        for task in results["tasks"]
        if task["search"]
    ]
    return Table(
        "Adam's learning rates searched",
        "Lowest training loss of an epoch at each, the first seed. A grid whose best is at its "
        "edge was extended.",
        ("task", "lr: loss"),
        tuple(rows),
    )


def _slices(run: Mapping[str, Any], name: str) -> Sequence[float]:
    seconds = run[name]["seconds"]
    return [after - before for before, after in zip([0.0, *seconds], seconds, strict=False)]


def _ratio(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "not reached"
