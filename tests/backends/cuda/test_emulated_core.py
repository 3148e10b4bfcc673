"""core.cuh, emulated, against gls_fused.reference."""

import pytest
import torch
from cuda_emulation.emulator import EmulationError, Emulator
from tolerances import SOLVE, assert_near

from gls_fused import reference

DAMPING = 0.3


@pytest.fixture(scope="module")
def emulator():
    return Emulator("drivers/core.cpp", ["core_kernels.cu"])


def make_core(rank, dtype):
    generator = torch.Generator().manual_seed(rank)
    root = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
    return (root @ root.T).to(dtype)


def invert(emulator, cores, traces, dims):
    """C and lambda' of every layer, in one call."""
    dtype = cores[0].dtype

    def run(memory):
        emulator.call("start_cores")
        results = []
        for core, trace, dim in zip(cores, traces, dims, strict=True):
            share = max(DAMPING / dim, 32 * torch.finfo(dtype).eps)
            pair = (
                memory.poison("core_inverse", core.shape, dtype),
                memory.poison("shift", (), dtype),
            )
            inputs = memory.copy("core", core), memory.copy("trace", trace)
            emulator.call("add_core", *inputs, *pair, dim, share, len(core))
            results += pair
        emulator.call("invert_cores", dtype == torch.float64)
        return results

    found = emulator.run_in_every_order(run)
    return list(zip(found[::2], found[1::2], strict=True))


def check(emulator, cores, traces, dims):
    found = invert(emulator, cores, traces, dims)
    for layer, core, trace, dim in zip(found, cores, traces, dims, strict=True):
        expected = reference.invert_core(core.double(), trace.double(), dim, DAMPING)
        for actual, sought in zip(layer, expected, strict=True):
            assert_near(actual, sought, SOLVE[core.dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_of_all_sizes_in_one_launch(emulator, dtype):
    cores = [make_core(rank, dtype) for rank in (1, 2, 9, 33, 64)]
    traces = [1.5 * core.trace() for core in cores]
    check(emulator, cores, traces, [len(core) + 20 for core in cores])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_layers_than_a_table_holds(emulator, dtype):
    # 64; the greatest rank is in the second.
    cores = [make_core(1 + i // 8, dtype) for i in range(70)]
    check(emulator, cores, [1.5 * core.trace() for core in cores], [20 + i for i in range(70)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_equal_to_dim(emulator, dtype):
    core = make_core(7, dtype)
    check(emulator, [core], [core.trace()], [7])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_trace_below_that_of_the_core(emulator, dtype):
    core = make_core(7, dtype)
    check(emulator, [core], [0.9 * core.trace()], [30])


@pytest.mark.parametrize(("rank", "dtype"), [(128, torch.float32), (88, torch.float64)])
def test_the_greatest_rank(emulator, rank, dtype):
    core = make_core(rank, dtype)
    check(emulator, [core], [1.2 * core.trace()], [300])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_matrix_that_is_not_positive_definite(emulator, dtype):
    core = torch.diag(torch.tensor([1.0, -5.0, 1.0], dtype=dtype))
    trace = torch.tensor(3.0, dtype=dtype)
    (found,) = invert(emulator, [core], [trace], [10])
    for actual, sought in zip(found, reference.invert_core(core, trace, 10, DAMPING), strict=True):
        assert_near(actual, sought, SOLVE[dtype])


def test_more_shared_memory_than_a_device_has(emulator):
    core = make_core(400, torch.float32)
    with pytest.raises(EmulationError, match="too much shared memory"):
        invert(emulator, [core], [core.trace()], [500])
