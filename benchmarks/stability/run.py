"""The stability experiment: short runs over a grid of learning rates and dampings."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness.errors import InputError
from benchmarks.harness.files import write_json
from benchmarks.harness.progress import Reporter
from benchmarks.harness.runs import describe_run, finish_run
from benchmarks.workloads.contenders import Trainer
from benchmarks.workloads.data import Dataset, load_dataset
from benchmarks.workloads.optimizers import OPTIMIZERS
from benchmarks.workloads.tasks import TASKS
from benchmarks.workloads.text import load_text
from benchmarks.workloads.training import Steps

JSON_FILE = "stability.json"
BASELINE = "adam"
# The loss at the end is the mean of so many minibatches'.
LAST_STEPS = 20


@dataclass(frozen=True)
class StabilityOptions:
    """What is trained, and on which grid.

    Attributes:
        normalizes: GLS's ways to scale a step.
        rates, dampings: as they are, not as multiples of the defaults.
        gls: other options for GLS.
    """

    tasks: tuple[str, ...]
    normalizes: tuple[str, ...]
    rates: tuple[float, ...]
    dampings: tuple[float, ...]
    steps: int
    batch_size: int | None
    seed: int
    gls: Mapping[str, Any]
    device: torch.device
    dataset: str
    data: Path | None
    text: Path | None


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        normalize, damping: None for Adam.
        first_loss: of the first batch, before the first step.
        loss: mean of the last minibatches' losses; None when one was not finite.
        diverged: the loss is not finite, or above the first.
        seconds: of the whole run.
    """

    task: str
    normalize: str | None
    lr: float
    damping: float | None
    first_loss: float
    loss: float | None
    diverged: bool
    seconds: float

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from the others."""
        return self.task, self.normalize, self.lr, self.damping


@dataclass(frozen=True)
class Shown:
    """A cell as progress shows it."""

    train_loss: float | None
    seconds: float
    diverged: bool
    epoch: int = 1
    epochs: int = 1


def measure_stability(
    options: StabilityOptions, out: Path, reporter: Reporter, *, resume: bool
) -> dict[str, Any]:
    """Train every cell that is not there yet; `out` is kept complete after each.

    Raises:
        InputError: a bad option or bad data, or earlier results of other settings.
    """
    datasets = {task: _load(options, task) for task in options.tasks}
    results = {**describe_run(options.device), "settings": _settings(options, datasets)}
    earlier = _read(out / JSON_FILE, results) if resume else []
    done = {Cell(**cell).key: cell for cell in earlier}
    keys = cells_of(options)
    # Those that are not of this grid stay.
    results["cells"] = list(done.values())
    reporter.expect(len(keys))
    for task, normalize, lr, damping in keys:
        label = f"{task} Adam lr {lr:g}"
        if normalize is not None:
            label = f"{task} GLS {normalize} lr {lr:g} damping {damping:g}"
        if (task, normalize, lr, damping) in done:
            reporter.skip_run(label, 1)
            continue
        reporter.start_run(label, 1, options.steps)
        cell = _train(options, datasets[task], (task, normalize, lr, damping), reporter.batch)
        reporter.epoch(Shown(cell.loss, cell.seconds, cell.diverged))
        results["cells"].append(asdict(cell))
        finish_run(results)
        write_json(out / JSON_FILE, results)
    finish_run(results)
    write_json(out / JSON_FILE, results)
    return results


def cells_of(
    options: StabilityOptions,
) -> list[tuple[str, str | None, float, float | None]]:
    """Task, normalize, learning rate and damping of every run; Adam's of a task come first."""
    found: list[tuple[str, str | None, float, float | None]] = []
    for task in options.tasks:
        found += [(task, None, lr, None) for lr in options.rates]
        found += [
            (task, normalize, lr, damping)
            for normalize in options.normalizes
            for damping in options.dampings
            for lr in options.rates
        ]
    return found


def batch_size_of(options: StabilityOptions, task: str) -> int:
    """Given by hand, or the task's own."""
    return options.batch_size or TASKS[task].batch_size or 128


def _load(options: StabilityOptions, task: str) -> Dataset:
    if TASKS[task].text:
        dataset = load_text(options.text)
    else:
        dataset = load_dataset(
            options.dataset, directory=options.data, supervised=TASKS[task].supervised
        )
    size = batch_size_of(options, task)
    if len(dataset.images) < size:
        raise InputError(f"--batch-size {size} is more than {task} has data to train on")
    return dataset.to(options.device)


def _train(
    options: StabilityOptions,
    dataset: Dataset,
    key: tuple[str, str | None, float, float | None],
    on_batch: Callable[[], None],
) -> Cell:
    task, normalize, lr, damping = key

    def build(model: nn.Module) -> Steps:
        if normalize is None:
            return OPTIMIZERS[BASELINE].build(model, lr, {})
        given = {**options.gls, "normalize": normalize, "damping": damping}
        return OPTIMIZERS["gls"].build(model, lr, given)

    start = time.perf_counter()
    trainer = Trainer(TASKS[task], dataset, build, batch_size_of(options, task), options.seed)
    losses: list[float] = []
    for _ in range(options.steps):
        trainer.step()
        losses.append(trainer.loss.item())
        on_batch()
        # What is not finite stays so.
        if not math.isfinite(losses[-1]):
            break
    last = losses[-LAST_STEPS:]
    loss = sum(last) / len(last)
    finite = math.isfinite(loss)
    return Cell(
        task=task,
        normalize=normalize,
        lr=lr,
        damping=damping,
        first_loss=losses[0],
        loss=loss if finite else None,
        diverged=not finite or loss > losses[0],
        seconds=time.perf_counter() - start,
    )


def _settings(options: StabilityOptions, datasets: Mapping[str, Dataset]) -> dict[str, Any]:
    return {
        "steps": options.steps,
        "last_steps": LAST_STEPS,
        "seed": options.seed,
        "gls": dict(sorted(options.gls.items())),
        "tasks": {
            task: {
                "data": dataset.name,
                "train_images": len(dataset.images),
                "batch_size": batch_size_of(options, task),
            }
            for task, dataset in datasets.items()
        },
    }


def _read(path: Path, results: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells of earlier results that this run goes on with; their tasks' settings join its own.

    Raises:
        InputError: there are none, they are damaged, or of other settings or another torch.
    """
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        cells: list[dict[str, Any]] = earlier["cells"]
        for cell in cells:
            Cell(**cell)
        before = _comparable(earlier)
    except OSError as error:
        raise InputError(f"--resume: {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"--resume: {path} is damaged") from error
    for name, value in _comparable(results).items():
        # A task that is new has no earlier setting to differ from.
        if before.get(name, value) != value:
            was, now = json.dumps(before[name]), json.dumps(value)
            raise InputError(f"--resume: {name} was {was} and is {now} now")
    results["settings"]["tasks"] = {**earlier["settings"]["tasks"], **results["settings"]["tasks"]}
    return cells


def _comparable(results: Mapping[str, Any]) -> dict[str, Any]:
    """What may not change between a run and the one that resumes it."""
    settings, environment = results["settings"], results["environment"]
    return {
        **{name: settings[name] for name in ("steps", "last_steps", "seed", "gls")},
        **{f"data of {task}": data for task, data in settings["tasks"].items()},
        **{name: environment[name] for name in ("torch", "gls_fused", "device")},
    }
