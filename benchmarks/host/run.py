"""Seconds of `step()` alone over the number of layers, kernels running or their launches stubbed.

The layers are narrow, so that what is left is the host's work. With stubbed launches every kernel
of the Triton backend is prepared, its tables made and uploaded, and then not started; of torch's
fused Adam likewise. What a launch itself costs the host is in neither.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks.harness.errors import InputError
from benchmarks.harness.files import write_json
from benchmarks.harness.interleave import run_rounds
from benchmarks.harness.progress import say
from benchmarks.harness.runs import describe_run, finish_run
from benchmarks.workloads.gate import check_gls
from benchmarks.workloads.shapes import synthesise
from benchmarks.workloads.tasks import CLASSES, Shape, Task
from gls_fused import GLS

JSON_FILE = "host.json"
NAMES = ("gls", "adam")
LAYERS = (3, 24, 100, 300)
# So small that weights stay what they are, and no layer runs away.
RATE = 1e-8
# GLS gathers in one step of so many.
PERIOD = 10


@dataclass(frozen=True)
class HostOptions:
    """What is timed, and how often."""

    layers: tuple[int, ...]
    width: int
    batch: int
    rounds: int
    stubbed: bool

    @property
    def gls(self) -> dict[str, Any]:
        """Options for GLS: stubbed, P applies where it does on a GPU."""
        return {"backend": "triton", "site": "step"} if self.stubbed else {}


class Stepper:
    """A chain of linear layers and its optimizer, of which `step()` alone is timed."""

    def __init__(self, layers: int, options: HostOptions, *, gls: bool) -> None:
        torch.manual_seed(0)
        width = options.width
        self.model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
        for layer in self.model:
            # By torch's own start the rows fade to zeros within 300 layers, and GLS waits for some.
            nn.init.orthogonal_(layer.weight)  # type: ignore[arg-type]
        self.inputs = torch.randn(options.batch, width)
        params = self.model.parameters()
        self.optimizer: Any = (
            GLS(self.model, lr=RATE, **options.gls)
            if gls
            else torch.optim.Adam(params, lr=RATE, fused=True)
        )
        self.stubbed = options.stubbed
        # Of each step.
        self.seconds: list[float] = []
        # Statistics start, buffers are made, with kernels that run.
        self._step(contextlib.nullcontext())
        if gls and str(self.optimizer).count("no rows yet"):
            raise RuntimeError("layers: expected statistics of all of them after the first step")

    def run(self, steps: int) -> float:
        """Take steps, and return the seconds of their `step()`."""
        found = [
            self._step(without_launches() if self.stubbed else contextlib.nullcontext())
            for _ in range(steps)
        ]
        self.seconds += found
        return sum(found)

    def _step(self, context: contextlib.AbstractContextManager[object]) -> float:
        self.optimizer.zero_grad()
        self.model(self.inputs).square().mean().backward()
        with context:
            before = time.perf_counter()
            self.optimizer.step()
            return time.perf_counter() - before


@contextlib.contextmanager
def without_launches() -> Iterator[None]:
    """Kernels of Triton's and of torch's fused Adam are prepared, and not started."""
    from triton.runtime.interpreter import InterpretedFunction

    def started(*arguments: Any, **options: Any) -> None:
        """Nothing runs."""

    with (
        mock.patch.object(InterpretedFunction, "__getitem__", return_value=started),
        mock.patch.object(torch, "_fused_adam_", started),
        mock.patch.object(torch, "_fused_adamw_", started),
    ):
        yield


def measure_host(options: HostOptions, out: Path) -> dict[str, Any]:
    """Time every number of layers; `out` is kept complete after each.

    Raises:
        InputError: launches are to be stubbed, and Triton's interpreter is not on.
        GateError: GLS does something else than the reference; nothing is timed.
    """
    if options.stubbed and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError("--stubbed: expected TRITON_INTERPRET=1, set before Python starts")
    device = torch.device("cpu")
    gate = _check(options)
    results = {
        **describe_run(device),
        "settings": {**asdict(options), "lr": RATE},
        "gate": asdict(gate),
        "points": [],
    }
    for layers in options.layers:
        steppers = {name: Stepper(layers, options, gls=name == "gls") for name in NAMES}
        rounds = run_rounds(steppers, dict.fromkeys(NAMES, PERIOD), options.rounds)
        seconds = {name: stepper.seconds for name, stepper in steppers.items()}
        results["points"].append({"layers": layers, "seconds_per_step": rounds, "steps": seconds})
        finish_run(results)
        write_json(out / JSON_FILE, results)
        say(f"{layers} layers: {1e3 * statistics.median(rounds['gls']):.2f} ms a step")
    return results


def _check(options: HostOptions) -> Any:
    """The gate, of three of these layers, with kernels that run."""

    def build(shape: Shape) -> nn.Module:
        hidden = [nn.Linear(options.width, options.width) for _ in range(2)]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(options.width, CLASSES))

    dataset = synthesise((1, 1, options.width), 4 * options.batch)
    task = Task("three layers", "MLP", True, build)
    return check_gls(task, dataset, options.batch, **options.gls)


def gathering(steps: Mapping[str, list[float]]) -> list[float]:
    """GLS's seconds of the steps that gathered: the optimizer's first is not among `steps`."""
    return steps["gls"][PERIOD - 1 :: PERIOD]


def ordinary(steps: Mapping[str, list[float]]) -> list[float]:
    """GLS's seconds of the others."""
    return [x for index, x in enumerate(steps["gls"], start=1) if index % PERIOD]
