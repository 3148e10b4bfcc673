"""What an experiment leaves on disk: one JSON line per epoch and evaluation; the configuration.

A run is complete when its last epoch is recorded, or the one that diverged.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from benchmarks.harness.errors import InputError
from benchmarks.harness.files import REPORT_FILE, write_atomically, write_json

EPOCHS_FILE = "epochs.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
CONFIG_FILE = "config.json"
PLOT_FILE = "convergence.png"


class RunKey(NamedTuple):
    """What tells one training run from another."""

    phase: str
    task: str
    optimizer: str
    lr: float
    seed: int
    epochs: int
    weight_decay: float | None = None


@dataclass(frozen=True)
class EpochRecord:
    """One line of epochs.jsonl.

    Attributes:
        phase: "search" (of the learning rate) or "final".
        epochs: how many the run was to take.
        train_loss, validation_loss, validation_error: None where the loss was not finite;
            the error, a share of 0..1, also where the task has no classes.
        seconds: of training in this epoch, validation excluded.
        peak_memory_kind: "max_memory_allocated" (CUDA, this epoch's) or "ru_maxrss" (the whole
            process's so far, which never falls).
        weight_decay: None: the optimizer's own.
        failure: why the optimizer could not go on, where it raised an error; the run has diverged.
    """

    phase: str
    task: str
    dataset: str
    optimizer: str
    lr: float
    seed: int
    epoch: int
    epochs: int
    train_loss: float | None
    validation_loss: float | None
    validation_error: float | None
    seconds: float
    peak_memory_bytes: int
    peak_memory_kind: str
    diverged: bool
    weight_decay: float | None = None
    failure: str | None = None

    @property
    def key(self) -> RunKey:
        """The run this epoch belongs to."""
        return _key_of(self)


@dataclass(frozen=True)
class EvaluationRecord:
    """One line of evaluations.jsonl, of a final run.

    Attributes:
        step: taken so far.
        train_loss: mean of the minibatch losses since the evaluation before.
        seconds: of training so far, evaluations excluded.
    """

    phase: str
    task: str
    optimizer: str
    lr: float
    weight_decay: float | None
    seed: int
    epochs: int
    step: int
    train_loss: float | None
    validation_loss: float | None
    validation_error: float | None
    seconds: float
    diverged: bool

    @property
    def key(self) -> RunKey:
        """The run this evaluation belongs to."""
        return _key_of(self)


Run = tuple[EpochRecord, ...]
Record = TypeVar("Record", EpochRecord, EvaluationRecord)


class Store:
    """The directory of one experiment."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._runs: dict[RunKey, list[EpochRecord]] = {}

    def create(self, config: dict[str, Any], *, overwrite: bool) -> None:
        """Start anew in an empty directory, or, with `overwrite`, in one of an earlier experiment.

        Raises:
            InputError: the directory is in use, or cannot be written to.
        """
        try:
            entries = sorted(self.directory.iterdir()) if self.directory.exists() else []
            if entries and not overwrite:
                raise InputError(
                    f"--out {self.directory} is not empty: add --resume to continue, "
                    "--overwrite to start anew, or name another directory"
                )
            if entries and not (self.directory / CONFIG_FILE).is_file():
                raise InputError(
                    f"--out {self.directory} is not empty and holds no earlier results"
                )
            self.directory.mkdir(parents=True, exist_ok=True)
            # The configuration marks the directory as ours, so it is never missing.
            self.write_json(CONFIG_FILE, config)
            for name in (EPOCHS_FILE, EVALUATIONS_FILE, REPORT_FILE, PLOT_FILE):
                (self.directory / name).unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"--out {self.directory}: {error.strerror or error}") from error

    def reopen(self, config: dict[str, Any]) -> None:
        """Go on where an earlier experiment stopped; drop what its incomplete runs left.

        Raises:
            InputError: there is none, its files are damaged, or its settings differ.
        """
        earlier = self._read_config()
        for name, value in config["settings"].items():
            # A task that is new has no earlier setting to differ from.
            before = earlier["settings"].get(name, value)
            _check_same(name, before, value)
        self._runs = {}
        for record in read_epochs(self.directory / EPOCHS_FILE):
            self._runs.setdefault(record.key, []).append(record)
        self._runs = {key: run for key, run in self._runs.items() if is_complete(run)}
        lines = [_to_line(record) for run in self._runs.values() for record in run]
        path = self.directory / EVALUATIONS_FILE
        kept = [_to_line(found) for found in read_evaluations(path) if found.key in self._runs]
        # Evaluations first: were this interrupted, complete runs would still have all of theirs.
        if kept or path.exists():
            write_atomically(path, "".join(kept).encode())
        write_atomically(self.directory / EPOCHS_FILE, "".join(lines).encode())
        config["invocations"] = [*earlier["invocations"], *config["invocations"]]
        self.write_json(CONFIG_FILE, config)

    def complete_run(self, key: RunKey) -> Run | None:
        """The run's epochs, if all are recorded."""
        run = self._runs.get(key, [])
        return tuple(run) if is_complete(run) else None

    def append_evaluation(self, record: EvaluationRecord) -> None:
        """Write one evaluation, through to the file."""
        self._append(EVALUATIONS_FILE, record)

    def append(self, record: EpochRecord) -> None:
        """Write one epoch, through to the file."""
        self._append(EPOCHS_FILE, record)
        self._runs.setdefault(record.key, []).append(record)

    def _append(self, name: str, record: EpochRecord | EvaluationRecord) -> None:
        with (self.directory / name).open("a", encoding="utf-8") as file:
            file.write(_to_line(record))

    def write_json(self, name: str, content: object) -> None:
        """Write a JSON file in one piece."""
        write_json(self.directory / name, content, indent=2)

    def _read_config(self) -> dict[str, Any]:
        path = self.directory / CONFIG_FILE
        try:
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(config["settings"], dict):
                raise TypeError("settings")
            if not isinstance(config["invocations"], list):
                raise TypeError("invocations")
        except FileNotFoundError as error:
            raise InputError(f"--resume: {self.directory} holds no {CONFIG_FILE}") from error
        except OSError as error:
            raise InputError(f"--resume: {path}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"--resume: {path} is damaged") from error
        return config


def is_complete(run: Sequence[EpochRecord]) -> bool:
    """Whether the epochs count from 1 up to the last one, or to a divergence."""
    if [record.epoch for record in run] != list(range(1, len(run) + 1)):
        return False
    return bool(run) and (run[-1].diverged or run[-1].epoch == run[-1].epochs)


def read_epochs(path: Path) -> list[EpochRecord]:
    """The records of epochs.jsonl, in order; a last line that was cut short is left out.

    Raises:
        InputError: an unreadable file, or a damaged line before the last.
    """
    return _read(path, EpochRecord)


def read_evaluations(path: Path) -> list[EvaluationRecord]:
    """The same of evaluations.jsonl."""
    return _read(path, EvaluationRecord)


def _read(path: Path, kind: type[Record]) -> list[Record]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    # What follows the last newline is empty, or a line that was cut short.
    *lines, _ = content.split(b"\n")
    names = {field.name for field in fields(kind)}
    # Lines of earlier versions lack what has a default.
    needed = {field.name for field in fields(kind) if field.default is MISSING}
    records = []
    for number, line in enumerate(lines, start=1):
        values = _parse_object(line)
        if not needed <= values.keys() <= names:
            raise InputError(f"{path}: line {number} is damaged")
        records.append(kind(**values))
    return records


def _check_same(name: str, before: Any, value: Any) -> None:
    if isinstance(before, dict) and isinstance(value, dict):
        for key in sorted(before.keys() | value.keys()):
            _check_same(f"{name}: {key}", before.get(key), value.get(key))
    elif before != value:
        raise InputError(
            f"--resume: {name} was {json.dumps(before)} and is {json.dumps(value)} now"
        )


def _parse_object(line: bytes) -> dict[str, Any]:
    """The line's JSON object; an empty one for anything else."""
    try:
        values = json.loads(line)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _key_of(record: EpochRecord | EvaluationRecord) -> RunKey:
    return RunKey(
        record.phase,
        record.task,
        record.optimizer,
        record.lr,
        record.seed,
        record.epochs,
        record.weight_decay,
    )


def _to_line(record: EpochRecord | EvaluationRecord) -> str:
    return json.dumps(asdict(record), allow_nan=False) + "\n"
