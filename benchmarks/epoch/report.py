"""The tables of the epoch experiment, as Markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.epoch.floor import make_floor_table
from benchmarks.epoch.stages import make_overhead_table, make_stage_table
from benchmarks.harness.interleave import Quartiles, pair_ratios, quartiles
from benchmarks.harness.runs import describe_machine
from benchmarks.harness.tables import NOTHING, Table, spread_cell, verdict
from benchmarks.workloads.contenders import BASELINE, CONTENDERS
from benchmarks.workloads.gate import HEADROOM, LEAST_ALLOWED, STEPS, TOLERANCE
from benchmarks.workloads.shapes import SHAPES

MIB = 2**20
STATE_BOUNDS = {"gls": 0.6, "gls-momentum0": 0.1}
TARGET_SHAPE = "cifar10"


def bound_of(shape: str, task: str, batch_size: int, optimizer: str) -> float | None:
    """The greatest ratio to Adam's seconds that is aimed at; None where nothing is."""
    if shape != TARGET_SHAPE:
        return None
    if optimizer == "gls-momentum0":
        return 1.02 if (task, batch_size) == ("mlp", 128) else None
    if optimizer != "gls":
        return None
    if batch_size == 128:
        return {"mlp": 1.05, "autoencoder": 1.05, "cnn": 1.10}.get(task)
    return {512: 1.05, 32: 1.10}.get(batch_size)


def make_tables(results: Mapping[str, Any]) -> list[Table]:
    """Every table that something was measured for."""
    cells: Sequence[Mapping[str, Any]] = results["cells"]
    tables = [make_target_table(cells), _seconds_table(cells), _state_table(cells)]
    if any("memory" in cell for cell in cells):
        tables.append(_memory_table(cells))
    if "ceilings" in results:
        tables.append(make_floor_table(cells, results["ceilings"]))
    if any("stages" in cell for cell in cells):
        tables.append(make_stage_table(cells))
    if "overhead" in results:
        tables.append(make_overhead_table(results["overhead"]))
    tables.append(_gate_table(cells))
    return [table for table in tables if table.rows]


def render_report(results: Mapping[str, Any]) -> str:
    """The whole report.md."""
    sections = ["# Seconds per epoch, and bytes", _setting(results)]
    return "\n\n".join([*sections, *(table.markdown() for table in make_tables(results))]) + "\n"


def _setting(results: Mapping[str, Any]) -> str:
    settings = results["settings"]
    lines = describe_machine(results)
    lines.append(
        f"- Each round runs a slice of an epoch of every optimizer, in an order that turns and "
        f"reverses: the same number of steps, a multiple of 10, about {settings['slice_seconds']:g}"
        f" s of Adam's. {settings['rounds']} rounds. An optimizer more than three times slower "
        f"than Adam takes fewer steps. lr {settings['lr']:g}, so that all keep the same "
        "weights: how long max pooling takes depends on what it pools."
    )
    for shape in dict.fromkeys(cell["shape"] for cell in results["cells"]):
        found = {cell["data"] for cell in results["cells"] if cell["shape"] == shape}
        lines.append(
            f"- {SHAPES[shape].title}: "
            + (
                "synthetic standardised images of its shape, as it is not on disk"
                if found == {"synthetic"}
                else ", ".join(sorted(found))
                if SHAPES[shape].text
                else "its own images"
            )
            + f"; an epoch is {SHAPES[shape].train_images} "
            + ("sequences" if SHAPES[shape].text else "images")
            + ", seconds are the median step times the epoch's steps"
        )
    return "\n".join(lines)


def _ratios(cell: Mapping[str, Any], name: str) -> Quartiles:
    seconds = cell["seconds_per_step"]
    return quartiles(pair_ratios(seconds[name], seconds[BASELINE]))


def _labels(cell: Mapping[str, Any]) -> tuple[str, str, str]:
    return SHAPES[cell["shape"]].title, cell["task"], str(cell["batch_size"])


def make_target_table(cells: Sequence[Mapping[str, Any]]) -> Table:
    """Every ratio that is aimed at."""
    rows = []
    for cell in cells:
        for name in cell["seconds_per_step"]:
            bound = bound_of(cell["shape"], cell["task"], cell["batch_size"], name)
            if bound is not None:
                found = _ratios(cell, name)
                rows.append(
                    (
                        f"{cell['task']}, batch {cell['batch_size']}",
                        CONTENDERS[name].title,
                        "seconds",
                        spread_cell(found),
                        f"{bound:.2f}",
                        verdict(found.median, bound),
                    )
                )
        for name, bound in STATE_BOUNDS.items():
            if cell["shape"] == TARGET_SHAPE and name in cell["state_bytes"]:
                share = cell["state_bytes"][name] / cell["state_bytes"][BASELINE]
                rows.append(
                    (
                        f"{cell['task']}, batch {cell['batch_size']}",
                        CONTENDERS[name].title,
                        "state",
                        f"{share:.3f}",
                        f"{bound:.2f}",
                        verdict(share, bound),
                    )
                )
    return Table(
        "Targets",
        "CIFAR-10's shape: the ratio to Adam (fused), its bound, and by how much of the bound it "
        "is met or missed.",
        ("cell", "optimizer", "of", "ratio to Adam", "bound", "verdict"),
        tuple(rows),
        labels=3,
    )


def make_short_table(cells: Sequence[Mapping[str, Any]]) -> Table:
    """A row per task and batch size: seconds and state over Adam's, with the bounds."""
    timed = [name for name in ("gls", "gls-momentum0", "sgd", "muon") if _in_all(cells, name)]
    kept = [name for name in STATE_BOUNDS if name in timed]
    rows = []
    for cell in cells:
        sizes, row = cell["state_bytes"], [cell["task"], str(cell["batch_size"])]
        row.append(f"{1e3 * quartiles(cell['seconds_per_step'][BASELINE]).median:.2f}")
        for name in timed:
            found = _ratios(cell, name)
            bound = bound_of(cell["shape"], cell["task"], cell["batch_size"], name)
            row.append(_against(spread_cell(found), found.median, bound))
        for name in kept:
            share = sizes[name] / sizes[BASELINE]
            row.append(_against(f"{share:.3f}", share, STATE_BOUNDS[name]))
        rows.append(tuple(row))
    return Table(
        "Seconds per epoch and bytes of state over Adam's",
        "Ratios to Adam (fused), pair by pair: median [quartiles]; after it the bound aimed at, "
        "and > where it is missed.",
        (
            "task",
            "batch",
            "Adam, ms a step",
            *(CONTENDERS[name].title for name in timed),
            *(f"state of {CONTENDERS[name].title}" for name in kept),
        ),
        tuple(rows),
        labels=2,
    )


def _in_all(cells: Sequence[Mapping[str, Any]], name: str) -> bool:
    return all(name in cell["seconds_per_step"] for cell in cells)


def _against(text: str, value: float, bound: float | None) -> str:
    if bound is None:
        return text
    return f"{text} {'≤' if value <= bound else '>'} {bound:.2f}"


def _seconds_table(cells: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for cell in cells:
        for name, seconds in cell["seconds_per_step"].items():
            bound = bound_of(cell["shape"], cell["task"], cell["batch_size"], name)
            found = _ratios(cell, name)
            step = quartiles(seconds).median
            faults = quartiles(cell["minor_faults_per_step"][name]).median
            rows.append(
                (
                    *_labels(cell),
                    CONTENDERS[name].title,
                    f"{1e3 * step:.3f}",
                    f"{step * cell['steps_per_epoch']:.2f}",
                    NOTHING if name == BASELINE else spread_cell(found),
                    NOTHING if bound is None else f"{bound:.2f}",
                    f"{faults:.0f}",
                )
            )
    return Table(
        "Seconds per epoch",
        "Forward, backward and step. The ratio is taken pair by pair within each round: median "
        "[lower quartile, upper quartile]. Faults are the minor page faults of a step, the rounds' "
        "median.",
        (
            "data",
            "task",
            "batch",
            "optimizer",
            "ms per step",
            "s per epoch",
            "ratio to Adam, fused",
            "bound",
            "faults",
        ),
        tuple(rows),
        labels=4,
    )


def _state_table(cells: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for cell in cells:
        baseline = cell["state_bytes"][BASELINE]
        for name, size in cell["state_bytes"].items():
            bound = STATE_BOUNDS.get(name)
            rows.append(
                (
                    *_labels(cell),
                    CONTENDERS[name].title,
                    f"{size / MIB:.2f}",
                    f"{size / cell['parameters']:.2f}",
                    f"{size / baseline:.3f}",
                    NOTHING if bound is None else f"{bound:.2f}",
                )
            )
    return Table(
        "Optimizer state",
        "Memory behind the tensors of the optimizer's state after the rounds.",
        (
            "data",
            "task",
            "batch",
            "optimizer",
            "MiB",
            "bytes per parameter",
            "ratio to Adam",
            "bound",
        ),
        tuple(rows),
        labels=4,
    )


def _memory_table(cells: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for cell in cells:
        memory = cell.get("memory", {})
        for name, size in memory.items():
            rows.append(
                (
                    *_labels(cell),
                    CONTENDERS[name].title,
                    f"{size / MIB:.1f}",
                    f"{size / memory[BASELINE]:.3f}",
                )
            )
    return Table(
        "Peak memory",
        "A fresh process per optimizer: its peak after 12 steps less what it held before the "
        "model was built. Resident memory on the CPU, the allocator's on a GPU.",
        ("data", "task", "batch", "optimizer", "MiB", "ratio to Adam"),
        tuple(rows),
        labels=4,
    )


def _gate_table(cells: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        (
            *_labels(cell),
            CONTENDERS[name].title,
            f"{found['double']:.1e}",
            f"{found['single']:.1e}",
            f"{found['allowed']:.1e}",
        )
        for cell in cells
        for name, found in cell["gate"].items()
    ]
    return Table(
        "Correctness gate",
        f"Against the reference in float64, {STEPS} steps: distance of the weights over the way "
        f"they went. GLS in float64 may be {TOLERANCE:.0e} off; as timed, in float32, {HEADROOM} "
        f"times as far as the reference in float32, or {LEAST_ALLOWED:g}.",
        ("data", "task", "batch", "optimizer", "float64", "float32", "allowed"),
        tuple(rows),
        labels=4,
    )
