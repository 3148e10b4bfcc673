"""Seconds of training until Adam's best training loss, Adam and GLS taking turns.

The training loss at a checkpoint is the mean of the minibatch losses of the last epoch's worth of
steps, known from the end of the first epoch on; checkpoints are tenths of an epoch. At the ends of
epochs it is the training loss that the convergence experiment reports.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.errors import InputError
from benchmarks.harness.files import write_json
from benchmarks.harness.interleave import turn
from benchmarks.harness.progress import say
from benchmarks.harness.runs import describe_run, finish_run
from benchmarks.workloads.contenders import Trainer
from benchmarks.workloads.data import Dataset, load_dataset
from benchmarks.workloads.gate import STEPS, check_gls
from benchmarks.workloads.optimizers import OPTIMIZERS, check_gls_options
from benchmarks.workloads.search import search_rate
from benchmarks.workloads.tasks import TASKS, Task
from benchmarks.workloads.text import load_text
from benchmarks.workloads.training import WARM_UP_STEPS, train

JSON_FILE = "time_to_loss.json"
CHALLENGER, BASELINE = "gls", "adam"
# Of a task without one of its own.
BATCH_SIZE = 128
CHECKPOINTS_PER_EPOCH = 10


@dataclass(frozen=True)
class TimeOptions:
    """What is trained, on what, for how long.

    Attributes:
        batch_size: of every task; None: 128, or the task's own.
        rates: learning rates fixed by hand; Adam's is searched where it is not among them.
        gls: options for GLS.
    """

    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    epochs: int
    batch_size: int | None
    rates: Mapping[str, float]
    gls: Mapping[str, Any]
    device: torch.device
    dataset: str
    data: Path | None
    text: Path | None
    train_images: int | None

    def batch_size_of(self, task: Task) -> int:
        """Given by hand, or the task's own."""
        return self.batch_size or task.batch_size or BATCH_SIZE


@dataclass(frozen=True)
class Reached:
    """When a run first was at or below a loss.

    Attributes:
        epochs, seconds: of training, up to that checkpoint.
    """

    epochs: float
    seconds: float


class Run(Trainer):
    """A trainer that keeps the losses of the slice it runs."""

    losses: list[Tensor]

    def step(self) -> None:
        super().step()
        self.losses.append(self.loss)

    def run(self, steps: int) -> float:
        self.losses = []
        return super().run(steps)


def measure_time_to_loss(options: TimeOptions, out: Path) -> dict[str, Any]:
    """Train every task on every seed; `out` is kept complete after each seed.

    Raises:
        InputError: a bad option or bad data, before anything is trained.
        GateError: GLS does something else than the reference; the task is not trained.
    """
    check_gls_options(options.gls, [CHALLENGER], options.tasks)
    datasets = {task: _load(options, task) for task in options.tasks}
    results = {
        **describe_run(options.device),
        "settings": {
            "epochs": options.epochs,
            "batch_size": options.batch_size or BATCH_SIZE,
            "seeds": list(options.seeds),
            "checkpoints_per_epoch": CHECKPOINTS_PER_EPOCH,
            "gls": dict(options.gls),
        },
        "tasks": [],
    }
    for name, dataset in datasets.items():
        task = TASKS[name]
        batch_size = options.batch_size_of(task)
        few = replace(dataset, images=dataset.images[: STEPS * batch_size])
        gate = asdict(check_gls(task, few, batch_size, **options.gls))
        rates, search = _choose_rates(options, task, dataset)
        found: dict[str, Any] = {
            "task": name,
            "data": dataset.name,
            "train_images": len(dataset.images),
            "batch_size": batch_size,
            "steps_per_epoch": len(dataset.images) // batch_size,
            "gate": gate,
            "search": [{"lr": lr, "train_loss": loss} for lr, loss in sorted(search.items())],
            "lr": rates,
            "runs": [],
        }
        results["tasks"].append(found)
        for seed in options.seeds:
            found["runs"].append(_train_seed(options, task, dataset, rates, seed))
            finish_run(results)
            write_json(out / JSON_FILE, results)
    return results


def target_of(run: Mapping[str, Any]) -> float | None:
    """Adam's lowest training loss at a checkpoint; None if it has none."""
    return min((loss for loss in run[BASELINE]["train_loss"] if loss is not None), default=None)


def reach(run: Mapping[str, Any], name: str, target: float) -> Reached | None:
    """The first checkpoint at or below the target; None if there is none. Nothing is interpolated.

    Args:
        run: of one seed, as in the results.
    """
    curve = run[name]
    for epochs, seconds, loss in zip(
        run["epochs"], curve["seconds"], curve["train_loss"], strict=False
    ):
        if loss is not None and loss <= target:
            return Reached(epochs, seconds)
    return None


def running_mean(losses: Sequence[float], steps: int) -> float | None:
    """Mean of the last `steps` losses; None where there are fewer, or it is not finite."""
    if len(losses) < steps:
        return None
    mean = sum(losses[-steps:]) / steps
    return mean if math.isfinite(mean) else None


def _load(options: TimeOptions, task: str) -> Dataset:
    if TASKS[task].text:
        dataset = load_text(options.text, train_sequences=options.train_images)
    else:
        dataset = load_dataset(
            options.dataset,
            directory=options.data,
            supervised=TASKS[task].supervised,
            train_images=options.train_images,
        )
    count, batch_size = len(dataset.images), options.batch_size_of(TASKS[task])
    if count < CHECKPOINTS_PER_EPOCH * batch_size:
        what = "sequences" if TASKS[task].text else "images"
        raise InputError(
            f"--batch-size {batch_size}: {task} has {count} training {what}, fewer than the "
            f"{CHECKPOINTS_PER_EPOCH} batches between which an epoch's checkpoints lie"
        )
    return dataset.to(options.device)


def _choose_rates(
    options: TimeOptions, task: Task, dataset: Dataset
) -> tuple[dict[str, float], dict[float, float | None]]:
    """The rate of each, and Adam's lowest training loss at each rate that was searched."""
    rates = {CHALLENGER: OPTIMIZERS[CHALLENGER].rate, **options.rates}
    losses: dict[float, float | None] = {}
    if BASELINE in rates:
        return rates, losses

    def evaluate(lr: float) -> float:
        run = train(
            task,
            dataset,
            lambda model: OPTIMIZERS[BASELINE].build(model, lr, {}),
            seed=options.seeds[0],
            epochs=options.epochs,
            batch_size=options.batch_size_of(task),
        )
        found = [result.train_loss for result in run if result.train_loss is not None]
        losses[lr] = min(found, default=None)
        say(f"{task.name}: Adam at {lr:g}: {losses[lr]}")
        return min(found, default=math.inf)

    rates[BASELINE] = search_rate(OPTIMIZERS[BASELINE].grid, evaluate)
    return rates, losses


def _train_seed(
    options: TimeOptions, task: Task, dataset: Dataset, rates: Mapping[str, float], seed: int
) -> dict[str, Any]:
    """Both optimizers' seconds and losses at every checkpoint, slices in turn."""
    names = (CHALLENGER, BASELINE)

    def start(name: str) -> Run:
        gls = options.gls if name == CHALLENGER else {}
        return Run(
            task,
            dataset,
            lambda model: OPTIMIZERS[name].build(model, rates[name], gls),
            options.batch_size_of(task),
            seed,
        )

    for name in names:
        # No checkpoint pays for what the first steps of any run set up.
        start(name).run(WARM_UP_STEPS)
    runs = {name: start(name) for name in names}
    steps_per_epoch = len(dataset.images) // options.batch_size_of(task)
    ends = checkpoint_steps(steps_per_epoch, options.epochs)
    losses: dict[str, list[float]] = {name: [] for name in names}
    curves: dict[str, dict[str, list[Any]]] = {
        name: {"seconds": [], "train_loss": []} for name in names
    }
    for index, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        for name in turn(names, index):
            seconds = runs[name].run(end - begin)
            losses[name] += torch.stack(runs[name].losses).tolist()
            before = curves[name]["seconds"][-1] if index else 0.0
            curves[name]["seconds"].append(before + seconds)
            curves[name]["train_loss"].append(running_mean(losses[name], steps_per_epoch))
    found: dict[str, Any] = {
        "seed": seed,
        "epochs": [end / steps_per_epoch for end in ends],
        **curves,
        "minor_faults_per_step": {name: runs[name].faults for name in names},
    }
    target = target_of(found)
    times = {} if target is None else {name: reach(found, name, target) for name in names}
    shown = (f"{name} {at.seconds:.1f} s" if at else f"{name} never" for name, at in times.items())
    say(f"{task.name} seed {seed}: Adam's best {target}: {', '.join(shown)}")
    return found


def checkpoint_steps(steps_per_epoch: int, epochs: int) -> list[int]:
    """Steps taken at the end of each tenth of each epoch."""
    count = CHECKPOINTS_PER_EPOCH
    return [round(steps_per_epoch * index / count) for index in range(1, epochs * count + 1)]
