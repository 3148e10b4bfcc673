"""Parts `steps` and `memory`: whole steps against Adam's, interleaved, and what they allocate."""

from __future__ import annotations

import functools
import gc
import math
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.device.machine import Machine
from benchmarks.device.models import (
    TINY_WORKLOADS,
    WORKLOADS,
    Workload,
    allow_precision,
    in_precision,
)
from benchmarks.device.record import Record
from benchmarks.harness.interleave import (
    calibrate,
    choose_steps,
    pair_ratios,
    quartiles,
    run_rounds,
)
from benchmarks.workloads.contenders import BASELINE, CONTENDERS, RATE, Trainer, state_bytes
from benchmarks.workloads.data import Dataset
from benchmarks.workloads.gate import check_gls
from benchmarks.workloads.optimizers import OPTIMIZERS
from benchmarks.workloads.tasks import Task
from benchmarks.workloads.training import Steps
from gls_fused import GLS

# What each measures first, where it may be cut off.
CELLS = (
    *((name, "float32") for name in ("mlp", "cnn", "autoencoder", "transformer", "resnet")),
    ("gpt2", "bf16"),
    ("gpt2", "tf32"),
    ("medium", "bf16"),
    ("mlp", "bf16"),
    ("mlp", "tf32"),
    ("resnet", "bf16"),
    ("transformer", "bf16"),
    ("gpt2", "float32"),
    ("medium", "tf32"),
    ("cnn", "tf32"),
    ("cnn", "bf16"),
    ("autoencoder", "tf32"),
    ("autoencoder", "bf16"),
    ("resnet", "tf32"),
    ("transformer", "tf32"),
    ("medium", "float32"),
)
TINY_CELLS = (("mlp", "float32"), ("small", "tf32"), ("small", "bf16"))
OTHERS = (BASELINE, "adamw", "muon")
SLICE_SECONDS, CELL_SECONDS = 0.1, 3.0
FEWEST_ROUNDS, MOST_ROUNDS = 3, 9
MEMORY_STEPS = 12


def measure_steps(machine: Machine, record: Record) -> bool:
    """Time every cell; whether every gate passed and every loss stayed finite."""
    record.note(
        "Milliseconds of forward, backward and step, in rounds in which the optimizers take "
        "turns; medians [quartiles], ratios within rounds. `gls` is GLS by its defaults; it was "
        "checked against its reference in float64 and in the precision that is timed."
    )
    good = True
    for name, precision in TINY_CELLS if machine.dry else CELLS:
        with allow_precision(precision):
            try:
                _measure_cell(machine, record, name, precision)
            # Whatever a cell ends with, the next ones can be measured; the part fails.
            except Exception as error:  # noqa: BLE001
                traceback.print_exc()
                record.add("Not measured", model=name, precision=precision, why=_line(error))
                good = False
        _release()
    return good


def measure_memory(machine: Machine, record: Record) -> bool:
    """Peak of a training with each optimizer alone."""
    record.note(
        f"Bytes by which the peak of torch's allocations rises over {MEMORY_STEPS} steps, the "
        "model, its activations and the optimizer included, each optimizer alone; and of its state."
    )
    for name, precision in TINY_CELLS[:1] if machine.dry else _memory_cells():
        workload = _workload(machine, name)
        with allow_precision(precision):
            data = workload.data(machine.device)
            task = in_precision(workload.task, precision, machine.device)
            for optimizer, build in _contenders(machine).items():
                state: list[int] = []
                training = functools.partial(_train, task, data, build, workload.batch, state)
                peak = machine.peak_bytes(training)
                record.add(
                    "Peak memory", model=name, precision=precision, optimizer=optimizer,
                    **{
                        "peak, MB": None if peak is None else peak / 1e6,
                        "state, MB": state[0] / 1e6,
                    },
                )  # fmt: skip
                _release()
    return True


def _train(
    task: Task, data: Dataset, build: Callable[[nn.Module], Steps], batch: int, state: list[int]
) -> None:
    """Some steps, after which `state` has the bytes of the optimizer's."""
    trainer = Trainer(task, data, build, batch)
    trainer.next_steps(MEMORY_STEPS)
    state.append(state_bytes(trainer.optimizer))


def _memory_cells() -> tuple[tuple[str, str], ...]:
    return (
        ("gpt2", "bf16"),
        *((name, "float32") for name in ("mlp", "cnn", "autoencoder", "resnet", "transformer")),
        ("medium", "bf16"),
    )


def _workload(machine: Machine, name: str) -> Workload:
    return TINY_WORKLOADS[name] if machine.dry else WORKLOADS[name]


def _gls_options(machine: Machine) -> dict[str, Mapping[str, Any]]:
    """By its defaults, and with every backend but the one that they choose."""
    found: dict[str, Mapping[str, Any]] = {"gls": {}}
    backends = machine.backends()
    if len(backends) > 1 and not machine.dry:
        found |= {f"gls {name}": {"backend": name} for name in backends}
    return found


def _contenders(machine: Machine) -> dict[str, Callable[[nn.Module], Steps]]:
    found: dict[str, Callable[[nn.Module], Steps]] = {}
    for name, options in _gls_options(machine).items():
        found[name] = lambda model, options=options: GLS(model, lr=RATE, **options)
    for name in OTHERS:
        missing = OPTIMIZERS[name].missing()
        if missing is None:
            found[name] = CONTENDERS[name].build
        else:
            print(f"without {name}: {missing}", flush=True)
    return found


def _measure_cell(machine: Machine, record: Record, name: str, precision: str) -> None:
    workload = _workload(machine, name)
    data = workload.data(machine.device)
    task = in_precision(workload.task, precision, machine.device)
    checked, batch = workload.gate_data(data)
    for options in _gls_options(machine).values():
        check_gls(task, checked, batch, **options)
        _release()
    trainers = _trainers(machine, task, data, workload.batch)
    periods = {each: CONTENDERS["gls"].period if "gls" in each else 1 for each in trainers}
    seconds = {each: calibrate(trainer, periods[each]) for each, trainer in trainers.items()}
    slice_seconds = 0.0 if machine.dry else SLICE_SECONDS
    steps = choose_steps(seconds, periods, BASELINE, slice_seconds)
    one_round = sum(seconds[each] * steps[each] for each in trainers)
    rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, int(CELL_SECONDS / one_round)))
    taken = run_rounds(trainers, steps, 1 if machine.dry else rounds)
    for each, trainer in trainers.items():
        loss = trainer.loss.item()
        if not math.isfinite(loss):
            raise ArithmeticError(f"{each} diverged: its loss is {loss}")
        mine = quartiles([1e3 * second for second in taken[each]])
        ratio = quartiles(pair_ratios(taken[each], taken[BASELINE]))
        epoch = workload.epoch_steps
        record.add(
            "Steps", model=name, precision=precision, batch=workload.batch, optimizer=each,
            **{
                "ms a step": mine.median,
                "quartiles": f"[{mine.low:.3f}, {mine.high:.3f}]",
                "of Adam's": ratio.median,
                "its quartiles": f"[{ratio.low:.3f}, {ratio.high:.3f}]",
                "s an epoch": None if epoch is None else epoch * mine.median / 1e3,
                "rounds": len(taken[each]),
                "seconds": taken[each],
            },
        )  # fmt: skip


def _trainers(machine: Machine, task: Task, data: Dataset, batch: int) -> dict[str, Trainer]:
    return {name: Trainer(task, data, build, batch) for name, build in _contenders(machine).items()}


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
