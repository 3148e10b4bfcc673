"""Part `tiles`: block sizes around those of the Triton backend's table, each checked and timed."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator
from unittest import mock

import torch

from benchmarks.device.cases import Case, Shapes, make_cases
from benchmarks.device.kernels import GPT2, MLP
from benchmarks.device.machine import Machine
from benchmarks.device.ops import TINY
from benchmarks.device.record import Record
from gls_fused.backends.dispatch import resolve_backend

BACKEND = "gls_fused.backends.triton"
# A function of configs.py, and the op and case whose time tells; None: every case of the op.
TUNED = {
    "row_tile": ("precondition_rows", None),
    "sketch_tile": ("sketch_rows", None),
    "update_tile": ("update_layers_", "factored, D0 P formed"),
    "symmetric_tile": ("update_spectral_layers_", None),
}
# What each of rows, columns, warps and stages is multiplied by, one at a time.
FACTORS = (0.5, 2)
LEAST_EDGE = 16


def try_tiles(machine: Machine, record: Record) -> bool:
    """One change of one number at a time."""
    backend = resolve_backend("triton", [machine.device.type])
    configs = sys.modules[f"{BACKEND}.configs"]
    record.note(
        "One number of a line of gls_fused/backends/triton/configs.py changed at a time: "
        "(rows, columns, warps, stages). A tile that does not compile, or errs, says so."
    )
    for shapes in (TINY,) if machine.dry else (MLP, GPT2):
        for function, (op, what) in TUNED.items():
            case = _find(shapes, machine.device, op, what)
            tile = getattr(configs, function)
            for change, changed in _changes(tile, few=machine.dry):
                row = {"layers": shapes.name, "table": function, "op": case.op, "change": change}
                try:
                    with _patched(function, changed):
                        error = case.error(backend)
                        call = case.make(torch.float32)
                        seconds = machine.seconds(lambda: call(backend))  # noqa: B023
                # Registers, shared memory or the compiler itself: each a finding of its own.
                except Exception as failure:  # noqa: BLE001
                    traceback.print_exc()
                    record.add("Tiles", **row, µs=None, outcome=type(failure).__name__)
                    continue
                good = error <= case.tolerance
                outcome = "ok" if good else "WRONG"
                record.add("Tiles", **row, µs=1e6 * seconds.median, outcome=outcome)
    return True


def _find(shapes: Shapes, device: torch.device, op: str, what: str | None) -> Case:
    return next(
        case for case in make_cases(shapes, device) if case.op == op and what in (None, case.what)
    )


def _changes(tile, *, few: bool) -> Iterator[tuple[str, object]]:  # type: ignore[no-untyped-def]
    """A label, and what stands for the table's function."""
    yield "as in the table", tile
    for field in ("warps",) if few else ("rows", "columns", "warps", "stages"):
        for factor in FACTORS[-1:] if few else FACTORS:

            def changed(*arguments, field=field, factor=factor):  # type: ignore[no-untyped-def]
                found = tile(*arguments)
                least = LEAST_EDGE if field in ("rows", "columns") else 1
                value = max(least, int(getattr(found, field) * factor))
                return found._replace(**{field: value})

            yield f"{field} × {factor:g}", changed


@contextlib.contextmanager
def _patched(function: str, replacement: object) -> Iterator[None]:
    """In every module of the backend that has imported it by name."""
    modules = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith(BACKEND) and hasattr(module, function)
    ]
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, function, replacement))
        yield
