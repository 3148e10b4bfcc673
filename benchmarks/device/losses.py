"""Part `losses`: seconds until Adam's best training loss, task by task."""

from __future__ import annotations

from pathlib import Path

from benchmarks.device.machine import Machine
from benchmarks.device.record import Record
from benchmarks.time_to_loss.run import (
    BASELINE,
    CHALLENGER,
    TimeOptions,
    measure_time_to_loss,
    reach,
    target_of,
)

TASKS = ("mlp", "autoencoder", "cnn", "transformer", "resnet")
EPOCHS, IMAGES = 5, 10_000
# Of a dry run: the fewest images that an epoch's ten checkpoints admit.
DRY_BATCH = 8


def measure_losses(machine: Machine, record: Record, data: Path | None, out: Path) -> bool:
    """Train every task with both; `out` gets the whole curves."""
    epochs = 1 if machine.dry else EPOCHS
    record.note(
        f"Adam at the best rate of a search against GLS at its default, {epochs} epochs, seed 0, "
        f"as `python -m benchmarks time-to-loss` has it; the goal is Adam's lowest training loss."
    )
    texts = data if data is not None and any(data.glob("*.txt")) else None
    for task in TASKS[:1] if machine.dry else TASKS:
        folder = out / task
        folder.mkdir(parents=True, exist_ok=True)
        options = TimeOptions(
            tasks=(task,),
            seeds=(0,),
            epochs=epochs,
            batch_size=DRY_BATCH if machine.dry else None,
            rates={BASELINE: 1e-3} if machine.dry else {},
            gls={},
            device=machine.device,
            dataset="auto",
            data=data,
            text=texts,
            train_images=10 * DRY_BATCH if machine.dry else IMAGES,
        )
        (found,) = measure_time_to_loss(options, folder)["tasks"]
        (run,) = found["runs"]
        goal = target_of(run)
        mine, its = (
            None if goal is None else reach(run, name, goal) for name in (CHALLENGER, BASELINE)
        )
        record.add(
            "Time to Adam's loss", task=task, data=found["data"], images=found["train_images"],
            goal=goal,
            **{
                "Adam's lr": found["lr"][BASELINE],
                "Adam, s": None if its is None else its.seconds,
                "GLS, s": None if mine is None else mine.seconds,
                "of Adam's seconds": None if not (mine and its) else mine.seconds / its.seconds,
                "of its epochs": None if not (mine and its) else mine.epochs / its.epochs,
            },
        )  # fmt: skip
    return True
