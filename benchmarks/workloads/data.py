"""Data sets: found on disk or in scikit-learn, held whole in memory, standardised.

The sources, in the order that "auto" tries them: CIFAR-10, Fashion-MNIST, and what scikit-learn
ships: its digits for classification, patches of its two photographs for the autoencoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.errors import InputError
from benchmarks.workloads.formats import (
    Images,
    Labels,
    read_cifar_binary,
    read_cifar_pickle,
    read_idx,
)

DATASETS = ("cifar10", "fashion-mnist", "digits", "patches")
LOCAL_DATA = Path("data")
# Where Debian's package dataset-fashion-mnist installs it.
SYSTEM_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

_CIFAR_FILES = (*(f"data_batch_{index}" for index in range(1, 6)), "test_batch")
_IDX_FILES = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)
_DIGITS_TRAIN = 1437
_PATCH_SIZE = 32
_PATCHES_TRAIN, _PATCHES_VALIDATION = 8000, 1000


@dataclass(frozen=True)
class Dataset:
    """Standardised images of one data set, or the sequences of a text.

    Attributes:
        images: [n, c, h, w] float32; mean 0 and variance 1 over the whole training set. Of a text
            [n, t] int64, the characters' numbers.
        labels: [n] int64, or None for a data set that has none. Of a text [n, t], the characters
            that follow.
        validation_images, validation_labels: the same, standardised by the training set's figures.
        mean, std: what the pixels, in 0..1, were standardised by.
        vocabulary: how many different characters a text has; 0: these are images.
        dtype: of the weights that are trained on it.
    """

    name: str
    images: Tensor
    labels: Tensor | None
    validation_images: Tensor
    validation_labels: Tensor | None
    mean: float
    std: float
    vocabulary: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width of one image; a text's vocabulary and a sequence's length."""
        sizes = tuple(self.images.shape[1:])
        return (self.vocabulary, *sizes) if self.vocabulary else sizes

    def to(self, device: torch.device) -> Dataset:
        """The same data set with its tensors on `device`."""
        return replace(
            self,
            images=self.images.to(device),
            labels=None if self.labels is None else self.labels.to(device),
            validation_images=self.validation_images.to(device),
            validation_labels=(
                None if self.validation_labels is None else self.validation_labels.to(device)
            ),
        )


def load_dataset(
    name: str = "auto",
    *,
    directory: Path | None = None,
    supervised: bool = True,
    train_images: int | None = None,
) -> Dataset:
    """Load the data set called `name`, or the first one found.

    Args:
        name: "auto" or one of DATASETS.
        directory: where the files are; by default ./data, then the system's Fashion-MNIST.
        supervised: whether labels are needed; decides what "auto" falls back to.
        train_images: keep at most so many training images, the first, >= 1; None keeps all.
    Raises:
        InputError: a missing directory or file, a damaged file, a data set without labels where
            they are needed.
    """
    if name != "auto" and name not in DATASETS:
        raise InputError(f"unknown data set {name!r}, choose from auto, {', '.join(DATASETS)}")
    if directory is not None and not directory.is_dir():
        raise InputError(f"--data {directory}: no such directory")
    if directory is not None and name in ("digits", "patches"):
        raise InputError(f"--data does not go with --dataset {name}, which needs no files")
    if name == "patches" and supervised:
        raise InputError("the data set patches has no labels: use it with --tasks autoencoder")

    found: tuple[str, Path | None] | None = None
    if name in ("auto", "cifar10"):
        found = _find_cifar(directory)
    if found is None and name in ("auto", "fashion-mnist"):
        found = _find_fashion_mnist(directory)
    if found is None and name == "auto" and directory is None:
        found = ("digits" if supervised else "patches"), None
    if found is None and name in ("digits", "patches"):
        found = name, None
    if found is None:
        wanted = "CIFAR-10 or Fashion-MNIST" if name == "auto" else name
        hint = "; --download-cifar10 fetches it" if name == "cifar10" else ""
        raise InputError(f"no {wanted} files in {directory or LOCAL_DATA}{hint}")

    kind, folder = found
    images, labels, validation_images, validation_labels = _read(kind, folder)
    return _standardise(kind, images, labels, validation_images, validation_labels, train_images)


_Arrays = tuple[Images, Labels | None, Images, Labels | None]


def _read(kind: str, folder: Path | None) -> _Arrays:
    if folder is None:
        return _read_digits() if kind == "digits" else _read_patches()
    return _read_cifar(folder) if kind == "cifar10" else _read_fashion_mnist(folder)


def _find_cifar(directory: Path | None) -> tuple[str, Path] | None:
    root = directory or LOCAL_DATA
    for folder in (root, root / "cifar-10-batches-bin", root / "cifar-10-batches-py"):
        if any((folder / (name + end)).is_file() for name in _CIFAR_FILES for end in ("", ".bin")):
            return "cifar10", folder
    return None


def _find_fashion_mnist(directory: Path | None) -> tuple[str, Path] | None:
    roots: Sequence[Path] = (
        (LOCAL_DATA, SYSTEM_FASHION_MNIST) if directory is None else (directory,)
    )
    names = [name for pair in _IDX_FILES for name in pair]
    for root in roots:
        for folder in (root, root / "fashion-mnist", root / "FashionMNIST" / "raw"):
            if any((folder / (name + end)).is_file() for name in names for end in ("", ".gz")):
                return "fashion-mnist", folder
    return None


def _read_cifar(folder: Path) -> _Arrays:
    binary = any((folder / f"{name}.bin").is_file() for name in _CIFAR_FILES)
    end, read = (".bin", read_cifar_binary) if binary else ("", read_cifar_pickle)
    *train, (validation_images, validation_labels) = [
        read(folder / (name + end)) for name in _CIFAR_FILES
    ]
    images = np.concatenate([part[0] for part in train])
    labels = np.concatenate([part[1] for part in train])
    return images, labels, validation_images, validation_labels


def _read_fashion_mnist(folder: Path) -> _Arrays:
    def path(name: str) -> Path:
        return folder / name if (folder / name).is_file() else folder / f"{name}.gz"

    train, validation = [read_idx(path(images), path(labels)) for images, labels in _IDX_FILES]
    if train[0].shape[1:] != validation[0].shape[1:]:
        raise InputError(f"{folder}: training and test images differ in size")
    return *train, *validation


def _read_digits() -> _Arrays:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Pixels are 0..16; the last fifth is the validation set.
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = digits.target.astype(np.int64)
    split = _DIGITS_TRAIN
    return images[:split], labels[:split], images[split:], labels[split:]


def _read_patches() -> _Arrays:
    from sklearn.datasets import load_sample_images

    random = np.random.default_rng(0)
    photographs = load_sample_images().images
    train, validation = [], []
    for photograph in photographs:
        # Validation patches come from the right quarter, which no training patch touches.
        border = photograph.shape[1] * 3 // 4
        train += _crop(photograph[:, :border], _PATCHES_TRAIN // len(photographs), random)
        validation += _crop(photograph[:, border:], _PATCHES_VALIDATION // len(photographs), random)
    shuffled = random.permutation(len(train))
    return np.stack(train)[shuffled], None, np.stack(validation), None


def _crop(photograph: Images, count: int, random: np.random.Generator) -> list[Images]:
    height, width, _ = photograph.shape
    tops = random.integers(0, height - _PATCH_SIZE + 1, count)
    lefts = random.integers(0, width - _PATCH_SIZE + 1, count)
    return [
        photograph[top : top + _PATCH_SIZE, left : left + _PATCH_SIZE].transpose(2, 0, 1)
        for top, left in zip(tops, lefts, strict=True)
    ]


def _standardise(
    name: str,
    images: Images,
    labels: Labels | None,
    validation_images: Images,
    validation_labels: Labels | None,
    train_images: int | None,
) -> Dataset:
    if train_images is not None:
        images = images[:train_images]
        labels = None if labels is None else labels[:train_images]
    pixels = torch.from_numpy(np.array(images)).float().div_(255)
    validation_pixels = torch.from_numpy(np.array(validation_images)).float().div_(255)
    mean, std = pixels.double().mean().item(), pixels.double().std().item()
    if not std > 0:
        raise InputError(f"{name}: all training pixels are equal")
    return Dataset(
        name=name,
        images=pixels.sub_(mean).div_(std),
        labels=None if labels is None else torch.from_numpy(np.array(labels)),
        validation_images=validation_pixels.sub_(mean).div_(std),
        validation_labels=(
            None if validation_labels is None else torch.from_numpy(np.array(validation_labels))
        ),
        mean=mean,
        std=std,
    )
