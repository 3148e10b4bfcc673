"""The five tasks: what is trained, on which loss. Layer sizes follow the image's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from benchmarks.workloads.resnet import build_resnet
from benchmarks.workloads.transformer import build_transformer

# Channels, height and width of an image; or a text's vocabulary and the characters of a sequence.
Shape = tuple[int, ...]

CLASSES = 10


@dataclass(frozen=True)
class Task:
    """One model and its loss.

    Attributes:
        supervised: whether labels are the target; if not, the image is.
        build: the shape of the data -> the model, with freshly drawn weights.
        text: whether it is trained on text: sequences of characters, and at each the next one.
        batch_size: of its own; None: as large as the other tasks'.
    """

    name: str
    title: str
    supervised: bool
    build: Callable[[Shape], nn.Module]
    text: bool = False
    batch_size: int | None = None

    def loss(self, outputs: Tensor, images: Tensor, labels: Tensor | None) -> Tensor:
        """Mean over the batch: cross entropy, or the mean squared error per standardised pixel."""
        if self.supervised:
            assert labels is not None
            # A text has a label per character.
            return functional.cross_entropy(outputs.flatten(0, -2), labels.flatten())
        return functional.mse_loss(outputs, images.flatten(1))


def _widths(inputs: int) -> tuple[int, int, int]:
    """First and second hidden width, and the autoencoder's bottleneck."""
    if inputs >= 2048:
        return 1024, 512, 128
    if inputs >= 256:
        return 512, 256, 64
    return 128, 64, 16


def build_mlp(shape: Shape) -> nn.Module:
    """Three linear layers with ReLU; 784-512-256-10 for 28x28 images."""
    channels, height, width = shape
    inputs = channels * height * width
    first, second, _ = _widths(inputs)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, first),
        nn.ReLU(),
        nn.Linear(first, second),
        nn.ReLU(),
        nn.Linear(second, CLASSES),
    )


def build_cnn(shape: Shape) -> nn.Module:
    """Two convolutions 5x5 (16 and 32 channels), each with ReLU and pooling, two linear layers."""
    channels, height, width = shape
    pooled = (height // 2 // 2) * (width // 2 // 2)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * pooled, 128),
        nn.ReLU(),
        nn.Linear(128, CLASSES),
    )


def build_autoencoder(shape: Shape) -> nn.Module:
    """Four linear layers with ReLU between; 784-512-64-512-784 for 28x28 images."""
    channels, height, width = shape
    inputs = channels * height * width
    first, _, bottleneck = _widths(inputs)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, first),
        nn.ReLU(),
        nn.Linear(first, bottleneck),
        nn.ReLU(),
        nn.Linear(bottleneck, first),
        nn.ReLU(),
        nn.Linear(first, inputs),
    )


TASKS = {
    task.name: task
    for task in (
        Task("mlp", "MLP, 3 linear layers", True, build_mlp),
        Task("cnn", "CNN, 2 convolutions and 2 linear layers", True, build_cnn),
        Task("autoencoder", "Autoencoder, 4 linear layers", False, build_autoencoder),
        Task("resnet", "Residual network, 15 convolutions", True, build_resnet),
        Task(
            "transformer",
            "Character transformer, 4 blocks",
            True,
            build_transformer,
            text=True,
            batch_size=32,
        ),
    )
}
