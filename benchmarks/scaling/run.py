"""What GLS adds to a step over batch size, width, depth and rank, and by which exponents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness.files import write_json
from benchmarks.harness.interleave import calibrate, choose_steps, quartiles, run_rounds
from benchmarks.harness.progress import say
from benchmarks.harness.runs import describe_run, finish_run
from benchmarks.workloads.contenders import BASELINE, CONTENDERS, RATE, Trainer
from benchmarks.workloads.gate import GateError, check_gls
from benchmarks.workloads.shapes import synthesise
from benchmarks.workloads.tasks import CLASSES, Shape, Task
from gls_fused import GLS

JSON_FILE = "scaling.json"
# GLS's extra time is over SGD's, whose step is next to nothing.
WITHOUT = "sgd"
NAMES = ("gls", BASELINE, WITHOUT)
BATCHES = 4


@dataclass(frozen=True)
class Point:
    """An MLP of `depth` hidden layers of `width`, as wide at the input, and a classifier."""

    batch: int = 128
    width: int = 512
    depth: int = 3
    rank: int = 32


SWEEPS: Mapping[str, tuple[int, ...]] = {
    "batch": (32, 64, 128, 256, 512, 1024),
    "width": (128, 256, 512, 1024, 2048),
    "depth": (1, 2, 4, 8, 16),
    "rank": (8, 16, 32, 64, 128),
}


@dataclass(frozen=True)
class ScalingOptions:
    """What is varied, and for how long each point is timed."""

    sweeps: Mapping[str, tuple[int, ...]]
    base: Point
    rounds: int
    seconds: float
    device: torch.device


@dataclass(frozen=True)
class Fit:
    """y = c x^exponent by least squares of log y on log x.

    Attributes:
        error: the exponent's standard error; None for two points, which leave no residual.
    """

    exponent: float
    error: float | None


def fit_power(xs: Sequence[float], ys: Sequence[float]) -> Fit | None:
    """The fit over the points with y > 0; None with fewer than two of them."""
    points = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True) if y > 0]
    count = len(points)
    if count < 2:
        return None
    middle = sum(x for x, _ in points) / count
    height = sum(y for _, y in points) / count
    spread = sum((x - middle) ** 2 for x, _ in points)
    exponent = sum((x - middle) * (y - height) for x, y in points) / spread
    if count == 2:
        return Fit(exponent, None)
    residual = sum((y - height - exponent * (x - middle)) ** 2 for x, y in points)
    return Fit(exponent, math.sqrt(residual / (count - 2) / spread))


def measure_scaling(options: ScalingOptions, out: Path) -> dict[str, Any]:
    """Time every point of every sweep; `out` is kept complete after each.

    Raises:
        GateError: GLS does something else than the reference; the point is not timed.
    """
    results = {
        **describe_run(options.device),
        "settings": {
            "base": asdict(options.base),
            "rounds": options.rounds,
            "slice_seconds": options.seconds,
            "lr": RATE,
        },
        "points": [],
    }
    for sweep, values in options.sweeps.items():
        for value in values:
            point = replace(options.base, **{sweep: value})
            found = _measure_point(options, point)
            results["points"].append({"sweep": sweep, "value": value, **asdict(point), **found})
            finish_run(results)
            write_json(out / JSON_FILE, results)
    return results


def make_task(point: Point) -> Task:
    """The MLP of a point as a task on images of `width` pixels."""

    def build(shape: Shape) -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten()]
        for _ in range(point.depth):
            layers += [nn.Linear(point.width, point.width), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(point.width, CLASSES))

    return Task(f"width {point.width}, depth {point.depth}", "MLP", True, build)


def _measure_point(options: ScalingOptions, point: Point) -> dict[str, Any]:
    task = make_task(point)
    dataset = synthesise((1, 1, point.width), BATCHES * point.batch).to(options.device)
    gate = check_gls(task, dataset, point.batch, rank=point.rank)
    builds = {name: CONTENDERS[name].build for name in NAMES}
    builds["gls"] = lambda model: GLS(model, lr=RATE, rank=point.rank)
    trainers = {name: Trainer(task, dataset, build, point.batch) for name, build in builds.items()}
    periods = {name: CONTENDERS[name].period for name in NAMES}
    seconds = {name: calibrate(trainers[name], periods[name]) for name in NAMES}
    for trainer in trainers.values():
        trainer.faults.clear()
    steps = choose_steps(seconds, periods, BASELINE, options.seconds)
    rounds = run_rounds(trainers, steps, options.rounds)
    for name, trainer in trainers.items():
        if not math.isfinite(trainer.loss.item()):
            raise GateError(f"{point}: {CONTENDERS[name].title} diverged, nothing is reported")
    extra = quartiles(extra_seconds(rounds))
    say(
        f"{point}: GLS {1e3 * quartiles(rounds['gls']).median:.3f} ms a step, "
        f"{1e6 * extra.median:.0f} µs more than SGD"
    )
    return {
        "gate": asdict(gate),
        "steps_per_slice": steps["gls"],
        "seconds_per_step": rounds,
        "minor_faults_per_step": {name: trainer.faults for name, trainer in trainers.items()},
    }


def extra_seconds(rounds: Mapping[str, Sequence[float]]) -> list[float]:
    """GLS's seconds per step less SGD's of the same round."""
    return [mine - its for mine, its in zip(rounds["gls"], rounds[WITHOUT], strict=True)]
