"""Text for the transformer: found on disk or in Python's library, cut into sequences.

The sources, in the order in which they are tried: what `--text` names; ./data/*.txt; the sources of
Python's standard library, which every machine has.
"""

from __future__ import annotations

import sysconfig
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness.errors import InputError
from benchmarks.workloads.data import LOCAL_DATA, Dataset

CONTEXT = 64
# One more token stands for every rarer character.
MOST_CHARACTERS = 255
# Of the standard library: about as many steps to an epoch, at 32 sequences, as Fashion-MNIST has at
# 128 images.
LIBRARY_CHARACTERS = 2**20
LIBRARY = "Python's standard library"


def load_text(path: Path | None = None, *, train_sequences: int | None = None) -> Dataset:
    """Sequences of a text, each with the characters that follow its own as labels.

    The last tenth of the text is for validation. Sequences do not overlap.

    Args:
        path: a file, or a directory whose *.txt are taken in the order of their names.
        train_sequences: keep at most so many training sequences, the first, >= 1; None keeps all.
    Raises:
        InputError: a wrong path, a file that is not text, too little text.
    """
    name, text = _find(path)
    return make_dataset(name, text, train_sequences=train_sequences)


def make_dataset(name: str, text: str, *, train_sequences: int | None = None) -> Dataset:
    """Cut a text into sequences of `CONTEXT` characters.

    Raises:
        InputError: the text is too short for a sequence of each kind.
    """
    split = len(text) - len(text) // 10
    if len(text) - split <= CONTEXT:
        raise InputError(
            f"{name}: {len(text)} characters are too few, its last tenth must hold more than "
            f"{CONTEXT}"
        )
    train, validation = text[:split], text[split:]
    numbers = _number(train)
    images, labels = _cut(train, numbers)
    validation_images, validation_labels = _cut(validation, numbers)
    return Dataset(
        name=name,
        images=images[:train_sequences].clone(),
        labels=labels[:train_sequences].clone(),
        validation_images=validation_images,
        validation_labels=validation_labels,
        mean=0.0,
        std=1.0,
        vocabulary=len(numbers) + 1,
    )


def _number(text: str) -> dict[str, int]:
    """The numbers, from 1, of the commonest characters; 0 is for all others."""
    counts = Counter(text)
    common = sorted(counts, key=lambda character: (-counts[character], character))
    return {character: index for index, character in enumerate(common[:MOST_CHARACTERS], start=1)}


def _cut(text: str, numbers: dict[str, int]) -> tuple[Tensor, Tensor]:
    """[n, CONTEXT] int64 each: sequences, and the character after each of theirs."""
    tokens = torch.tensor([numbers.get(character, 0) for character in text])
    count = (len(tokens) - 1) // CONTEXT
    inputs, following = (tokens[start : start + count * CONTEXT] for start in (0, 1))
    return inputs.view(count, CONTEXT), following.view(count, CONTEXT)


def _find(path: Path | None) -> tuple[str, str]:
    """A name for the report, and the text."""
    if path is not None:
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not files:
            raise InputError(f"--text {path}: no *.txt file in this directory")
        return path.name or str(path), _read_all(files)
    files = sorted(LOCAL_DATA.glob("*.txt"))
    if files:
        return ", ".join(file.name for file in files), _read_all(files)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return LIBRARY, _read_all(files)[:LIBRARY_CHARACTERS]


def _read_all(files: Sequence[Path]) -> str:
    return "\n".join(_read(file) for file in files)


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"--text {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--text {file}: not a text in UTF-8") from error
    if "\0" in text:
        raise InputError(f"--text {file}: not a text, it has a zero byte")
    if not text.strip():
        raise InputError(f"--text {file}: an empty file")
    return text
