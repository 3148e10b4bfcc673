"""What a long experiment shows meanwhile: live bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Drawing takes the interpreter's time from the training it measures.
REFRESHES_PER_SECOND = 2
SECONDS_BETWEEN_UPDATES = 0.25


class Epoch(Protocol):
    """What is shown of an epoch: its number, of how many, and what it gave."""

    @property
    def epoch(self) -> int: ...

    @property
    def epochs(self) -> int: ...

    @property
    def train_loss(self) -> float | None: ...

    @property
    def seconds(self) -> float: ...

    @property
    def diverged(self) -> bool: ...


class Reporter(Protocol):
    """Told of every run, batch and epoch."""

    def __enter__(self) -> Reporter: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def expect(self, epochs: int) -> None:
        """So many more epochs will come."""

    def start_run(self, label: str, epochs: int, batches: int) -> None:
        """A run begins, of `epochs` epochs of `batches` batches."""

    def batch(self) -> None:
        """A batch is done."""

    def epoch(self, record: Epoch) -> None:
        """An epoch is done."""

    def skip_run(self, label: str, epochs: int) -> None:
        """A run was found complete."""


class LiveReporter:
    """Two bars: the whole experiment, and the run in progress."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=REFRESHES_PER_SECOND,
        )
        self._all = self._progress.add_task("all runs", total=0, unit="epochs")
        self._run = self._progress.add_task("", total=None, unit="batches", visible=False)
        self._label = ""
        self._epochs_left = 0
        self._batches = 0
        self._shown = 0.0

    def __enter__(self) -> LiveReporter:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.update(self._run, visible=False)
        self._progress.stop()

    def expect(self, epochs: int) -> None:
        total = self._progress.tasks[self._all].total or 0
        self._progress.update(self._all, total=total + epochs)

    def start_run(self, label: str, epochs: int, batches: int) -> None:
        self._label = label
        self._batches = 0
        self._epochs_left = epochs
        self._progress.reset(
            self._run, total=epochs * batches, description=label, visible=True, unit="batches"
        )

    def batch(self) -> None:
        self._batches += 1
        now = time.monotonic()
        if now - self._shown >= SECONDS_BETWEEN_UPDATES:
            self._shown = now
            self._progress.update(self._run, completed=self._batches)

    def epoch(self, record: Epoch) -> None:
        self._epochs_left -= 1
        # The epochs that a diverged run does not take are done with, too.
        done = 1 + (self._epochs_left if record.diverged else 0)
        self._progress.update(self._all, advance=done)
        text = f"{self._label}  {describe_epoch(record)}"
        self._progress.update(self._run, completed=self._batches, description=text)

    def skip_run(self, label: str, epochs: int) -> None:
        self._progress.update(self._all, advance=epochs)


class PlainReporter:
    """One line per epoch."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._expected = 0
        self._done = 0
        self._label = ""
        self._epochs_left = 0

    def __enter__(self) -> PlainReporter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    def expect(self, epochs: int) -> None:
        self._expected += epochs

    def start_run(self, label: str, epochs: int, batches: int) -> None:
        self._label = label
        self._epochs_left = epochs

    def batch(self) -> None:
        pass

    def epoch(self, record: Epoch) -> None:
        self._epochs_left -= 1
        self._done += 1 + (self._epochs_left if record.diverged else 0)
        self._print(f"{self._label}  {describe_epoch(record)}")

    def skip_run(self, label: str, epochs: int) -> None:
        self._done += epochs
        self._print(f"{label}  already complete")

    def _print(self, text: str) -> None:
        line = f"[{self._done}/{self._expected}] {text}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def describe_epoch(record: Epoch) -> str:
    """One epoch in a few words."""
    epoch = f"epoch {record.epoch}/{record.epochs}"
    if record.train_loss is None or record.diverged:
        return f"{epoch}  diverged"
    return f"{epoch}  train loss {record.train_loss:.4f}  {record.seconds:.1f} s"


def make_reporter() -> Reporter:
    """Bars if standard error is a terminal that can redraw, else lines."""
    console = Console(stderr=True)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveReporter(console)
    return PlainReporter(console)


def say(text: str) -> None:
    """Show progress."""
    print(text, file=sys.stderr, flush=True)
