"""Part `graphs`: whole steps as CUDA graphs that are replayed while the rate changes."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.device.machine import Machine
from benchmarks.device.record import Record
from gls_fused import GLS

BATCH = 64
# Both take the same kernels in the same order; those of torch's that add up in any order differ.
TOLERANCE = 1e-5
FIRST_RATE = 1e-2
# Steps that gather nothing, and steps that all do, as they are at the end of a period.
KINDS = {"plain steps": 1000, "gathering steps": 1}


def check_graphs(machine: Machine, record: Record) -> bool:
    """Whether every backend's replays moved the weights as its steps did."""
    record.note(
        f"{machine.replays} replays of a captured forward, backward and step ({machine.captures}), "
        "with another learning rate for each, written to a tensor on the device; `apart` is how "
        "far the weights end from those of the same steps without a graph, relative to their way."
    )
    good = True
    for backend in machine.backends():
        for kind, every in KINDS.items():
            what = {"backend": backend, "steps": kind}
            try:
                apart, seconds = _compare(machine, backend, every)
            # A capture fails in many ways, each of which is a finding.
            except Exception as error:  # noqa: BLE001
                traceback.print_exc()
                why = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
                record.add("Graphs", **what, outcome=why)
                good = False
                machine.synchronise()
                continue
            right = apart <= TOLERANCE
            good &= right
            outcome = ("ok" if right else "WRONG") + (", nothing captured" if machine.dry else "")
            record.add(
                "Graphs", **what, outcome=outcome, apart=apart, allowed=TOLERANCE,
                **{"eager, ms": 1e3 * seconds[0], "replayed, ms": 1e3 * seconds[1]},
            )  # fmt: skip
    return good


def _compare(machine: Machine, backend: str, every: int) -> tuple[float, tuple[float, float]]:
    torch.manual_seed(0)
    widths = (12, 8, 4) if machine.dry else (784, 512, 10)
    start = nn.Sequential(
        nn.Linear(widths[0], widths[1]), nn.LayerNorm(widths[1]), nn.Tanh(),
        nn.Linear(widths[1], widths[2]),
    ).to(machine.device)  # fmt: skip
    ends, seconds = [], []
    for captured in (False, True):
        model = copy.deepcopy(start)
        rate = torch.tensor(FIRST_RATE, device=machine.device)
        step = _make_step(machine, model, rate, backend, every)
        # A capture alone moves nothing, a plain call in its place would.
        action = machine.capture(step) if captured else step
        if not captured:
            for _ in range(machine.warm_up):
                step()
        for index in range(machine.replays):
            rate.fill_(FIRST_RATE / (1 + index))
            action()
        ends.append(torch.cat([p.detach().double().flatten() for p in model.parameters()]))
        seconds.append(machine.seconds(action).median)
    way = ends[0] - torch.cat([p.detach().double().flatten() for p in start.parameters()])
    apart = float((ends[1] - ends[0]).norm() / way.norm())
    return apart, (seconds[0], seconds[1])


def _make_step(
    machine: Machine, model: nn.Module, rate: Tensor, backend: str, every: int
) -> Callable[[], object]:
    optimizer = GLS(model, lr=rate, backend=backend, curvature_every=every, rank=8)
    generator = torch.Generator(machine.device).manual_seed(1)
    size = next(model.parameters()).shape[1]
    inputs = torch.randn(BATCH, size, generator=generator, device=machine.device)

    def step() -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()

    return step
