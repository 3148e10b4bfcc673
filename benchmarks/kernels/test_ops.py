"""Every op, checked against the reference and then timed; a red check is not timed."""

from collections.abc import Iterator

import pytest
import torch

from benchmarks.kernels.cases import Case, make_adam, make_cases
from benchmarks.kernels.report import describe_case
from benchmarks.workloads.tasks import TASKS
from gls_fused import available_backends
from gls_fused.backends.dispatch import resolve_backend

FLOAT = 4


def usable_backends() -> Iterator[str]:
    """Those that have kernels for the CPU."""
    for name, why in available_backends().items():
        try:
            if why is None:
                resolve_backend(name, {"cpu"})
                yield name
        except RuntimeError:
            pass


@pytest.mark.parametrize("name", list(usable_backends()))
@pytest.mark.parametrize("case", make_cases(), ids=lambda case: case.name)
def test_op(benchmark, ceilings, case: Case, name):
    backend = resolve_backend(name, {"cpu"})
    case.check(backend)
    call = case.make(torch.float32)
    benchmark(call, backend)
    describe_case(benchmark, ceilings, case.op, case.shape, name, case.flops, case.bytes)


@pytest.mark.parametrize("task", list(TASKS))
def test_fused_adam(benchmark, ceilings, task):
    """What update_layers_ is compared with."""
    optimizer, count = make_adam(task)
    optimizer.step()
    benchmark(optimizer.step)
    # Parameter, average and mean square are read and written, the gradient is read.
    describe_case(
        benchmark, ceilings, "Adam.step", task, "torch fused",
        7 * count, 7 * FLOAT * count,
    )  # fmt: skip
