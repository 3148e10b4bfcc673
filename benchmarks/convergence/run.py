"""The convergence experiment: tasks x optimizers x seeds, learning rates searched beforehand."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.convergence.options import Options
from benchmarks.convergence.plots import plot_convergence
from benchmarks.convergence.records import (
    EPOCHS_FILE,
    EVALUATIONS_FILE,
    PLOT_FILE,
    EpochRecord,
    EvaluationRecord,
    Run,
    RunKey,
    Store,
    read_epochs,
    read_evaluations,
)
from benchmarks.convergence.report import render_report
from benchmarks.convergence.summary import best_validation, last_loss
from benchmarks.harness.environment import command_line, describe_environment, git_commit
from benchmarks.harness.errors import InputError
from benchmarks.harness.files import REPORT_FILE, write_atomically
from benchmarks.harness.progress import Reporter, say
from benchmarks.harness.runs import now
from benchmarks.workloads.data import Dataset, load_dataset
from benchmarks.workloads.optimizers import OPTIMIZERS, check_gls_options
from benchmarks.workloads.search import search_rate, search_settings
from benchmarks.workloads.tasks import TASKS
from benchmarks.workloads.text import load_text
from benchmarks.workloads.training import (
    EpochResult,
    Evaluation,
    Evaluations,
    peak_memory_kind,
    train,
)

# A learning rate, and a weight decay or the optimizer's own.
Setting = tuple[float, float | None]


LONGEST_FAILURE = 200
# What an optimizer of another package may raise when its numbers run away.
FAILURES = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)


class Experiment:
    """One experiment on one output directory.

    Building it loads the data and checks every option; `run` trains, `report` writes the tables
    and the figure.

    Raises:
        InputError: a bad option, bad data, an output directory in use.
    """

    def __init__(self, options: Options) -> None:
        self.left_out = {
            name: why for name in options.optimizers if (why := OPTIMIZERS[name].missing())
        }
        for name, why in self.left_out.items():
            say(f"{OPTIMIZERS[name].title} is left out: {why}")
        names = tuple(name for name in options.optimizers if name not in self.left_out)
        if not names:
            raise InputError("no optimizer is left")
        options = replace(options, optimizers=names)
        self.options = options
        check_gls_options(options.gls, options.optimizers, options.tasks)
        self._check_same_step()
        self._check_search()
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
        searched = [self._tries(name) for name in options.optimizers]
        reporter.expect(
            len(options.tasks)
            * (
                len(options.seeds) * len(options.optimizers) * options.epochs
                + sum(searched) * options.grid_epochs
            )
        )
        for task in options.tasks:
            chosen: dict[str, Setting] = {}
            # The optimizer that takes over another's learning rate comes after it.
            for name in sorted(options.optimizers, key=lambda name: name == "gls-sgd"):
                chosen[name] = self._choose(task, name, chosen, reporter)
            # Seed by seed, so that the optimizers' seconds are compared within a short time.
            for seed in options.seeds:
                for name in options.optimizers:
                    rate, decay = chosen[name]
                    key = RunKey("final", task, name, rate, seed, options.epochs, decay)
                    self._train(key, reporter)

    def report(self) -> Path:
        """Write the tables and the figure from what is recorded; return the report's path."""
        records = self.records()
        plot_convergence(self.config, records, self.options.out / PLOT_FILE)
        path = self.options.out / REPORT_FILE
        report = render_report(self.config, records, self.evaluations())
        write_atomically(path, report.encode())
        return path

    def records(self) -> list[EpochRecord]:
        """Everything recorded so far."""
        return read_epochs(self.options.out / EPOCHS_FILE)

    def evaluations(self) -> list[EvaluationRecord]:
        """Every evaluation between epochs so far."""
        return read_evaluations(self.options.out / EVALUATIONS_FILE)

    def _grid(self, name: str) -> tuple[float, ...]:
        return () if name in self.options.rates else self.options.grids.get(name, ())

    def _tries(self, name: str) -> int:
        """Runs of an optimizer's search, without what its grid may be extended by."""
        options, grid = self.options, self._grid(name)
        if len(grid) == 1:
            # Its rate is fixed, and weight decays are what is left to search.
            return 0 if options.tries is None else min(options.tries, len(options.decays))
        return (options.tries or len(grid)) if grid else 0

    def _choose(
        self, task: str, name: str, chosen: Mapping[str, Setting], reporter: Reporter
    ) -> Setting:
        """What is fixed by hand, or what the search found to give the lowest loss."""
        options, grid = self.options, self._grid(name)
        if name in options.rates:
            return options.rates[name], None
        if len(grid) == 1 and not self._tries(name):
            return grid[0], None
        if not grid:
            rate = self._sgd_rate(chosen) if name == "gls-sgd" else OPTIMIZERS[name].rate
            return rate, None

        def evaluate(lr: float, decay: float | None = None) -> float:
            seed, epochs = options.search_seed, options.grid_epochs
            if options.tries is None and lr not in grid:
                reporter.expect(epochs)
            run = self._train(RunKey("search", task, name, lr, seed, epochs, decay), reporter)
            loss = last_loss(run) if options.select == "train" else best_validation(run)
            return math.inf if loss is None else loss

        if options.tries is None:
            return search_rate(grid, evaluate), None
        return search_settings(grid, options.decays, options.tries, evaluate)

    def _sgd_rate(self, chosen: Mapping[str, Setting]) -> float:
        return chosen["sgd"][0] if "sgd" in chosen else self.options.rates["sgd"]

    def _check_search(self) -> None:
        options = self.options
        searched = {name: self._grid(name) for name in options.optimizers if self._tries(name)}
        if searched and options.search_seed in options.seeds:
            raise InputError(
                f"--search-seed {options.search_seed} is among --seeds: a search must not see the "
                "seeds that are reported"
            )
        for name, grid in searched.items():
            if options.tries is not None and len(grid) > options.tries:
                raise InputError(
                    f"--tries {options.tries} is less than the {len(grid)} rates of {name}'s grid"
                )

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
        if key.weight_decay is not None:
            label += f" weight decay {key.weight_decay:g}"
        label = f"search {label}" if key.phase == "search" else label
        done = self._store.complete_run(key)
        if done is not None:
            reporter.skip_run(label, key.epochs)
            return done
        batches = len(self._datasets[key.task].images) // self._batch_size(key.task)
        reporter.start_run(label, key.epochs, batches)
        run: list[EpochRecord] = []
        try:
            for result in self._results(key, reporter):
                run.append(self._record(key, result))
                self._warm.add((key.task, key.optimizer))
                self._store.append(run[-1])
                reporter.epoch(run[-1])
        except FAILURES as error:
            # Ours fail loudly; another package's failure is a result.
            if OPTIMIZERS[key.optimizer].needs is None:
                raise
            why = " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_FAILURE]
            failed = EpochResult(len(run) + 1, None, None, None, 0.0, 0, diverged=True)
            run.append(replace(self._record(key, failed), failure=why))
            self._store.append(run[-1])
            reporter.epoch(run[-1])
        return tuple(run)

    def _results(self, key: RunKey, reporter: Reporter) -> Iterator[EpochResult]:
        options, spec = self.options, OPTIMIZERS[key.optimizer]

        def tell(found: Evaluation) -> None:
            self._store.append_evaluation(EvaluationRecord(**key._asdict(), **asdict(found)))

        return train(
            TASKS[key.task],
            self._datasets[key.task],
            lambda model: spec.build(model, key.lr, options.gls, key.weight_decay),
            seed=key.seed,
            epochs=key.epochs,
            batch_size=self._batch_size(key.task),
            schedule=options.schedule,
            warm_up=(key.task, key.optimizer) not in self._warm,
            on_batch=reporter.batch,
            evaluations=Evaluations(options.evaluate_every, tell) if key.phase == "final" else None,
        )

    def _record(self, key: RunKey, result: EpochResult) -> EpochRecord:
        return EpochRecord(
            **key._asdict(),
            **asdict(result),
            dataset=self._datasets[key.task].name,
            peak_memory_kind=peak_memory_kind(self.options.device),
        )

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
            datasets[task] = _with_validation(loaded[wanted], options.validation_images.get(task))
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
            "schedule": asdict(options.schedule),
            "evaluate_every": options.evaluate_every,
        }
        for name in options.optimizers:
            settings[f"lr of {name}"] = options.rates.get(name)
            settings[f"lr grid of {name}"] = list(self._grid(name))
        if any(map(self._tries, options.optimizers)):
            settings["search"] = {
                "seed": options.search_seed,
                "tries": options.tries,
                "weight_decays": None if options.tries is None else list(options.decays),
                "select": options.select,
            }
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
            "left_out": self.left_out,
            "settings": settings,
            "invocations": [invocation],
        }


def _with_validation(dataset: Dataset, count: int | None) -> Dataset:
    """The data set with at most so many validation images, the first."""
    labels = dataset.validation_labels
    return replace(
        dataset,
        validation_images=dataset.validation_images[:count],
        validation_labels=None if labels is None else labels[:count],
    )
