"""core.cuh, emulated, against gls_fused.reference."""

import pytest
import torch
from cuda_emulation.emulator import VARIANT, EmulationError, Emulator
from tolerances import SOLVE, assert_near

from gls_fused import reference

DAMPING = 0.3
POWERS = (1, 0.75, 0.5, 0.25)
# The greatest ranks with a kernel: csrc/cuda/core.h.
MOST = {
    (torch.float32, False): 128,
    (torch.float32, True): 88,
    (torch.float64, False): 88,
    (torch.float64, True): 60,
}


@pytest.fixture(scope="module")
def emulator():
    return Emulator("drivers/core.cpp", ["core_kernels.cu"])


def make_core(rank, dtype):
    generator = torch.Generator().manual_seed(rank)
    root = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
    return (root @ root.T).to(dtype)


def invert(emulator, cores, traces, dims, power, damping=DAMPING, samples=None):
    """C and lambda'^p of every layer, in one call."""
    dtype = cores[0].dtype

    def run(memory):
        emulator.call("start_cores", float(damping))
        results = []
        rows = samples or [None] * len(cores)
        for core, trace, dim, mine in zip(cores, traces, dims, rows, strict=True):
            pair = (
                memory.poison("core_inverse", core.shape, dtype),
                memory.poison("shift", (), dtype),
            )
            inputs = memory.copy("core", core), memory.copy("trace", trace)
            counted = None if mine is None else memory.copy("samples", mine)
            emulator.call("add_core", *inputs, *pair, counted, dim, len(core))
            results += pair
        emulator.call("invert_cores", dtype == torch.float64, round(4 * power))
        return results

    found = emulator.run_in_every_order(run)
    return list(zip(found[::2], found[1::2], strict=True))


def check(emulator, cores, traces, dims, power, samples=None):
    found = invert(emulator, cores, traces, dims, power, samples=samples)
    rows = [x if x is None else x.double() for x in samples or [None] * len(cores)]
    for layer, core, trace, dim, mine in zip(found, cores, traces, dims, rows, strict=True):
        expected = reference.invert_core(core.double(), trace.double(), dim, DAMPING, power, mine)
        for actual, sought in zip(layer, expected, strict=True):
            assert_near(actual, sought, SOLVE[core.dtype])


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_of_all_sizes_in_one_launch(emulator, dtype, power):
    cores = [make_core(rank, dtype) for rank in (0, 1, 2, 4, 9, 33, 60)]
    traces = [1.5 * core.trace() + 0.5 for core in cores]
    with emulator.memory(), emulator.traffic() as moved:
        samples = [torch.tensor(count, dtype=dtype) for count in (1, 2, 3, 24, 28, 40, 200)]
        check(emulator, cores, traces, [len(core) + 20 for core in cores], power, samples)
    # The sanitized build traces nothing.
    assert len(moved) == (VARIANT == "traced")


@pytest.mark.parametrize("power", [1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_layers_than_a_table_holds(emulator, dtype, power):
    # 64; the greatest rank is in the second.
    cores = [make_core(1 + i // 8, dtype) for i in range(70)]
    traces = [1.5 * core.trace() for core in cores]
    check(emulator, cores, traces, [20 + i for i in range(70)], power)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_equal_to_dim(emulator, dtype, power):
    core = make_core(7, dtype)
    check(emulator, [core], [core.trace()], [7], power)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_trace_below_that_of_the_core(emulator, dtype, power):
    core = make_core(7, dtype)
    check(emulator, [core], [0.9 * core.trace()], [30], power)


@pytest.mark.parametrize("power", [1, 0.75])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_greatest_rank(emulator, dtype, power):
    core = make_core(MOST[dtype, power != 1], dtype)
    check(emulator, [core], [1.2 * core.trace()], [300], power)


# 1e30 has no fourth power in float32, and 1e-30 neither.
@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("power", POWERS[1:])
def test_a_scale_far_from_one(emulator, scale, power):
    core = scale * make_core(9, torch.float32)
    check(emulator, [core], [1.5 * core.trace()], [30], power)


@pytest.mark.parametrize("power", POWERS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [2, 33])
def test_the_worst_condition_that_damping_admits(emulator, rank, dtype, power):
    """M of rank one, and the least damping there is: steps suffice, with what eigh would lose."""
    vector = torch.linspace(1, 2, rank, dtype=torch.float64)
    core = vector.outer(vector).to(dtype)
    trace = core.trace()
    ((found, shift),) = invert(emulator, [core], [trace], [10 * rank], power, damping=1e-20)
    damp = 32 * torch.finfo(dtype).eps * vector.square().sum()
    # (M + lambda I)^-p of the matrix that M has been rounded from.
    unit = vector.outer(vector) / vector.square().sum()
    eye = torch.eye(rank, dtype=torch.float64)
    expected = damp**-power * (eye - unit) + (vector.square().sum() + damp) ** -power * unit

    def error_of(root):
        return (root.double() - expected).norm() / expected.norm()

    values, vectors = torch.linalg.eigh(core)
    plain = (vectors * (values + damp.to(dtype)) ** -power) @ vectors.T
    # M itself is rounded, by up to a unit of t, and damping is 32 of them.
    assert error_of(plain) <= power / 32
    assert error_of(found + torch.eye(rank, dtype=dtype) / shift) <= power / 32


def check_as_reference(emulator, core, trace, power):
    (found,) = invert(emulator, [core], [trace], [10], power)
    expected = reference.invert_core(core, trace, 10, DAMPING, power)
    for actual, sought in zip(found, expected, strict=True):
        assert_near(actual, sought, SOLVE[core.dtype])


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_matrix_that_is_not_positive_definite(emulator, dtype, power):
    vector = torch.tensor([[1.0, 2.0, 2.0]], dtype=dtype) / 3
    reflection = torch.eye(3, dtype=dtype) - 2 * vector.T @ vector
    for diagonal in ([4.0, -2.0, 1.0], [2.0, 2.0, -1.0]):
        core = torch.diag(torch.tensor(diagonal, dtype=dtype))
        trace = torch.tensor(9.0, dtype=dtype)
        check_as_reference(emulator, core, trace, power)
        check_as_reference(emulator, reflection @ core @ reflection, trace, power)


@pytest.mark.parametrize("power", POWERS[1:])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_matrix_that_is_not_finite(emulator, value, power):
    core = torch.eye(5)
    core[1, 3] = core[3, 1] = value
    check_as_reference(emulator, core, torch.tensor(9.0), power)


@pytest.mark.parametrize("power", [1, 0.25])
def test_more_shared_memory_than_a_device_has(emulator, power):
    core = make_core(400, torch.float32)
    with pytest.raises(EmulationError, match="too much shared memory"):
        invert(emulator, [core], [core.trace()], [500], power)
