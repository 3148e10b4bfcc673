"""round.cuh, emulated, against gls_fused.reference."""

import pytest
import torch
from cuda_emulation.emulator import Emulator

from gls_fused import reference

DTYPES = {torch.bfloat16: 2, torch.float16: 3}
# Less than 16 bytes, a block and its edge, several blocks.
SIZES = [5, 2048, 2047, 5000]


@pytest.fixture(scope="module")
def emulator():
    return Emulator("drivers/round.cpp", ["round_kernels.cu"])


@pytest.mark.parametrize("step_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_as_the_reference(emulator, dtype, offset, step_dtype):
    """All at once, at 16 bytes and beside them."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(size, generator=generator) * 1e-3 for size in SIZES]
    values[0][:] = torch.tensor([torch.nan, torch.inf, -3.4e38, 1e-41, -0.0])
    seeds, steps = [1, 7, 2**32 - 1, 7], [torch.tensor(3.0 + i, dtype=step_dtype) for i in range(4)]

    def run(memory):
        emulator.call("start_rounding")
        written = []
        for i, value in enumerate(values):
            written.append(memory.poison(f"param {i}", (len(value),), dtype, offset=offset))
            emulator.call(
                "add_rounded", written[-1], memory.copy(f"values {i}", value, offset=offset),
                memory.copy(f"step {i}", steps[i]), len(value), seeds[i],
                step_dtype == torch.float64,
            )  # fmt: skip
        emulator.call("round_params", DTYPES[dtype])
        return written

    expected = [torch.empty(size, dtype=dtype) for size in SIZES]
    reference.round_params_(expected, values, seeds, steps)
    for found, sought in zip(emulator.run_in_every_order(run), expected, strict=True):
        assert found[~found.isnan()].equal(sought[~sought.isnan()])
        assert found.isnan().equal(sought.isnan())
