"""Fabricated records, and the checkout on the path: the benchmarks are no part of the package."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tiny import TINY  # noqa: E402  (needs the path set above)

from benchmarks.__main__ import main  # noqa: E402
from benchmarks.convergence.records import EpochRecord, EvaluationRecord, Run  # noqa: E402
from benchmarks.harness import heap  # noqa: E402
from benchmarks.workloads.shapes import synthesise  # noqa: E402
from benchmarks.workloads.tasks import TASKS  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More would wait for one another on layers this small, and the command line sets its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def command_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As outside of pytest, whose workers have no arguments, and tell what they start to rest."""
    monkeypatch.setattr(sys, "argv", ["benchmarks", "tested"])
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


def make_run(
    losses: Sequence[float | None],
    *,
    seconds: float = 1.0,
    phase: str = "final",
    task: str = "mlp",
    optimizer: str = "adam",
    lr: float = 1e-3,
    seed: int = 0,
    epochs: int | None = None,
) -> Run:
    """A run of these training losses; None marks the epoch that diverged."""
    return tuple(
        EpochRecord(
            phase=phase,
            task=task,
            dataset="digits",
            optimizer=optimizer,
            lr=lr,
            seed=seed,
            epoch=epoch,
            epochs=epochs or len(losses),
            train_loss=loss,
            validation_loss=None if loss is None else 2 * loss,
            validation_error=None if loss is None else loss / 10,
            seconds=seconds,
            peak_memory_bytes=1024,
            peak_memory_kind="ru_maxrss",
            diverged=loss is None,
        )
        for epoch, loss in enumerate(losses, start=1)
    )


def make_curve(
    losses: Sequence[float | None],
    *,
    every: int = 100,
    seconds: float = 1.0,
    task: str = "mlp",
    optimizer: str = "adam",
    seed: int = 0,
    epochs: int = 2,
) -> list[EvaluationRecord]:
    """Evaluations of a final run of `make_run`, of these training losses."""
    return [
        EvaluationRecord(
            phase="final",
            task=task,
            optimizer=optimizer,
            lr=1e-3,
            weight_decay=None,
            seed=seed,
            epochs=epochs,
            step=index * every,
            train_loss=loss,
            validation_loss=None if loss is None else 2 * loss,
            validation_error=None,
            seconds=index * seconds,
            diverged=loss is None,
        )
        for index, loss in enumerate(losses, start=1)
    ]


@pytest.fixture
def curve_of() -> Callable[..., list[EvaluationRecord]]:
    return make_curve


@pytest.fixture
def run_of() -> Callable[..., Run]:
    return make_run


def _config(epochs: int, seeds: Sequence[int], optimizers: Sequence[str]) -> dict[str, object]:
    return {
        "tasks": ["mlp"],
        "optimizers": list(optimizers),
        "seeds": list(seeds),
        "settings": {
            "epochs": epochs,
            "batch_size": 32,
            "grid_epochs": 1,
            "gls": {"damping": 0.5},
            "environment": {
                "cpu": "Some Processor",
                "cores": 8,
                "threads": 4,
                "omp_wait_policy": "PASSIVE",
                "device": "cpu",
                "torch": "2.99",
                "python": "3.12",
                "gls_fused": "0.9",
                "backends": ["reference", "native"],
            },
            "data of mlp": {
                "name": "digits",
                "train_images": 1437,
                "validation_images": 360,
                "parameters": 1000,
            },
        },
        "invocations": [
            {
                "command": "python -m benchmarks convergence",
                "started": "2026-01-01T00:00:00+00:00",
                "git_commit": "abc123",
            }
        ],
    }


@pytest.fixture
def config_of() -> Callable[..., dict[str, object]]:
    return _config


@pytest.fixture
def run_main(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """(status, standard output, standard error) of a run in this process, with a tiny task."""
    monkeypatch.setitem(TASKS, "tiny", TINY)
    monkeypatch.setattr(
        "benchmarks.epoch.run.images_of", lambda shape: synthesise(shape.shape, 256)
    )
    # The tests' process keeps malloc's own settings.
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    monkeypatch.setattr(heap, "_state", heap.describe_heap())

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    return run
