"""One training run: a task, a data set, an optimizer, a seed; a result per epoch, and between."""

from __future__ import annotations

import copy
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.workloads.data import Dataset
from benchmarks.workloads.schedule import CONSTANT, Schedule, follow
from benchmarks.workloads.tasks import Task

VALIDATION_BATCH = 1000
# Long enough for the optimizer's statistics to start and be committed to once.
WARM_UP_STEPS = 12


class Steps(Protocol):
    """What a run needs of an optimizer."""

    def zero_grad(self) -> None: ...

    def step(self) -> object: ...


@dataclass(frozen=True)
class EpochResult:
    """What one epoch gave.

    Attributes:
        epoch: from 1.
        train_loss: mean of the minibatch losses met during the epoch; None when not finite.
        validation_loss: mean over the validation images after the epoch; None when not finite.
        validation_error: share of wrong classes, 0..1; None without labels or when diverged.
        seconds: of training, validation excluded.
        diverged: a loss was not finite; the run ends here.
    """

    epoch: int
    train_loss: float | None
    validation_loss: float | None
    validation_error: float | None
    seconds: float
    peak_memory_bytes: int
    diverged: bool


@dataclass(frozen=True)
class Evaluation:
    """What was found after some steps, where it is asked for every so many.

    Attributes:
        step: taken so far.
        train_loss: mean of the minibatch losses since the evaluation before; None when not finite.
        validation_loss, validation_error: as in EpochResult.
        seconds: of training so far, evaluations excluded.
        diverged: a loss was not finite.
    """

    step: int
    train_loss: float | None
    validation_loss: float | None
    validation_error: float | None
    seconds: float
    diverged: bool


@dataclass(frozen=True)
class Evaluations:
    """Evaluate after every `every` steps, and tell `tell`."""

    every: int
    tell: Callable[[Evaluation], None]


def train(
    task: Task,
    dataset: Dataset,
    make_optimizer: Callable[[nn.Module], Steps],
    *,
    seed: int,
    epochs: int,
    batch_size: int,
    schedule: Schedule = CONSTANT,
    warm_up: bool = False,
    on_batch: Callable[[], None] | None = None,
    evaluations: Evaluations | None = None,
) -> Iterator[EpochResult]:
    """Train a fresh model and yield a result after every epoch, or up to the one that diverges.

    The seed alone decides the initial weights and the batches' order, so that they are the same
    for every optimizer. The last, incomplete batch of an epoch is dropped.

    Args:
        dataset: on the device to train on, with at least `batch_size` images.
        schedule: of the learning rate, over all steps of the run.
        warm_up: first take a few steps on a copy, so that no epoch pays for one-time set-up.
        on_batch: called after every batch, without synchronising the device.
    """
    device = dataset.images.device
    torch.manual_seed(seed)
    model = task.build(dataset.shape).to(device)
    order = torch.Generator().manual_seed(seed)
    if warm_up:
        _warm_up(task, dataset, model, make_optimizer, batch_size)
    # An optimizer that draws numbers draws the same ones, whether steps came before or not.
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (it is numpy's global generator that they draw from)
    optimizer = make_optimizer(model)
    set_rates = follow(schedule, optimizer, epochs * (len(dataset.images) // batch_size))
    clock, window = _Clock(device), _Window()
    step = 0
    for epoch in range(1, epochs + 1):
        batches = draw_batches(dataset, batch_size, order)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        before = clock.seconds
        total = torch.zeros((), device=device, dtype=torch.float64)
        clock.start()
        for batch in batches:
            set_rates(step)
            loss = _train_step(task, dataset, model, optimizer, batch)
            step += 1
            # The sums stay on the device: reading one would wait for the device at every batch.
            total += loss
            if on_batch is not None:
                on_batch()
            if evaluations is not None:
                window.add(loss)
                if step % evaluations.every == 0:
                    clock.stop()
                    evaluations.tell(_evaluate(task, dataset, model, step, window, clock))
                    clock.start()
        clock.stop()
        train_loss = total.item() / len(batches)
        memory = peak_memory_bytes(device)
        validation_loss, validation_error = validate(task, dataset, model)
        diverged = not (math.isfinite(train_loss) and math.isfinite(validation_loss))
        yield EpochResult(
            epoch=epoch,
            train_loss=_finite(train_loss),
            validation_loss=_finite(validation_loss),
            validation_error=None if diverged else validation_error,
            seconds=clock.seconds - before,
            peak_memory_bytes=memory,
            diverged=diverged,
        )
        if diverged:
            return


@torch.no_grad()
def validate(task: Task, dataset: Dataset, model: nn.Module) -> tuple[float, float | None]:
    """Mean loss over the validation data, and the share of wrong labels if there are any."""
    model.eval()
    images, labels = dataset.validation_images, dataset.validation_labels
    loss = torch.zeros((), device=images.device, dtype=torch.float64)
    wrong = torch.zeros((), device=images.device, dtype=torch.int64)
    for start in range(0, len(images), VALIDATION_BATCH):
        part = images[start : start + VALIDATION_BATCH]
        target = None if labels is None else labels[start : start + VALIDATION_BATCH]
        outputs = model(part)
        loss += task.loss(outputs, part, target) * len(part)
        if task.supervised and target is not None:
            wrong += (outputs.argmax(-1) != target).sum()
    model.train()
    error = wrong.item() / labels.numel() if task.supervised and labels is not None else None
    return loss.item() / len(images), error


def peak_memory_bytes(device: torch.device) -> int:
    """The epoch's peak allocation on CUDA; on the CPU the process's, which never falls."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024


def peak_memory_kind(device: torch.device) -> str:
    """Which of the two `peak_memory_bytes` gives."""
    return "max_memory_allocated" if device.type == "cuda" else "ru_maxrss"


def draw_batches(dataset: Dataset, batch_size: int, order: torch.Generator) -> Tensor:
    """[batches, batch_size] int64 indices of a fresh permutation, on the data's device."""
    count = len(dataset.images)
    permutation = torch.randperm(count, generator=order)[: count - count % batch_size]
    return permutation.view(-1, batch_size).to(dataset.images.device)


class _Clock:
    """Seconds of training, in which evaluations do not count."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._device = device
        self._started = 0.0

    def start(self) -> None:
        synchronise(self._device)
        self._started = time.perf_counter()

    def stop(self) -> None:
        synchronise(self._device)
        self.seconds += time.perf_counter() - self._started


class _Window:
    """The losses since the last evaluation."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        self._losses.append(loss)

    def take_mean(self) -> float:
        mean = torch.stack(self._losses).double().mean().item()
        self._losses.clear()
        return mean


def _evaluate(
    task: Task, dataset: Dataset, model: nn.Module, step: int, window: _Window, clock: _Clock
) -> Evaluation:
    train_loss = window.take_mean()
    validation_loss, validation_error = validate(task, dataset, model)
    diverged = not (math.isfinite(train_loss) and math.isfinite(validation_loss))
    return Evaluation(
        step=step,
        train_loss=_finite(train_loss),
        validation_loss=_finite(validation_loss),
        validation_error=None if diverged else validation_error,
        seconds=clock.seconds,
        diverged=diverged,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _train_step(
    task: Task, dataset: Dataset, model: nn.Module, optimizer: Steps, batch: Tensor
) -> Tensor:
    """One step, and the loss before it."""
    images = dataset.images[batch]
    labels = None if dataset.labels is None else dataset.labels[batch]
    optimizer.zero_grad()
    loss = task.loss(model(images), images, labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _warm_up(
    task: Task,
    dataset: Dataset,
    model: nn.Module,
    make_optimizer: Callable[[nn.Module], Steps],
    batch_size: int,
) -> None:
    replica = copy.deepcopy(model)
    optimizer = make_optimizer(replica)
    batch = torch.arange(batch_size, device=dataset.images.device)
    for _ in range(WARM_UP_STEPS):
        _train_step(task, dataset, replica, optimizer, batch)
    validate(task, dataset, replica)


def synchronise(device: torch.device) -> None:
    """Wait for what the device still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
