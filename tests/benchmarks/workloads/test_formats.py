"""Readers of idx and CIFAR-10 files, on small fabricated ones."""

import gzip
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness.errors import InputError
from benchmarks.workloads.formats import read_cifar_binary, read_cifar_pickle, read_idx

IMAGES = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
LABELS = np.array([7, 0, 9], dtype=np.uint8)


def idx_images(images: np.ndarray = IMAGES, magic: int = 0x803) -> bytes:
    return struct.pack(">4I", magic, *images.shape) + images.tobytes()


def idx_labels(labels: np.ndarray = LABELS, magic: int = 0x801) -> bytes:
    return struct.pack(">2I", magic, len(labels)) + labels.tobytes()


@pytest.fixture
def idx_pair(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    def write(images: bytes, labels: bytes, end: str = "") -> tuple[Path, Path]:
        paths = tmp_path / f"images{end}", tmp_path / f"labels{end}"
        for path, content in zip(paths, (images, labels), strict=True):
            path.write_bytes(gzip.compress(content) if end == ".gz" else content)
        return paths

    return write


@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx_gives_the_images_and_labels_written(idx_pair, end):
    images, labels = read_idx(*idx_pair(idx_images(), idx_labels(), end))
    np.testing.assert_array_equal(images, IMAGES[:, None])
    np.testing.assert_array_equal(labels, LABELS)
    assert labels.dtype == np.int64


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (idx_images(magic=0x801), idx_labels(), "wrong magic number 0x00000801"),
        (idx_images(), idx_labels(magic=0x803), "wrong magic number 0x00000803"),
        (idx_images()[:-1], idx_labels(), "expected 60 bytes after the header, got 59"),
        (idx_images() + b"x", idx_labels(), "expected 60 bytes after the header, got 61"),
        (idx_images()[:10], idx_labels(), "truncated, 10 bytes where the header has 16"),
        (b"", idx_labels(), "truncated, 0 bytes"),
        (idx_images(IMAGES[:0]), idx_labels(LABELS[:0]), "holds no data"),
        (idx_images(), idx_labels(LABELS[:2]), "3 images but"),
        (idx_images(), idx_labels(LABELS + 1), r"labels must lie in 0\.\.9, got 10"),
        # 2^32 - 1 cubed: must neither wrap around nor be allocated.
        (struct.pack(">4I", 0x803, *[2**32 - 1] * 3), idx_labels(), "bytes after the header"),
    ],
)
def test_damaged_idx_is_refused_with_its_name(idx_pair, images, labels, message):
    with pytest.raises(InputError, match=message) as error:
        read_idx(*idx_pair(images, labels))
    assert "images" in str(error.value) or "labels" in str(error.value)


def test_truncated_and_corrupt_gzip_are_refused(tmp_path, idx_pair):
    images, labels = idx_pair(idx_images(), idx_labels(), ".gz")
    whole = images.read_bytes()
    # Cut within the data, cut within the header, no gzip at all, a flipped bit in the checksum.
    for damaged in (whole[:-12], whole[:5], b"no gzip", whole[:-8] + bytes(4) + whole[-4:]):
        images.write_bytes(damaged)
        with pytest.raises(InputError, match=r"images\.gz: damaged gzip file"):
            read_idx(images, labels)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="nothing: No such file"):
        read_idx(tmp_path / "nothing", tmp_path / "labels")


def cifar_arrays(count: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (count, 3072), dtype=np.uint8)
    return pixels, random.integers(0, 10, count)


def test_cifar_binary_gives_the_images_and_labels_written(tmp_path):
    pixels, labels = cifar_arrays(3)
    path = tmp_path / "data_batch_1.bin"
    path.write_bytes(
        b"".join(bytes([k]) + row.tobytes() for k, row in zip(labels, pixels, strict=True))
    )
    images, found = read_cifar_binary(path, images_per_file=3)
    np.testing.assert_array_equal(images, pixels.reshape(3, 3, 32, 32))
    np.testing.assert_array_equal(found, labels)


def test_damaged_cifar_binary_is_refused(tmp_path):
    path = tmp_path / "data_batch_1.bin"
    path.write_bytes(bytes(2 * 3073 - 1))
    with pytest.raises(InputError, match="expected 6146 bytes, got 6145"):
        read_cifar_binary(path, images_per_file=2)
    path.write_bytes(bytes([11]) + bytes(3072))
    with pytest.raises(InputError, match=r"0\.\.9, got 11"):
        read_cifar_binary(path, images_per_file=1)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_cifar_pickle_gives_the_images_and_labels_written(tmp_path, protocol):
    pixels, labels = cifar_arrays(3)
    path = tmp_path / "data_batch_1"
    content = {b"data": pixels, b"labels": labels.tolist(), b"batch_label": b"one of five"}
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    images, found = read_cifar_pickle(path, images_per_file=3)
    np.testing.assert_array_equal(images, pixels.reshape(3, 3, 32, 32))
    np.testing.assert_array_equal(found, labels)


def test_cifar_pickle_as_python_2_wrote_it(tmp_path):
    """The published files: text is Python 2's str, which is unpickled as bytes."""
    pixels, labels = cifar_arrays(2)

    def text(content: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(content)) + content

    def name(module: str, attribute: str) -> bytes:
        return f"c{module}\n{attribute}\n".encode()

    empty = name("numpy.core.multiarray", "_reconstruct") + b"("
    empty += name("numpy", "ndarray") + b"(K\x00t" + text(b"b") + b"tR"
    dtype = name("numpy", "dtype") + b"(" + text(b"u1") + b"K\x00K\x01tR"
    dtype += b"(K\x03" + text(b"|") + b"NNNJ" + b"\xff" * 4 + b"J" + b"\xff" * 4 + b"K\x00tb"
    shape = b"(K\x02M" + struct.pack("<H", 3072) + b"t"
    array = empty + b"(K\x01" + shape + dtype + b"\x89" + text(pixels.tobytes()) + b"tb"
    items = b"(" + b"".join(b"K" + bytes([label]) for label in labels) + b"l"
    path = tmp_path / "data_batch_1"
    path.write_bytes(b"\x80\x02}(" + text(b"data") + array + text(b"labels") + items + b"u.")
    images, found = read_cifar_pickle(path, images_per_file=2)
    np.testing.assert_array_equal(images, pixels.reshape(2, 3, 32, 32))
    np.testing.assert_array_equal(found, labels)


class Malicious:
    """Writes a file when it is unpickled, or would."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.write_text, (self.path, "owned")


def test_a_pickle_that_runs_code_is_refused_before_it_does(tmp_path):
    path, target = tmp_path / "data_batch_1", tmp_path / "target"
    path.write_bytes(pickle.dumps(Malicious(target)))
    with pytest.raises(InputError, match="is not allowed"):
        read_cifar_pickle(path)
    assert not target.exists()
    # The same bytes do run code where nothing is restricted.
    pickle.loads(path.read_bytes())
    assert target.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a dict"),
        ({b"data": np.zeros((2, 3072), np.uint8)}, "expected a dict"),
        ({b"data": np.zeros((2, 3071), np.uint8), b"labels": [0, 1]}, "expected 'data'"),
        ({b"data": np.zeros((2, 3072), np.int32), b"labels": [0, 1]}, "expected 'data'"),
        ({b"data": [1], b"labels": [0, 1]}, "expected 'data'"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, "expected 'labels'"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, "a"]}, "expected 'labels'"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, -1]}, "labels must lie"),
    ],
)
def test_a_pickle_of_something_else_is_refused(tmp_path, content, message):
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=message):
        read_cifar_pickle(path, images_per_file=2)


def test_a_truncated_pickle_is_refused(tmp_path):
    pixels, labels = cifar_arrays(2)
    whole = pickle.dumps({b"data": pixels, b"labels": labels.tolist()}, protocol=2)
    path = tmp_path / "data_batch_1"
    for length in (0, 1, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="unreadable pickle"):
            read_cifar_pickle(path, images_per_file=2)
