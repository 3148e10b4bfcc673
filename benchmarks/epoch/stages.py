"""Where the time of a step with GLS goes: a profile by stage, and the overhead that has no size."""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.autograd.profiler import record_function

from benchmarks.harness.interleave import Quartiles, quartiles, run_rounds
from benchmarks.harness.tables import Table
from benchmarks.workloads.contenders import BASELINE, CONTENDERS, Trainer
from benchmarks.workloads.data import Dataset
from benchmarks.workloads.shapes import SHAPES, synthesise
from benchmarks.workloads.sizes import GATHER_EVERY
from benchmarks.workloads.tasks import CLASSES, Shape, Task
from gls_fused.backends.dispatch import resolve_backend

PERIOD = CONTENDERS["gls"].period
# Backward nodes of linear layers and convolutions, captured or not: what their names contain.
LAYER_NODES = ("CapturedLinear", "_LinearBackward", "_Conv2dBackward", "Addmm", "ConvolutionBack")
NODE = "autograd::engine::evaluate_function: "
STEPS = ("Optimizer.step#GLS.step", "Optimizer.step#SGD.step")
PREFIX = "stage: "
OPS = {
    "commit_subspaces_": "commit",
    "update_layers_": "update, with P at the step site",
    "update_spectral_layers_": "orthogonal step",
}


@dataclass(frozen=True)
class Stages:
    """Microseconds per step under the profiler, averaged over GLS's period of ten steps.

    Attributes:
        stages: by name; the first two are differences of the layers' backward, see `STAGE_NOTE`.
        step: of GLS's whole step, forward and backward included.
        sgd_step: the same with SGD.
    """

    stages: Mapping[str, float]
    step: float
    sgd_step: float


@dataclass(frozen=True)
class Overhead:
    """Microseconds per step of a model too small for its arithmetic to take time.

    Attributes:
        sgd: of SGD's whole step.
        extra: what a step takes longer than SGD's, by optimizer, pair by pair within rounds.
    """

    sgd: Quartiles
    extra: Mapping[str, Quartiles]


STAGE_NOTE = (
    "Microseconds per step by torch.profiler, which makes every op slower by about a microsecond; "
    "averages over ten steps of medians. rows: the backward of linear layers and convolutions, "
    "less the same of SGD's, in the steps that gather nothing (A P, or P on the layer's gradient, "
    "and the capture's own cost). sketch: what that backward takes longer in the steps that "
    "gather. rest of step(): what is in GLS.step outside the ops named here, Python above all. "
    "other: what forward, zero_grad and the rest of backward take longer than SGD's, and noise."
)


def profile_stages(task: Task, dataset: Dataset, batch_size: int, rounds: int) -> Stages:
    """Profile GLS and SGD for `rounds` periods of ten steps each."""
    gls = Trainer(task, dataset, CONTENDERS["gls"].build, batch_size)
    sgd = Trainer(task, dataset, CONTENDERS["sgd"].build, batch_size)
    gls.next_steps(2 * PERIOD)
    sgd.next_steps(2 * PERIOD)
    steps, plain_sgd = [], []
    for _ in range(rounds):
        with _labelled(resolve_backend("auto", {dataset.images.device.type})):
            steps += _profile_period(gls)
        plain_sgd += _profile_period(sgd)
    gathering = [step for index, step in enumerate(steps) if index % GATHER_EVERY == 0]
    plain = [step for index, step in enumerate(steps) if index % GATHER_EVERY]
    backward, backward_sgd = _median(plain, "layers"), _median(plain_sgd, "layers")
    stages = {
        "rows": backward - backward_sgd,
        "sketch": (_median(gathering, "layers") - backward) / GATHER_EVERY,
        **{stage: _typical(steps, PREFIX + stage) for stage in OPS.values()},
    }
    named = sum(stages[stage] for stage in OPS.values())
    stages["rest of step()"] = _typical(steps, "step") - named
    whole, whole_sgd = _typical(steps, "whole"), _typical(plain_sgd, "whole")
    outside = whole - _typical(steps, "step")
    outside_sgd = whole_sgd - _typical(plain_sgd, "step")
    stages["other"] = outside - outside_sgd - stages["rows"] - stages["sketch"]
    return Stages(stages, whole, whole_sgd)


def measure_overhead(rounds: int, seconds: float) -> Overhead:
    """Time a three-layer MLP of width 8 on batches of 8 with GLS, Adam and SGD in turn."""
    task = Task("tiny", "MLP of width 8", True, _build_tiny)
    dataset = synthesise((1, 2, 4), 512)
    names = ("gls", "gls-momentum0", BASELINE, "sgd")
    trainers = {name: Trainer(task, dataset, CONTENDERS[name].build, 8) for name in names}
    for trainer in trainers.values():
        trainer.next_steps(2 * PERIOD)
    steps = PERIOD * max(1, round(seconds / (trainers["gls"].run(PERIOD))))
    taken = run_rounds(trainers, dict.fromkeys(names, steps), rounds)
    return Overhead(
        sgd=quartiles([1e6 * second for second in taken["sgd"]]),
        extra={
            name: quartiles(
                [
                    1e6 * (mine - plain)
                    for mine, plain in zip(taken[name], taken["sgd"], strict=True)
                ]
            )
            for name in names[:-1]
        },
    )


def make_stage_table(cells: Sequence[Mapping[str, Any]]) -> Table:
    """One row per cell that was profiled, one column per stage."""
    found = [cell for cell in cells if "stages" in cell]
    names = list(found[0]["stages"]["stages"])
    rows = []
    for cell in found:
        stages = cell["stages"]
        rows.append(
            (
                f"{SHAPES[cell['shape']].title} {cell['task']}",
                str(cell["batch_size"]),
                *(
                    f"{stages['stages'][name]:.0f} ({stages['stages'][name] / stages['step']:.1%})"
                    for name in names
                ),
                f"{stages['step']:.0f}",
                f"{stages['sgd_step']:.0f}",
            )
        )
    header = ("task", "batch", *names, "GLS, whole", "SGD, whole")
    return Table("Where a step with GLS takes its time", STAGE_NOTE, header, tuple(rows))


def make_overhead_table(overhead: Mapping[str, Any]) -> Table:
    """Microseconds that a step costs whatever the sizes."""
    rows = [(CONTENDERS[name].title, _cell(extra)) for name, extra in overhead["extra"].items()]
    return Table(
        "Overhead per step",
        "Microseconds that a step takes longer than SGD's on an MLP of three linear layers of "
        "width 8, batches of 8: Python, the dispatcher and the launching of ops, as there is next "
        "to no arithmetic. Median [lower, upper quartile] of the differences within rounds; "
        f"SGD's whole step, forward and backward included, takes {_cell(overhead['sgd'])}.",
        ("optimizer", "more than SGD, µs"),
        (*rows,),
        labels=1,
    )


def _cell(values: Mapping[str, float]) -> str:
    return f"{values['median']:.0f} [{values['low']:.0f}, {values['high']:.0f}]"


def _build_tiny(shape: Shape) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES)
    )


@contextlib.contextmanager
def _labelled(backend: ModuleType) -> Iterator[None]:
    """Show the backend's ops to the profiler, whichever backend it is."""

    def label(op: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(op)
        def labelled(*args: Any, **kwargs: Any) -> Any:
            with record_function(PREFIX + name):
                return op(*args, **kwargs)

        return labelled

    there = {op: name for op, name in OPS.items() if hasattr(backend, op)}
    ops = {op: label(getattr(backend, op), name) for op, name in there.items()}
    with mock.patch.multiple(backend, **ops):
        yield


def _profile_period(trainer: Trainer) -> list[dict[str, float]]:
    """Microseconds of each step of a period, by what they are spent in."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    # All of one cycle, which torch 2.11 warns of unless it is told so.
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for _ in range(PERIOD):
            with record_function("whole"):
                trainer.step()
    # FunctionEvent carries no types.
    events: list[Any] = list(profiler.events())
    steps = [event.time_range for event in events if event.name == "whole"]
    steps.sort(key=lambda times: times.start)
    return [_sort_events(events, times.start, times.end) for times in steps]


def _sort_events(events: Sequence[Any], start: float, end: float) -> dict[str, float]:
    """Microseconds of one step by label; "layers" are all nodes of LAYER_NODES."""
    found = {"whole": end - start}
    for event in events:
        name, times = event.name, event.time_range
        if not (start <= times.start and times.end <= end):
            continue
        if name.startswith(NODE) and any(node in name for node in LAYER_NODES):
            name = "layers"
        elif name in STEPS:
            name = "step"
        elif not name.startswith(PREFIX):
            continue
        found[name] = found.get(name, 0.0) + times.end - times.start
    return found


def _median(steps: Sequence[Mapping[str, float]], name: str) -> float:
    return statistics.median(step.get(name, 0.0) for step in steps)


def _typical(steps: Sequence[Mapping[str, float]], name: str) -> float:
    """The mean over the period's steps of their medians over the periods."""
    return statistics.mean(_median(steps[index::PERIOD], name) for index in range(PERIOD))
