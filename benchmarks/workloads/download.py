"""CIFAR-10's download: only on request, checked before it is unpacked."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import tempfile
import urllib.request
from pathlib import Path, PurePosixPath

from benchmarks.harness.errors import InputError

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR_FOLDER = "cifar-10-batches-bin"
CIFAR_MEMBERS = (*(f"data_batch_{index}.bin" for index in range(1, 6)), "test_batch.bin")


def download_cifar10(directory: Path, url: str = CIFAR_URL, md5: str = CIFAR_MD5) -> Path:
    """Fetch CIFAR-10's binary version into `directory`, unless it is there; return its folder.

    Raises:
        InputError: no connection, a wrong checksum, an archive that lacks a file.
    """
    folder = directory / CIFAR_FOLDER
    if all((folder / name).is_file() for name in CIFAR_MEMBERS):
        return folder
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            archive = Path(scratch) / "archive.tar.gz"
            with urllib.request.urlopen(url, timeout=60) as source, archive.open("wb") as target:
                shutil.copyfileobj(source, target)
            check_md5(archive, md5)
            unpacked = Path(scratch) / CIFAR_FOLDER
            extract_cifar10(archive, unpacked)
            folder.mkdir(exist_ok=True)
            for name in CIFAR_MEMBERS:
                os.replace(unpacked / name, folder / name)
    except OSError as error:
        raise InputError(f"--download-cifar10: {url} into {directory}: {error}") from error
    return folder


def check_md5(archive: Path, md5: str) -> None:
    """Refuse an archive whose checksum is not the published one."""
    digest = hashlib.md5(usedforsecurity=False)
    with archive.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != md5:
        raise InputError(f"--download-cifar10: wrong md5 {digest.hexdigest()}, expected {md5}")


def extract_cifar10(archive: Path, folder: Path) -> None:
    """Copy the six known files out of the archive; no name in it decides where anything goes."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = set(CIFAR_MEMBERS)
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = PurePosixPath(member.name).name
                source = tar.extractfile(member) if name in missing and member.isfile() else None
                if source is None:
                    continue
                with source, (folder / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
                missing.discard(name)
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"--download-cifar10: damaged archive ({error})") from error
    if missing:
        raise InputError(f"--download-cifar10: the archive lacks {', '.join(sorted(missing))}")
