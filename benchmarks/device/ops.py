"""Part `ops`: every op of every backend once, against the reference; what a sanitizer watches."""

from __future__ import annotations

from benchmarks.device.cases import Shapes, make_cases
from benchmarks.device.machine import Machine
from benchmarks.device.record import Record

# No multiple of a tile, nor of 16 bytes; the rows take two programs.
SMALL = Shapes("small", ((27, 45), (18, 27), (10, 18)), 37, 8)
TINY = Shapes("tiny", ((18, 21), (10, 18)), 19, 4)


def check_ops(machine: Machine, record: Record) -> bool:
    """Whether every op of every backend gives what the reference gives; none is no success."""
    shapes = TINY if machine.dry else SMALL
    backends = machine.backends()
    record.note(f"Largest relative error of each op on small arrays, on {machine.device.type}.")
    good = True
    for name, backend in backends.items():
        for case in make_cases(shapes, machine.device):
            if case.fits(backend):
                error = case.error(backend)
                good &= error <= case.tolerance
                record.add(
                    "Ops", backend=name, op=case.op, of=case.what, error=error,
                    allowed=case.tolerance, outcome="ok" if error <= case.tolerance else "WRONG",
                )  # fmt: skip
    return good and bool(backends)
