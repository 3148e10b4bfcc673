"""The models whose steps are timed: the tasks, and language models up to GPT-2's smallest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.workloads.data import Dataset
from benchmarks.workloads.shapes import SHAPES, images_of, synthesise
from benchmarks.workloads.tasks import TASKS, Shape, Task
from benchmarks.workloads.transformer import Transformer

# Batches to go through, where the data are made.
BATCHES = 8
# "float32" with its own rounding throughout; TF32 wherever torch allows it; and float32 weights
# whose forward runs under autocast.
PRECISIONS = ("float32", "tf32", "bf16")


@dataclass(frozen=True)
class Workload:
    """A task at a batch size, on data of a shape.

    Attributes:
        shape: a name of SHAPES, or the shape of made data.
        gate: of the data on which GLS is checked, where those that are timed are too large.
    """

    task: Task
    shape: str | Shape
    batch: int
    gate: Shape | None = None

    def data(self, device: torch.device) -> Dataset:
        """What is timed on."""
        if isinstance(self.shape, str):
            return images_of(SHAPES[self.shape]).to(device)
        return synthesise(self.shape, BATCHES * self.batch).to(device)

    def gate_data(self, data: Dataset) -> tuple[Dataset, int]:
        """What is checked on, and its batch size."""
        if self.gate is None:
            return data, self.batch
        sequences = 2
        return synthesise(self.gate, 4 * sequences).to(data.images.device), sequences

    @property
    def epoch_steps(self) -> int | None:
        """Of the real data set's epoch; None where the data are made."""
        name = self.shape
        return SHAPES[name].train_images // self.batch if isinstance(name, str) else None


def _language_model(name: str, title: str, width: int, heads: int, blocks: int) -> Task:
    def build(shape: Shape) -> nn.Module:
        vocabulary, context = shape
        model = Transformer(vocabulary, context, width=width, heads=heads, blocks=blocks)
        model.head = nn.Linear(width, vocabulary, bias=False)
        model.head.weight = model.embedding.weight
        return model

    return Task(name, title, True, build, text=True)


_GPT2 = _language_model("gpt2", "Transformer, 124M parameters, tied head", 768, 12, 12)
_MEDIUM = _language_model("medium", "Transformer, 29M parameters, tied head", 512, 8, 8)
_SMALL = _language_model("small", "Transformer, 2 blocks of width 16, tied head", 16, 2, 2)

WORKLOADS = {
    workload.task.name: workload
    for workload in (
        *(
            Workload(TASKS[name], "cifar10", 128)
            for name in ("mlp", "cnn", "autoencoder", "resnet")
        ),
        Workload(TASKS["transformer"], "text", 32),
        Workload(_MEDIUM, (8192, 512), 16, gate=(8192, 64)),
        Workload(_GPT2, (50257, 1024), 8, gate=(50257, 64)),
    )
}
# Of a dry run.
TINY_WORKLOADS = {
    "mlp": Workload(TASKS["mlp"], (1, 4, 4), 16),
    "small": Workload(_SMALL, (40, 16), 4, gate=(40, 8)),
}


class Autocast(nn.Module):
    """A model whose forward runs in bfloat16 where autocast has it, and whose outputs are wide."""

    def __init__(self, inner: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.inner, self._device = inner, device

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast(self._device.type, torch.bfloat16):
            outputs: Tensor = self.inner(inputs)
        return outputs.float() if outputs.dtype is torch.bfloat16 else outputs


def in_precision(task: Task, precision: str, device: torch.device) -> Task:
    """The task whose model computes in it; `allow_precision` has to be in force."""
    if precision != "bf16":
        return task
    return replace(task, build=lambda shape: Autocast(task.build(shape), device))


@contextlib.contextmanager
def allow_precision(precision: str) -> Iterator[None]:
    """TF32 where it is asked for, and nowhere else."""
    matmul, conv = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = conv
