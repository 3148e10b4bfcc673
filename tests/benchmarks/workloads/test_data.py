"""Finding, fetching and standardising data sets."""

import gzip
import hashlib
import struct
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.harness.errors import InputError
from benchmarks.workloads import data, download


def write_idx(folder: Path, count: int = 6, end: str = ".gz") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(1)
    for part in ("train", "t10k"):
        images = random.integers(0, 256, (count, 8, 8), dtype=np.uint8)
        labels = random.integers(0, 10, count, dtype=np.uint8)
        for name, content in (
            ("images-idx3", struct.pack(">4I", 0x803, *images.shape) + images.tobytes()),
            ("labels-idx1", struct.pack(">2I", 0x801, count) + labels.tobytes()),
        ):
            packed = gzip.compress(content) if end else content
            (folder / f"{part}-{name}-ubyte{end}").write_bytes(packed)


def write_cifar(folder: Path, per_file: int) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(2)
    for name in download.CIFAR_MEMBERS:
        records = random.integers(0, 256, (per_file, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        (folder / name).write_bytes(records.tobytes())


@pytest.fixture
def nothing_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SYSTEM_FASHION_MNIST", tmp_path / "absent")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def small_cifar(monkeypatch):
    monkeypatch.setattr(data.read_cifar_binary, "__defaults__", (4,))


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("inner", ["", "fashion-mnist", "FashionMNIST/raw"])
def test_fashion_mnist_is_found_and_standardised(tmp_path, end, inner):
    write_idx(tmp_path / inner, end=end)
    found = data.load_dataset("auto", directory=tmp_path)
    assert found.name == "fashion-mnist"
    assert found.shape == (1, 8, 8)
    assert found.images.dtype == torch.float32
    assert found.images.mean().abs() < 1e-6
    assert (found.images.std() - 1).abs() < 1e-6
    # The validation images are moved by the training set's figures, not their own.
    pixels = (found.validation_images * found.std + found.mean) * 255
    assert (pixels - pixels.round()).abs().max() < 1e-3
    assert found.validation_images.mean().abs() > 1e-4


def test_train_images_keeps_the_first_and_standardises_by_them(tmp_path):
    write_idx(tmp_path)
    whole = data.load_dataset(directory=tmp_path)
    part = data.load_dataset(directory=tmp_path, train_images=2)
    assert len(part.images) == len(part.labels) == 2
    assert len(part.validation_images) == 6
    torch.testing.assert_close(
        part.images * part.std + part.mean, whole.images[:2] * whole.std + whole.mean
    )
    assert part.images.mean().abs() < 1e-6
    assert len(data.load_dataset(directory=tmp_path, train_images=100).images) == 6


def test_cifar_comes_before_fashion_mnist(tmp_path, small_cifar):
    write_idx(tmp_path)
    write_cifar(tmp_path / "cifar-10-batches-bin", 4)
    found = data.load_dataset(directory=tmp_path)
    assert (found.name, found.shape) == ("cifar10", (3, 32, 32))
    assert (len(found.images), len(found.validation_images)) == (20, 4)
    assert data.load_dataset("fashion-mnist", directory=tmp_path).name == "fashion-mnist"


def test_a_missing_cifar_file_is_named(tmp_path, small_cifar):
    write_cifar(tmp_path / "c", 4)
    (tmp_path / "c" / "data_batch_3.bin").unlink()
    with pytest.raises(InputError, match=r"data_batch_3\.bin: No such file"):
        data.load_dataset(directory=tmp_path / "c")


def test_without_files_scikit_learn_provides(nothing_installed):
    digits = data.load_dataset()
    assert (digits.name, digits.shape, len(digits.images)) == ("digits", (1, 8, 8), 1437)
    patches = data.load_dataset(supervised=False)
    assert (patches.name, patches.shape, patches.labels) == ("patches", (3, 32, 32), None)
    # Distinct crops, the same ones every time.
    assert not torch.equal(patches.images[0], patches.images[1])
    assert torch.equal(patches.images, data.load_dataset(supervised=False).images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "imagenet"}, "unknown data set 'imagenet'"),
        ({"directory": Path("absent")}, "--data absent: no such directory"),
        ({"directory": Path()}, r"no CIFAR-10 or Fashion-MNIST files in \."),
        ({"name": "cifar10"}, "no cifar10 files in data; --download-cifar10"),
        ({"name": "fashion-mnist"}, "no fashion-mnist files in data"),
        ({"name": "patches"}, "patches has no labels"),
        ({"name": "digits", "directory": Path()}, "--data does not go with --dataset digits"),
    ],
)
def test_what_cannot_be_loaded_is_refused(nothing_installed, arguments, message):
    with pytest.raises(InputError, match=message):
        data.load_dataset(**arguments)


def test_an_incomplete_or_constant_fashion_mnist_is_refused(tmp_path):
    write_idx(tmp_path)
    images = tmp_path / "train-images-idx3-ubyte.gz"
    images.write_bytes(gzip.compress(struct.pack(">4I", 0x803, 6, 8, 8) + bytes(6 * 64)))
    with pytest.raises(InputError, match="all training pixels are equal"):
        data.load_dataset(directory=tmp_path)
    images.unlink()
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz: No such file"):
        data.load_dataset(directory=tmp_path)


def make_archive(names: list[str]) -> bytes:
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, BytesIO(b"abc"))
    return buffer.getvalue()


def served(tmp_path: Path, content: bytes) -> dict[str, str]:
    path = tmp_path / "served.tar.gz"
    path.write_bytes(content)
    return {"url": path.as_uri(), "md5": hashlib.md5(content, usedforsecurity=False).hexdigest()}


def test_download_unpacks_the_six_files_and_only_once(tmp_path):
    names = [f"cifar-10-batches-bin/{name}" for name in download.CIFAR_MEMBERS]
    source = served(tmp_path, make_archive([*names, "cifar-10-batches-bin/readme.html"]))
    folder = download.download_cifar10(tmp_path / "data", **source)
    assert sorted(path.name for path in folder.iterdir()) == sorted(download.CIFAR_MEMBERS)
    assert (folder / "test_batch.bin").read_bytes() == b"abc"
    assert list((tmp_path / "data").iterdir()) == [folder]
    (tmp_path / "served.tar.gz").unlink()
    assert download.download_cifar10(tmp_path / "data", **source) == folder


def test_a_name_in_the_archive_cannot_lead_out_of_the_folder(tmp_path):
    names = [f"../../../{name}" for name in download.CIFAR_MEMBERS]
    folder = download.download_cifar10(
        tmp_path / "a" / "b", **served(tmp_path, make_archive(names))
    )
    outside = [path for path in tmp_path.rglob("*.bin") if path.parent != folder]
    assert outside == []
    assert len(list(folder.iterdir())) == 6


def test_a_bad_download_is_refused_and_leaves_nothing(tmp_path):
    target = tmp_path / "data"
    good = served(tmp_path, make_archive(list(download.CIFAR_MEMBERS)))
    with pytest.raises(InputError, match="wrong md5"):
        download.download_cifar10(target, good["url"], md5="0" * 32)
    with pytest.raises(InputError, match="lacks"):
        download.download_cifar10(target, **served(tmp_path, make_archive(["test_batch.bin"])))
    with pytest.raises(InputError, match="damaged archive"):
        download.download_cifar10(target, **served(tmp_path, b"not an archive"))
    with pytest.raises(InputError, match="absent"):
        download.download_cifar10(target, (tmp_path / "absent").as_uri())
    assert list(target.iterdir()) == []
