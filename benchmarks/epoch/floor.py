"""The arithmetic of a step on the CPU: what GLS and Adam must move and multiply, at full rate.

    rows        4 n d r flops, for layers whose P applies at the backward
    gradient    4 m d r flops and 12 m d bytes, for the others: D0 read, D's lines read and written
    sketch      4 n d r flops every `GATHER_EVERY` steps, n of at most 1,024 rows
    factor      of layers that take an orthogonal step by default, the fewer of 15 s^2 b + 5 s^3
                and 6 s^2 b + 14 s^3 flops, for the shorter side s and the longer b
    update      24 bytes a parameter with momentum, 16 without; Adam's 28,
                which parameters of no covered layer take, too
    state       U [d, r], M and C [r, r], v [m] and c [d] per layer, 4 bytes a parameter with
                momentum; Adam's 8

Letters: see gls_fused.reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.ceilings import Ceilings
from benchmarks.harness.interleave import quartiles
from benchmarks.harness.tables import Table
from benchmarks.workloads.contenders import BASELINE, CONTENDERS
from benchmarks.workloads.shapes import SHAPES
from benchmarks.workloads.sizes import (
    ADAM_BYTES,
    FLOAT,
    GATHER_EVERY,
    TASK_MODELS,
    Layer,
    flops_of_factor,
)
from gls_fused.apply.spectral import LEAST_SIDE, MOST_SHARE
from gls_fused.reference import POLAR_EXPRESS

# Those that the tasks' models are counted at.
COUNTED = ("cifar10", "text")
UPDATE_BYTES: Mapping[str, int] = {"gls": 24, "gls-momentum0": 16, BASELINE: ADAM_BYTES}
WRITTEN = 3 * FLOAT


@dataclass(frozen=True)
class Work:
    """Of one step, beyond the forward and the backward: flops, and bytes to and from memory."""

    flops: float
    bytes: float

    def seconds(self, ceilings: Ceilings) -> float:
        """One after the other, each at its ceiling."""
        return self.flops / ceilings.gemm + self.bytes / ceilings.copy


def work_of(optimizer: str, task: str, batch_size: int) -> Work:
    """Of a contender in `UPDATE_BYTES`, on the task at CIFAR-10's shape or the text's."""
    model = TASK_MODELS[task](batch_size)
    moved = UPDATE_BYTES[optimizer] * (model.parameters - model.others)
    moved += ADAM_BYTES * model.others
    if optimizer == BASELINE:
        return Work(0, moved)
    flops = sum(factor_flops(layer) for layer in model.layers[:-1])
    for layer in model.layers:
        per_row = 4 * layer.dim * layer.rank
        flops += per_row * (layer.rows if layer.at_backward else layer.outputs)
        flops += per_row * layer.sketched / GATHER_EVERY
        moved += 0 if layer.at_backward else WRITTEN * layer.parameters
    return Work(flops, moved)


def factor_flops(layer: Layer) -> float:
    """Of a layer's orthogonal factor on a CPU; 0 where "auto" takes none, as of the last layer."""
    short, long = sorted((layer.outputs, layer.inputs))
    plain = len(POLAR_EXPRESS) * (4 * short**2 * long + 2 * short**3)
    if short < LEAST_SIDE or plain > MOST_SHARE * 6 * layer.rows * layer.outputs * layer.inputs:
        return 0
    return flops_of_factor(short, long)


def state_share(optimizer: str, task: str) -> float:
    """Bytes of GLS's state over Adam's."""
    model = TASK_MODELS[task](1)
    kept = sum(
        layer.rank * (layer.dim + 2 * layer.rank) + layer.outputs + layer.dim
        for layer in model.layers
    )
    kept += model.parameters - model.others if optimizer == "gls" else 0
    kept += 2 * model.others
    return kept / (2 * model.parameters)


def make_floor_table(cells: Sequence[Mapping[str, Any]], ceilings: Mapping[str, float]) -> Table:
    """One row per cell and kind of GLS, at CIFAR-10's shape and the text's."""
    machine = Ceilings(**ceilings)
    rows = []
    for cell in cells:
        if cell["shape"] not in COUNTED or cell["task"] not in TASK_MODELS:
            continue
        seconds = cell["seconds_per_step"]
        for name in UPDATE_BYTES:
            if name == BASELINE or name not in seconds:
                continue
            ours, adam = (work_of(n, cell["task"], cell["batch_size"]) for n in (name, BASELINE))
            extra = ours.seconds(machine) - adam.seconds(machine)
            rows.append(
                (
                    SHAPES[cell["shape"]].title,
                    cell["task"],
                    str(cell["batch_size"]),
                    CONTENDERS[name].title,
                    f"{ours.flops / 1e6:.0f}",
                    f"{ours.bytes / 1e6:.1f}",
                    f"{adam.bytes / 1e6:.1f}",
                    f"{1e3 * extra:+.2f}",
                    f"{1 + extra / quartiles(seconds[BASELINE]).median:.3f}",
                    f"{state_share(name, cell['task']):.3f}",
                )
            )
    return Table(
        "What the arithmetic allows",
        "A model, not a measurement: the flops of P, of orthogonal factors and of a tenth of a "
        "sketch and the bytes of the update, at this machine's ceilings, a copy's "
        f"{machine.copy / 1e9:.1f} GB/s (read and written) and a GEMM's "
        f"{machine.gemm / 1e9:.0f} GFLOP/s, measured before the rounds; how "
        "much longer than Adam's step that takes, and the ratio to Adam's measured step it would "
        "give. What a measured ratio has above it are kernels below these ceilings, small layers, "
        "Python, and noise. The state is U [d, r], M and C [r, r], a mean square per output and "
        "input of every layer, and the momentum: a layer's U is r / m of its weight.",
        (
            "data",
            "task",
            "batch",
            "optimizer",
            "MFLOP",
            "MB",
            "Adam's MB",
            "ms more than Adam",
            "seconds, of Adam's",
            "state, of Adam's",
        ),
        tuple(rows),
        labels=4,
    )
