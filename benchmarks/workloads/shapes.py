"""Data to take time on: of a data set's shape, and the data set itself where it is on disk."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from benchmarks.harness.errors import InputError
from benchmarks.workloads.data import Dataset, load_dataset
from benchmarks.workloads.tasks import CLASSES, Shape, Task
from benchmarks.workloads.text import CONTEXT, load_text

# More than the caches hold, few enough that CIFAR-10's shape takes 100 MB.
IMAGES = 8192
SEED = 0
# Of the standard library's sources, as Python 3.11 has them.
VOCABULARY = 97


@dataclass(frozen=True)
class DataShape:
    """A data set's shape and the length of its epoch.

    Attributes:
        train_images: of the whole data set, to which epochs' seconds are scaled; a text's are
            sequences.
    """

    name: str
    title: str
    shape: Shape
    train_images: int

    @property
    def text(self) -> bool:
        """Whether it is of text."""
        return len(self.shape) == 2

    def fits(self, task: Task) -> bool:
        """Whether the task trains on such data."""
        return task.text == self.text


SHAPES = {
    shape.name: shape
    for shape in (
        DataShape("cifar10", "CIFAR-10", (3, 32, 32), 50_000),
        DataShape("fashion-mnist", "Fashion-MNIST", (1, 28, 28), 60_000),
        DataShape("text", "Text", (VOCABULARY, CONTEXT), 14_745),
    )
}


def images_of(shape: DataShape, images: int = IMAGES) -> Dataset:
    """The first images of the data set, or synthetic ones where it is not on disk; of text its
    first sequences.
    """
    if shape.text:
        return load_text(train_sequences=images)
    try:
        return load_dataset(shape.name, train_images=images)
    except InputError:
        return synthesise(shape.shape, images)


def synthesise(shape: Shape, images: int) -> Dataset:
    """Independent Gaussian pixels, mean 0 and variance 1, or characters; labels at random."""
    generator = torch.Generator().manual_seed(SEED)
    if len(shape) == 2:
        vocabulary, context = shape
        tokens = torch.randint(vocabulary, (images, context + 1), generator=generator)
        inputs, following = tokens[:, :-1], tokens[:, 1:]
        return Dataset(
            "synthetic", inputs, following, inputs[:1], following[:1], 0.0, 1.0, vocabulary
        )
    pixels = torch.randn(images, *shape, generator=generator)
    labels = torch.randint(CLASSES, (images,), generator=generator)
    return Dataset("synthetic", pixels, labels, pixels[:1], labels[:1], 0.0, 1.0)


def in_double(dataset: Dataset) -> Dataset:
    """The same data for weights in float64."""
    images = dataset.images if dataset.vocabulary else dataset.images.double()
    return replace(dataset, images=images, dtype=torch.float64)
