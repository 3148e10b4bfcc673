"""Kernels with one fault each are caught, and pass once the fault is mended."""

import pytest
import torch
from cuda_emulation.emulator import EmulationError, Emulator

N = 119  # neither a multiple of 4 nor of a warp
FAULTS = {
    "out_of_bounds": r"thread \(29, 0, 0\): out of bounds: .* of 16 bytes at byte 464 of .,"
    " which has 476",
    "out_of_shared": r"thread \(31, 0, 0\): out of bounds: past the end of dynamic shared memory",
    "out_of_array": r"thread \(31, 0, 0\): index outside an array in broken.cuh:\d+",
    "misaligned": r"thread \(0, 0, 0\): misaligned access in broken.cuh:\d+",
    "missing_barrier": "race: .* of shared memory after a .* by another thread of the block",
    "missing_warp_barrier": "race: .* of shared memory after a .* by another thread of the block",
    "missing_second_barrier": "race: .* of shared memory after .*",
    "early_write": "race: write of shared memory after a read by another thread of the block",
    "early_write_for_all": "race: write of shared memory after reads by several warps",
    "divergent_barrier": r"block \(0, 0, 0\): divergent barrier: thread \(0, 0, 0\) waits at"
    r" __syncthreads of broken.cuh:\d+, thread \(127, 0, 0\) has exited",
    "two_barriers": r"divergent barrier: waits at __syncthreads of broken.cuh:\d+, thread \(\d+, 0,"
    r" 0\) at __syncthreads of broken.cuh:\d+",
    "divergent_shuffle": r"divergent warp: .* waits at __shfl_xor_sync of broken.cuh:\d+",
    "racing_blocks": "race: .* of y after a write by another block",
    "overwriting_blocks": "race: write of y after a read by another block",
}


@pytest.fixture(scope="module")
def broken():
    return Emulator("broken/driver.cpp", variant="traced")


def run(broken, memory, name, mended):
    n = N if name in ("out_of_bounds", "divergent_barrier") else 128
    x = memory.copy("x", torch.arange(n).float())
    y = memory.copy("y", torch.zeros(n), writable=True)
    broken.call("run_kernel", name.encode(), mended, x, y, n)
    return (y,)


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught_in_every_order(broken, order, name):
    with broken.memory() as memory, broken.order(order), pytest.raises(EmulationError) as caught:
        run(broken, memory, name, False)
    assert str(caught.value).startswith(f"{name}_kernel<false>, block")
    if order == "forward":
        caught.match(FAULTS[name])


@pytest.mark.parametrize("name", FAULTS)
def test_mended_kernel_passes_in_every_order(broken, name):
    (y,) = broken.run_in_every_order(lambda memory: run(broken, memory, name, True))
    assert (y != 0).any()
