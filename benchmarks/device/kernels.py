"""Part `kernels`: every op's seconds beside what its bytes and flops take at measured rates."""

from __future__ import annotations

import traceback
from types import ModuleType

import torch
from torch import nn

from benchmarks.device.cases import Case, Shapes, make_cases
from benchmarks.device.machine import Machine
from benchmarks.device.ops import TINY
from benchmarks.device.record import Record
from benchmarks.harness.interleave import Quartiles
from benchmarks.workloads.sizes import ADAM_BYTES, transformer
from gls_fused.capture.rows import SKETCH_ROWS

MLP = Shapes("MLP", ((1024, 3072), (512, 1024), (10, 512)), 128, 32)
GPT2 = Shapes(
    "124M transformer",
    tuple((layer.outputs, layer.inputs) for layer in transformer().layers),
    SKETCH_ROWS,
    32,
)
TITLE = "Kernels"
# Timed in a dry run.
INTERPRETED = "precondition_rows"


class Rates:
    """What the machine reaches: a copy's bytes a second, and flops of large products."""

    def __init__(self, machine: Machine) -> None:
        size, edge = (2**20, 256) if machine.dry else (2**28, 8192)
        source = torch.ones(size, dtype=torch.int8, device=machine.device)
        target = torch.empty_like(source)
        self.copy = 2 * size / machine.seconds(lambda: target.copy_(source)).median
        self.products = {}
        for dtype in (torch.float32, torch.bfloat16):
            left = torch.randn(edge, edge, device=machine.device).to(dtype)
            out = torch.empty_like(left)
            taken = machine.seconds(lambda a=left, b=out: torch.mm(a, a, out=b))
            self.products[dtype] = 2 * edge**3 / taken.median

    def floor(self, case: Case) -> float:
        """Seconds, at the least."""
        dtype = torch.bfloat16 if case.products else torch.float32
        return max(case.bytes / self.copy, case.flops / self.products[dtype])


def measure_kernels(machine: Machine, record: Record) -> bool:
    """Time what agrees with the reference; whether all did."""
    rates = Rates(machine)
    record.note(
        f"A copy moves {rates.copy / 1e9:,.0f} GB/s, a float32 product makes "
        f"{rates.products[torch.float32] / 1e12:.3g} TFLOP/s, a bfloat16 product "
        f"{rates.products[torch.bfloat16] / 1e12:.3g}. The floor is what an op's bytes (each array "
        "once) or its flops take at these rates, whichever is longer."
    )
    record.note(
        f"Medians of {machine.runs} runs [quartiles], L2 flushed before each; `replayed` is the "
        f"same as a {machine.captures}, without the host's part; - where it cannot be captured."
    )
    good, backends = True, machine.backends()
    for shapes in (TINY,) if machine.dry else (MLP, GPT2):
        _measure_adam(machine, record, rates, shapes)
        for case in make_cases(shapes, machine.device):
            for name, backend in backends.items():
                if case.fits(backend) and _is_timed(machine, case, name):
                    good &= _measure(machine, record, rates, shapes, case, name, backend)
    return good


def _is_timed(machine: Machine, case: Case, backend: str) -> bool:
    """Of interpreted kernels only one: they take seconds, which mean nothing."""
    return not machine.dry or backend != "triton" or case.op == INTERPRETED


def _measure(
    machine: Machine, record: Record, rates: Rates, shapes: Shapes, case: Case, name: str,
    backend: ModuleType,
) -> bool:  # fmt: skip
    what = {"layers": shapes.name, "op": case.op, "of": case.what, "backend": name}
    error = case.error(backend)
    if not error <= case.tolerance:
        record.add("Wrong, and not timed", **what, error=error, allowed=case.tolerance)
        return False
    call = case.make(torch.float32)
    seconds = machine.seconds(lambda: call(backend))
    try:
        replay = machine.capture(lambda: call(backend))
        replayed = machine.seconds(replay).median
    except RuntimeError:
        # An op that waits for the host cannot be captured; the rest of the table can be made.
        traceback.print_exc()
        replayed = None
        machine.synchronise()
    _add(record, what, seconds, replayed, rates.floor(case), case.bytes)
    return True


def _measure_adam(machine: Machine, record: Record, rates: Rates, shapes: Shapes) -> None:
    """torch's fused Adam on the same parameters."""
    sizes = [size for m, k in shapes.layers for size in ((m, k), (m,))]
    params = [nn.Parameter(torch.randn(size, device=machine.device)) for size in sizes]
    for param in params:
        param.grad = torch.randn_like(param)
    adam = torch.optim.Adam(params, fused=True, capturable=not machine.dry)
    seconds = machine.seconds(adam.step)
    replayed = machine.seconds(machine.capture(adam.step)).median
    moved = ADAM_BYTES * sum(param.numel() for param in params)
    what = {"layers": shapes.name, "op": "Adam.step", "of": "all", "backend": "torch fused"}
    _add(record, what, seconds, replayed, moved / rates.copy, moved)


def _add(
    record: Record, what: dict[str, str], seconds: Quartiles, replayed: float | None,
    floor: float, moved: float,
) -> None:  # fmt: skip
    spread = f"[{1e6 * seconds.low:.1f}, {1e6 * seconds.high:.1f}]"
    least = seconds.median if replayed is None else min(replayed, seconds.median)
    record.add(
        TITLE, **what,
        **{
            "µs": 1e6 * seconds.median,
            "quartiles, µs": spread,
            "replayed, µs": None if replayed is None else 1e6 * replayed,
            "floor, µs": 1e6 * floor,
            "× floor": least / floor,
            "MB": moved / 1e6,
        },
    )  # fmt: skip


def run_once(machine: Machine, record: Record) -> bool:
    """Each op of each backend once, warm, for a profiler to look at."""
    record.note(f"Ops that the profiler saw, on the layers of {MLP.name}.")
    for name, backend in machine.backends().items():
        for case in make_cases(TINY if machine.dry else MLP, machine.device):
            if case.fits(backend) and _is_timed(machine, case, name):
                call = case.make(torch.float32)
                call(backend)
                machine.synchronise()
                with machine.profiled():
                    call(backend)
                record.add("Ops", backend=name, op=case.op, of=case.what)
    return True
