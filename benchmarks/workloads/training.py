"""One training run: a task, a data set, an optimizer, a seed; one result per epoch."""

from __future__ import annotations

import copy
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from benchmarks.workloads.data import Dataset
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


def train(
    task: Task,
    dataset: Dataset,
    make_optimizer: Callable[[nn.Module], Steps],
    *,
    seed: int,
    epochs: int,
    batch_size: int,
    warm_up: bool = False,
    on_batch: Callable[[], None] | None = None,
) -> Iterator[EpochResult]:
    """Train a fresh model and yield a result after every epoch, or up to the one that diverges.

    The seed alone decides the initial weights and the batches' order, so that they are the same
    for every optimizer. The last, incomplete batch of an epoch is dropped.

    Args:
        dataset: on the device to train on, with at least `batch_size` images.
        warm_up: first take a few steps on a copy, so that no epoch pays for one-time set-up.
        on_batch: called after every batch, without synchronising the device.
    """
    device = dataset.images.device
    torch.manual_seed(seed)
    model = task.build(dataset.shape).to(device)
    order = torch.Generator().manual_seed(seed)
    if warm_up:
        _warm_up(task, dataset, model, make_optimizer, batch_size)
    optimizer = make_optimizer(model)
    for epoch in range(1, epochs + 1):
        batches = draw_batches(dataset, batch_size, order)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        _synchronise(device)
        start = time.perf_counter()
        train_loss = _train_epoch(task, dataset, model, optimizer, batches, on_batch)
        _synchronise(device)
        seconds = time.perf_counter() - start
        memory = peak_memory_bytes(device)
        validation_loss, validation_error = validate(task, dataset, model)
        diverged = not (math.isfinite(train_loss) and math.isfinite(validation_loss))
        yield EpochResult(
            epoch=epoch,
            train_loss=train_loss if math.isfinite(train_loss) else None,
            validation_loss=validation_loss if math.isfinite(validation_loss) else None,
            validation_error=None if diverged else validation_error,
            seconds=seconds,
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


def _train_epoch(
    task: Task,
    dataset: Dataset,
    model: nn.Module,
    optimizer: Steps,
    batches: Tensor,
    on_batch: Callable[[], None] | None,
) -> float:
    total = torch.zeros((), device=batches.device, dtype=torch.float64)
    for batch in batches:
        images = dataset.images[batch]
        labels = None if dataset.labels is None else dataset.labels[batch]
        optimizer.zero_grad()
        loss = task.loss(model(images), images, labels)
        loss.backward()
        optimizer.step()
        # The sum stays on the device: reading it would wait for the device at every batch.
        total += loss.detach()
        if on_batch is not None:
            on_batch()
    return total.item() / len(batches)


def _warm_up(
    task: Task,
    dataset: Dataset,
    model: nn.Module,
    make_optimizer: Callable[[nn.Module], Steps],
    batch_size: int,
) -> None:
    replica = copy.deepcopy(model)
    optimizer = make_optimizer(replica)
    batches = torch.arange(batch_size, device=dataset.images.device).expand(WARM_UP_STEPS, -1)
    _train_epoch(task, dataset, replica, optimizer, batches, None)
    validate(task, dataset, replica)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
