"""What is timed: an optimizer on a task, stepping through the batches of a data set."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.harness.heap import minor_faults
from benchmarks.workloads.data import Dataset
from benchmarks.workloads.optimizers import OPTIMIZERS, Together
from benchmarks.workloads.tasks import Task
from benchmarks.workloads.training import Steps, draw_batches, synchronise
from gls_fused import GLS

# So small that all keep the same weights, since seconds depend on them: max pooling of the CNN's
# activations takes 8 ms of a 30 ms step at the initial weights and 6 ms at those Adam soon finds,
# as its branches are predicted better. What a faster training loss is worth is time-to-loss's.
RATE = 1e-8
SEED = 0


@dataclass(frozen=True)
class Contender:
    """One optimizer of the comparison of seconds.

    Attributes:
        period: steps after which its work repeats; GLS gathers and refreshes every 10.
    """

    name: str
    title: str
    period: int
    build: Callable[[nn.Module], Steps]


class Trainer:
    """A model in training that can be asked for some steps at a time.

    The seed alone decides the initial weights and the batches, in a new order each time the data
    are through; they are those of `benchmarks.workloads.training.train`.

    Attributes:
        loss: the last batch's.
        faults: minor page faults per step, of each call of `run`.
    """

    def __init__(
        self,
        task: Task,
        dataset: Dataset,
        build: Callable[[nn.Module], Steps],
        batch_size: int,
        seed: int = SEED,
    ) -> None:
        self.task = task
        self.dataset = dataset
        torch.manual_seed(seed)
        self.model = task.build(dataset.shape).to(dataset.images.device, dataset.dtype)
        self.optimizer = build(self.model)
        self.loss = torch.zeros(())
        self.faults: list[float] = []
        self._batch_size = batch_size
        self._order = torch.Generator().manual_seed(seed)
        self._batches = draw_batches(dataset, batch_size, self._order)
        self._position = 0

    def run(self, steps: int) -> float:
        """Take so many steps, and return their seconds."""
        device = self.dataset.images.device
        synchronise(device)
        faults, start = minor_faults(), time.perf_counter()
        self.next_steps(steps)
        synchronise(device)
        seconds = time.perf_counter() - start
        self.faults.append((minor_faults() - faults) / steps)
        return seconds

    def step(self) -> None:
        """Forward, backward and step on the next batch."""
        if self._position == len(self._batches):
            self._batches = draw_batches(self.dataset, self._batch_size, self._order)
            self._position = 0
        batch = self._batches[self._position]
        self._position += 1
        images = self.dataset.images[batch]
        labels = None if self.dataset.labels is None else self.dataset.labels[batch]
        self.optimizer.zero_grad()
        loss = self.task.loss(self.model(images), images, labels)
        loss.backward()
        self.optimizer.step()
        self.loss = loss.detach()

    def next_steps(self, steps: int) -> None:
        """Go on without time being taken."""
        for _ in range(steps):
            self.step()


def state_bytes(optimizer: Steps) -> int:
    """Bytes of the memory that the tensors of the optimizer's state lie in, each counted once."""
    found = optimizer.optimizers if isinstance(optimizer, Together) else [optimizer]
    storages: dict[int, int] = {}
    for part in found:
        assert isinstance(part, torch.optim.Optimizer)
        for tensor in _tensors(part.state.values()):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(states: Iterable[dict[str, object]]) -> Iterable[Tensor]:
    for state in states:
        yield from (value for value in state.values() if isinstance(value, Tensor))


def _of_convergence(name: str) -> Callable[[nn.Module], Steps]:
    return lambda model: OPTIMIZERS[name].build(model, RATE, {})


def _gls_without_momentum(model: nn.Module) -> Steps:
    return GLS(model, lr=RATE, momentum=0.0)


def _adam_foreach(model: nn.Module) -> Steps:
    return torch.optim.Adam(model.parameters(), lr=RATE, foreach=True)


BASELINE = "adam"
CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("gls", "GLS", 10, _of_convergence("gls")),
        Contender("gls-momentum0", "GLS, momentum 0", 10, _gls_without_momentum),
        Contender("adam", "Adam, fused", 1, _of_convergence("adam")),
        Contender("adam-foreach", "Adam, foreach", 1, _adam_foreach),
        Contender("adamw", "AdamW, fused", 1, _of_convergence("adamw")),
        Contender("sgd", "SGD", 1, _of_convergence("sgd")),
        Contender("sgd-momentum", "SGD, momentum .9", 1, _of_convergence("sgd-momentum")),
        Contender("muon", "Muon", 1, _of_convergence("muon")),
    )
}
