"""The epoch experiment: seconds of forward, backward and step, and bytes, by optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.epoch.memory import measure_memory
from benchmarks.epoch.stages import measure_overhead, profile_stages
from benchmarks.harness.ceilings import measure_ceilings
from benchmarks.harness.files import write_json
from benchmarks.harness.interleave import (
    calibrate,
    choose_steps,
    pair_ratios,
    quartiles,
    run_rounds,
)
from benchmarks.harness.progress import say
from benchmarks.harness.runs import describe_run, finish_run
from benchmarks.workloads.contenders import BASELINE, CONTENDERS, RATE, Trainer, state_bytes
from benchmarks.workloads.data import Dataset
from benchmarks.workloads.gate import GateError, check_gls
from benchmarks.workloads.shapes import SHAPES, images_of
from benchmarks.workloads.tasks import TASKS

JSON_FILE = "epoch.json"


@dataclass(frozen=True)
class EpochOptions:
    """What is timed, on what, for how long."""

    tasks: tuple[str, ...]
    shapes: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    optimizers: tuple[str, ...]
    rounds: int
    seconds: float
    device: torch.device
    memory: bool
    profile: bool


# Options of GLS that differ from its defaults, by contender.
GLS_OPTIONS: Mapping[str, Mapping[str, Any]] = {"gls": {}, "gls-momentum0": {"momentum": 0.0}}


def measure_epochs(options: EpochOptions, out: Path) -> dict[str, Any]:
    """Time every cell of shapes x tasks x batch sizes; `out` is kept complete after each.

    A task on text has cells at the shape of text alone, the others at those of images.

    Raises:
        GateError: GLS does something else than the reference; the cell is not timed.
    """
    results = {**describe_run(options.device), "settings": _settings(options), "cells": []}
    if options.device.type == "cpu":
        results["ceilings"] = asdict(measure_ceilings())
    cells: list[dict[str, Any]] = results["cells"]
    for shape in options.shapes:
        fitting = [task for task in options.tasks if SHAPES[shape].fits(TASKS[task])]
        if not fitting:
            continue
        dataset = images_of(SHAPES[shape]).to(options.device)
        for task in fitting:
            for batch_size in options.batch_sizes:
                cells.append(_measure_cell(options, shape, dataset, task, batch_size))
                if options.memory:
                    cells[-1]["memory"] = {
                        name: measure_memory(name, task, shape, batch_size, options.device)
                        for name in options.optimizers
                    }
                if options.profile:
                    cells[-1]["stages"] = asdict(
                        profile_stages(TASKS[task], dataset, batch_size, options.rounds)
                    )
                finish_run(results)
                write_json(out / JSON_FILE, results)
    if options.profile:
        results["overhead"] = asdict(measure_overhead(options.rounds, options.seconds))
        finish_run(results)
        write_json(out / JSON_FILE, results)
    return results


def _measure_cell(
    options: EpochOptions, shape: str, dataset: Dataset, name: str, batch_size: int
) -> dict[str, Any]:
    task = TASKS[name]
    label = f"{SHAPES[shape].title} {name} batch {batch_size}"
    gates = {
        contender: asdict(check_gls(task, dataset, batch_size, **GLS_OPTIONS[contender]))
        for contender in options.optimizers
        if contender in GLS_OPTIONS
    }
    trainers = {
        contender: Trainer(task, dataset, CONTENDERS[contender].build, batch_size)
        for contender in options.optimizers
    }
    periods = {contender: CONTENDERS[contender].period for contender in trainers}
    seconds = {
        contender: calibrate(trainer, periods[contender]) for contender, trainer in trainers.items()
    }
    steps = choose_steps(seconds, periods, BASELINE, options.seconds)
    for trainer in trainers.values():
        trainer.faults.clear()
    say(f"{label}: gate passed, {steps[BASELINE]} steps a slice, {options.rounds} rounds")
    rounds = run_rounds(trainers, steps, options.rounds)
    for contender, trainer in trainers.items():
        if not math.isfinite(trainer.loss.item()):
            raise GateError(f"{label}: {CONTENDERS[contender].title} diverged, nothing is reported")
        ratio = quartiles(pair_ratios(rounds[contender], rounds[BASELINE]))
        say(
            f"  {CONTENDERS[contender].title:17} {1e3 * quartiles(rounds[contender]).median:9.3f} "
            f"ms a step, {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] of Adam's"
        )
    return {
        "shape": shape,
        "task": name,
        "batch_size": batch_size,
        "data": dataset.name,
        "steps_per_epoch": SHAPES[shape].train_images // batch_size,
        "parameters": sum(p.numel() for p in trainers[BASELINE].model.parameters()),
        "gate": gates,
        "steps_per_slice": steps,
        "seconds_per_step": rounds,
        "minor_faults_per_step": {name: trainer.faults for name, trainer in trainers.items()},
        "state_bytes": {
            contender: state_bytes(trainer.optimizer) for contender, trainer in trainers.items()
        },
    }


def _settings(options: EpochOptions) -> dict[str, Any]:
    return {
        "rounds": options.rounds,
        "slice_seconds": options.seconds,
        "lr": RATE,
        "optimizers": list(options.optimizers),
    }
