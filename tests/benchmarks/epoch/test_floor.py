"""The arithmetic of a step: what it counts, and that states are as large as it says."""

import pytest

from benchmarks.epoch.floor import Work, factor_flops, state_share, work_of
from benchmarks.harness.ceilings import Ceilings
from benchmarks.workloads.contenders import CONTENDERS, Trainer, state_bytes
from benchmarks.workloads.shapes import SHAPES, synthesise
from benchmarks.workloads.sizes import Layer
from benchmarks.workloads.tasks import TASKS


def test_the_floor_counts_what_the_equations_need():
    parameters, batch = 3073 * 1024 + 1025 * 512 + 513 * 10, 128
    adam, gls, plain = (work_of(name, "mlp", batch) for name in ("adam", "gls", "gls-momentum0"))
    assert adam == Work(0, 28 * parameters)
    # The classifier has fewer outputs than rows: P on its gradient, of rank 10.
    assert gls.bytes == 24 * parameters + 12 * 513 * 10
    assert plain.bytes == 16 * parameters + 12 * 513 * 10
    rows = 4 * batch * 32 * (3073 + 1025)
    sketch = (rows + 4 * batch * 10 * 513) / 10
    assert gls.flops == pytest.approx(rows + 4 * 10 * 10 * 513 + sketch)
    assert gls.seconds(Ceilings(copy=1.0, gemm=2.0)) == gls.bytes + gls.flops / 2


def test_the_floor_counts_orthogonal_factors():
    """Of [512, 128] by the polynomials alone; none where few rows or a short side make it dear."""
    assert factor_flops(Layer(512, 128, 2048)) == 6 * 128**2 * 512 + 14 * 128**3
    assert factor_flops(Layer(128, 128, 2048)) == 20 * 128**3
    assert factor_flops(Layer(512, 128, 128)) == 0
    assert factor_flops(Layer(512, 15, 2048)) == 0


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["gls", "gls-momentum0"])
def test_the_state_is_as_large_as_the_floor_says(name, task):
    data = synthesise(SHAPES["text" if TASKS[task].text else "cifar10"].shape, 16)
    sizes = {}
    for contender in (name, "adam"):
        trainer = Trainer(TASKS[task], data, CONTENDERS[contender].build, 8)
        trainer.next_steps(1)
        sizes[contender] = state_bytes(trainer.optimizer)
    # Scalars: steps, traces, shifts.
    assert sizes[name] / sizes["adam"] == pytest.approx(state_share(name, task), abs=1e-3)
