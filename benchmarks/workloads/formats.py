"""Readers of the two file formats: idx (Fashion-MNIST) and CIFAR-10's, binary or pickled.

Every reader returns (images [n, c, h, w] uint8, labels [n] int64) and raises InputError, with the
file's name, for anything but a complete and well-formed file.
"""

from __future__ import annotations

import gzip
import pickle
import struct
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness.errors import InputError

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]

CLASSES = 10
IDX_IMAGES_MAGIC = 0x00000803
IDX_LABELS_MAGIC = 0x00000801
CIFAR_SHAPE = (3, 32, 32)
CIFAR_PIXELS = 3 * 32 * 32
CIFAR_IMAGES_PER_FILE = 10_000


def read_bytes(path: Path) -> bytes:
    """The file's content, decompressed when its name ends in .gz."""
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: damaged gzip file ({error})") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error


def read_idx(images_path: Path, labels_path: Path) -> tuple[Images, Labels]:
    """Images and labels of an idx pair, raw or gzipped; images are [n, 1, h, w]."""
    shape, pixels = _parse_idx(images_path, IDX_IMAGES_MAGIC, dimensions=3)
    _, labels = _parse_idx(labels_path, IDX_LABELS_MAGIC, dimensions=1)
    if shape[0] != labels.size:
        raise InputError(
            f"{images_path} has {shape[0]} images but {labels_path} has {labels.size} labels"
        )
    count, height, width = shape
    return pixels.reshape(count, 1, height, width), _check_labels(labels, labels_path)


def read_cifar_binary(
    path: Path, images_per_file: int = CIFAR_IMAGES_PER_FILE
) -> tuple[Images, Labels]:
    """One file of CIFAR-10's binary version: records of one label byte and 3072 pixels."""
    raw = read_bytes(path)
    expected = images_per_file * (1 + CIFAR_PIXELS)
    if len(raw) != expected:
        raise InputError(f"{path}: expected {expected} bytes, got {len(raw)}")
    records = np.frombuffer(raw, dtype=np.uint8).reshape(images_per_file, 1 + CIFAR_PIXELS)
    images = records[:, 1:].reshape(images_per_file, *CIFAR_SHAPE)
    return images, _check_labels(records[:, 0], path)


def read_cifar_pickle(
    path: Path, images_per_file: int = CIFAR_IMAGES_PER_FILE
) -> tuple[Images, Labels]:
    """One file of CIFAR-10's Python version, a pickled dict; nothing but arrays is unpickled."""
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="bytes").load()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    # A damaged pickle can raise nearly anything, from EOFError to MemoryError.
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: unreadable pickle ({message})") from error
    if not isinstance(content, dict) or not {b"data", b"labels"} <= content.keys():
        raise InputError(f"{path}: expected a dict with 'data' and 'labels'")
    images, labels = content[b"data"], content[b"labels"]
    expected = (images_per_file, CIFAR_PIXELS)
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape != expected:
        got = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images)
        raise InputError(f"{path}: expected 'data' to be uint8 {expected}, got {got}")
    valid = isinstance(labels, list) and all(isinstance(label, int) for label in labels)
    if not valid or len(labels) != images_per_file:
        raise InputError(f"{path}: expected 'labels' to be a list of {images_per_file} integers")
    return images.reshape(images_per_file, *CIFAR_SHAPE), _check_labels(np.array(labels), path)


class _ArrayUnpickler(pickle.Unpickler):
    """Resolves the three names that a pickled numpy array needs, and no other."""

    def __init__(self, file: IO[bytes], encoding: str) -> None:
        super().__init__(file, encoding=encoding)

    def find_class(self, module: str, name: str) -> Any:
        # numpy 1 wrote numpy.core, numpy 2 writes numpy._core.
        if name == "_reconstruct" and module in (
            "numpy.core.multiarray",
            "numpy._core.multiarray",
        ):
            return np.zeros(0).__reduce__()[0]
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        # Protocol 2 spells bytes as _codecs.encode(text, "latin1").
        if (module, name) == ("_codecs", "encode"):
            return _encode_latin1
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"the codec {encoding!r} is not allowed")
    return text.encode("latin1")


def _parse_idx(path: Path, magic: int, dimensions: int) -> tuple[tuple[int, ...], Images]:
    raw = read_bytes(path)
    header = 4 * (1 + dimensions)
    if len(raw) < header:
        raise InputError(f"{path}: truncated, {len(raw)} bytes where the header has {header}")
    found, *shape = struct.unpack(f">{1 + dimensions}I", raw[:header])
    if found != magic:
        raise InputError(f"{path}: wrong magic number {found:#010x}, expected {magic:#010x}")
    # Python integers: the product of a damaged header's sizes must not wrap around.
    expected = 1
    for size in shape:
        expected *= size
    if expected == 0:
        raise InputError(f"{path}: holds no data, its sizes are {shape}")
    if len(raw) - header != expected:
        raise InputError(
            f"{path}: expected {expected} bytes after the header, got {len(raw) - header}"
        )
    return tuple(shape), np.frombuffer(raw, dtype=np.uint8, offset=header)


def _check_labels(labels: NDArray[Any], path: Path) -> Labels:
    if labels.min() < 0 or labels.max() >= CLASSES:
        raise InputError(f"{path}: labels must lie in 0..{CLASSES - 1}, got {labels.max()}")
    return labels.astype(np.int64)
