"""The convergence experiment: tasks x optimizers x seeds, learning rates searched beforehand."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.convergence.plots import plot_convergence
from benchmarks.convergence.records import (
    EPOCHS_FILE,
    PLOT_FILE,
    EpochRecord,
    Run,
    RunKey,
    Store,
    read_epochs,
)
from benchmarks.convergence.report import render_report
from benchmarks.convergence.summary import last_loss
from benchmarks.harness.environment import command_line, describe_environment, git_commit
from benchmarks.harness.errors import InputError
from benchmarks.harness.files import REPORT_FILE, write_atomically
from benchmarks.harness.progress import Reporter
from benchmarks.harness.runs import now
from benchmarks.workloads.data import Dataset, load_dataset
from benchmarks.workloads.optimizers import OPTIMIZERS, check_gls_options
from benchmarks.workloads.search import search_rate
from benchmarks.workloads.tasks import TASKS
from benchmarks.workloads.text import load_text
from benchmarks.workloads.training import peak_memory_kind, train


@dataclass(frozen=True)
class Options:
    """What the experiment is.

    Attributes:
        grids: learning rates to search, ascending, by optimizer; without one there is no search.
        grid_epochs: the length of a search run.
        rates: learning rates fixed by hand, by optimizer; they win over grids.
        batch_sizes: by task; `batch_size` where nothing is said.
        text: where the transformer's text is.
        train_images: how many training images or sequences to keep, by task; all where nothing is
            said.
        gls: options for GLS.
    """

    tasks: tuple[str, ...]
    optimizers: tuple[str, ...]
    seeds: tuple[int, ...]
    epochs: int
    batch_size: int
    batch_sizes: Mapping[str, int]
    grids: Mapping[str, tuple[float, ...]]
    grid_epochs: int
    rates: Mapping[str, float]
    device: torch.device
    dataset: str
    data: Path | None
    text: Path | None
    train_images: Mapping[str, int]
    gls: Mapping[str, Any]
    out: Path
    resume: bool
    overwrite: bool


class Experiment:
    """One experiment on one output directory.

    Building it loads the data and checks every option; `run` trains, `report` writes the tables
    and the figure.

    Raises:
        InputError: a bad option, bad data, an output directory in use.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        check_gls_options(options.gls, options.optimizers)
        self._check_same_step()
        self._datasets = self._load()
        self._warm: set[tuple[str, str]] = set()
        self.config = self._configure()
        self._store = Store(options.out)
        if options.resume:
            self._store.reopen(self.config)
        else:
            self._store.create(self.config, overwrite=options.overwrite)

    def run(self, reporter: Reporter) -> None:
        """Search the learning rates of each task, then train every optimizer on every seed."""
        options = self.options
        searched = [name for name in options.optimizers if len(self._grid(name)) > 1]
        reporter.expect(
            len(options.tasks)
            * (
                len(options.seeds) * len(options.optimizers) * options.epochs
                + sum(len(self._grid(name)) for name in searched) * options.grid_epochs
            )
        )
        for task in options.tasks:
            rates: dict[str, float] = {}
            # The optimizer that takes over another's learning rate comes after it.
            for name in sorted(options.optimizers, key=lambda name: name == "gls-sgd"):
                rates[name] = self._choose_rate(task, name, rates, reporter)
            # Seed by seed, so that the optimizers' seconds are compared within a short time.
            for seed in options.seeds:
                for name in options.optimizers:
                    key = RunKey("final", task, name, rates[name], seed, options.epochs)
                    self._train(key, reporter)

    def report(self) -> Path:
        """Write the tables and the figure from what is recorded; return the report's path."""
        records = self.records()
        plot_convergence(self.config, records, self.options.out / PLOT_FILE)
        path = self.options.out / REPORT_FILE
        write_atomically(path, render_report(self.config, records).encode())
        return path

    def records(self) -> list[EpochRecord]:
        """Everything recorded so far."""
        return read_epochs(self.options.out / EPOCHS_FILE)

    def _grid(self, name: str) -> tuple[float, ...]:
        return () if name in self.options.rates else self.options.grids.get(name, ())

    def _choose_rate(
        self, task: str, name: str, rates: Mapping[str, float], reporter: Reporter
    ) -> float:
        """The rate fixed by hand, or the searched one of the lowest last training loss."""
        grid = self._grid(name)
        if name in self.options.rates:
            return self.options.rates[name]
        if len(grid) == 1:
            return grid[0]
        if not grid:
            return self._sgd_rate(rates) if name == "gls-sgd" else OPTIMIZERS[name].rate

        def evaluate(lr: float) -> float:
            seed, epochs = self.options.seeds[0], self.options.grid_epochs
            if lr not in grid:
                reporter.expect(epochs)
            loss = last_loss(self._train(RunKey("search", task, name, lr, seed, epochs), reporter))
            return math.inf if loss is None else loss

        return search_rate(grid, evaluate)

    def _sgd_rate(self, rates: Mapping[str, float]) -> float:
        return rates["sgd"] if "sgd" in rates else self.options.rates["sgd"]

    def _check_same_step(self) -> None:
        options = self.options
        has_rate = "sgd" in (*options.optimizers, *options.rates)
        has_rate |= "gls-sgd" in options.rates or bool(options.grids.get("gls-sgd"))
        if "gls-sgd" in options.optimizers and not has_rate:
            raise InputError(
                "gls-sgd runs at SGD's learning rate: add sgd to --optimizers, "
                "or give --lr gls-sgd=VALUE"
            )

    def _train(self, key: RunKey, reporter: Reporter) -> Run:
        label = f"{key.task} {OPTIMIZERS[key.optimizer].title} lr {key.lr:g} seed {key.seed}"
        label = f"search {label}" if key.phase == "search" else label
        done = self._store.complete_run(key)
        if done is not None:
            reporter.skip_run(label, key.epochs)
            return done
        options, dataset = self.options, self._datasets[key.task]
        spec = OPTIMIZERS[key.optimizer]
        batch_size = self._batch_size(key.task)
        reporter.start_run(label, key.epochs, len(dataset.images) // batch_size)
        run: list[EpochRecord] = []
        for result in train(
            TASKS[key.task],
            dataset,
            lambda model: spec.build(model, key.lr, options.gls),
            seed=key.seed,
            epochs=key.epochs,
            batch_size=batch_size,
            warm_up=(key.task, key.optimizer) not in self._warm,
            on_batch=reporter.batch,
        ):
            record = EpochRecord(
                phase=key.phase,
                task=key.task,
                dataset=dataset.name,
                optimizer=key.optimizer,
                lr=key.lr,
                seed=key.seed,
                epoch=result.epoch,
                epochs=key.epochs,
                train_loss=result.train_loss,
                validation_loss=result.validation_loss,
                validation_error=result.validation_error,
                seconds=result.seconds,
                peak_memory_bytes=result.peak_memory_bytes,
                peak_memory_kind=peak_memory_kind(options.device),
                diverged=result.diverged,
            )
            self._warm.add((key.task, key.optimizer))
            self._store.append(record)
            run.append(record)
            reporter.epoch(record)
        return tuple(run)

    def _load(self) -> dict[str, Dataset]:
        """Each task's data set on the device; the tasks that use the same images share them."""
        options = self.options
        loaded: dict[tuple[bool, bool, int | None], Dataset] = {}
        datasets: dict[str, Dataset] = {}
        for task in options.tasks:
            # Only what "auto" falls back to depends on whether labels are needed.
            wanted = TASKS[task].text, TASKS[task].supervised, options.train_images.get(task)
            if wanted not in loaded:
                loaded[wanted] = self._load_one(*wanted).to(options.device)
            datasets[task] = loaded[wanted]
            count, batch_size = len(datasets[task].images), self._batch_size(task)
            if count < batch_size:
                raise InputError(
                    f"--batch-size {batch_size} is more than the {count} training "
                    f"{'sequences' if TASKS[task].text else 'images'} of {task}"
                )
        return datasets

    def _load_one(self, text: bool, supervised: bool, count: int | None) -> Dataset:
        options = self.options
        if text:
            return load_text(options.text, train_sequences=count)
        return load_dataset(
            options.dataset, directory=options.data, supervised=supervised, train_images=count
        )

    def _batch_size(self, task: str) -> int:
        return self.options.batch_sizes.get(task, self.options.batch_size)

    def _configure(self) -> dict[str, Any]:
        """config.json: under "settings" what a resumed experiment may not change."""
        options = self.options
        environment = describe_environment(options.device)
        settings: dict[str, Any] = {
            "epochs": options.epochs,
            "batch_size": options.batch_size,
            "grid_epochs": options.grid_epochs,
            "gls": dict(sorted(options.gls.items())),
            "environment": environment,
        }
        for name in options.optimizers:
            settings[f"lr of {name}"] = options.rates.get(name)
            settings[f"lr grid of {name}"] = list(self._grid(name))
        for task, dataset in self._datasets.items():
            if self._batch_size(task) != options.batch_size:
                settings[f"batch size of {task}"] = self._batch_size(task)
            model = TASKS[task].build(dataset.shape)
            settings[f"data of {task}"] = {
                "name": dataset.name,
                "train_images": len(dataset.images),
                "validation_images": len(dataset.validation_images),
                "shape": list(dataset.shape),
                "mean": round(dataset.mean, 6),
                "std": round(dataset.std, 6),
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
            }
        invocation = {
            "command": command_line(),
            "started": now(),
            "git_commit": git_commit(),
            "platform": platform.platform(terse=True),
        }
        return {
            "tasks": list(options.tasks),
            "optimizers": list(options.optimizers),
            "seeds": list(options.seeds),
            "settings": settings,
            "invocations": [invocation],
        }
