"""The emulator itself, by sample kernels whose results are known without it."""

import ctypes
import math

import pytest
import torch
from cuda_emulation.emulator import ORDERS, VARIANT, EmulationError, Emulator, Moved
from tolerances import PRODUCT, assert_near

traced = pytest.mark.skipif(VARIANT != "traced", reason="the sanitized build traces nothing")
float32 = torch.float32


@pytest.fixture(scope="module")
def samples():
    return Emulator("samples/driver.cpp")


def draw(*shape, dtype=float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


# ---- threads and blocks -------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 4, 255, 256, 257, 1001])
def test_vectors_and_the_rest(samples, n):
    x, y = draw(n), draw(n).flip(0)

    def run(memory):
        z = memory.poison("z", (n,), float32)
        samples.call("add", memory.copy("x", x), memory.copy("y", y), z, n)
        return (z,)

    assert torch.equal(*samples.run_in_every_order(run), x + y)


@pytest.mark.parametrize(("n", "blocks"), [(1, 1), (95, 1), (1000, 3)])
def test_sum_over_warps(samples, n, blocks):
    x = draw(n)

    def run(memory):
        sums = memory.poison("sums", (blocks,), float32)
        samples.call("sum", memory.copy("x", x), sums, n, blocks)
        return (sums,)

    (sums,) = samples.run_in_every_order(run)
    assert_near(sums.sum(), x.sum(), PRODUCT[float32])


@pytest.mark.parametrize("blocks", [1, 5])
def test_the_last_block_sees_what_others_fenced(samples, order, blocks):
    x = draw(100)
    with samples.memory() as memory, samples.order(order):
        partial = memory.poison("partial", (blocks,), float32)
        finished = memory.copy("finished", torch.zeros(1, dtype=torch.int32), writable=True)
        total = memory.poison("total", (), float32)
        arguments = (memory.copy("x", x), partial, finished, total, len(x), blocks)
        samples.call("sum_once", *arguments)
        assert_near(total.read(), x.sum(), PRODUCT[float32])
        assert finished.read() == 0


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (8, 8, 8), (13, 9, 21)])
def test_tiles_in_dynamic_shared_memory(samples, m, n, k):
    a, b = draw(m, k), draw(k, n)

    def run(memory):
        c = memory.poison("c", (m, n), float32)
        samples.call("multiply", memory.copy("a", a), memory.copy("b", b), c, m, n, k)
        return (c,)

    assert_near(*samples.run_in_every_order(run), a @ b, PRODUCT[float32])


def test_rotation_ordered_by_a_warp_barrier(samples):
    x = torch.arange(64, dtype=torch.int32)

    def run(memory):
        y = memory.copy("y", torch.zeros_like(x), writable=True)
        samples.call("rotate", memory.copy("x", x), y)
        return (y,)

    expected = x.view(2, 32).roll(-1, dims=1).flatten()
    assert torch.equal(*samples.run_in_every_order(run), expected)


# ---- warps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("votes", [0, 0xFFFFFFFF, 0x80010002])
def test_votes_and_shuffles(samples, votes):
    def run(memory):
        results = memory.copy("results", torch.zeros(32, 7, dtype=torch.int32), writable=True)
        samples.call("use_warp", ctypes.c_uint32(votes), results)
        return (results,)

    (found,) = samples.run_in_every_order(run)
    lane = torch.arange(32)
    expected = [
        torch.full((32,), votes),
        torch.where(lane % 16 < 3, lane, lane - 3),
        torch.where(lane % 16 > 12, lane, lane + 3),
        lane ^ 5,
        lane // 8 * 8 + 1,
        torch.full((32,), int(votes != 0)),
        torch.full((32,), int(votes == 0xFFFFFFFF)),
    ]
    assert torch.equal(found, torch.stack(expected, dim=1).to(torch.int32))


@pytest.mark.parametrize(
    ("code", "dtype"), [(0, torch.bfloat16), (1, torch.float16), (2, torch.float32)]
)
def test_tensor_cores(samples, code, dtype):
    n, k = 32, 48
    a, b = draw(16, k, dtype=dtype), draw(n, k, dtype=dtype).flip(0)
    if dtype == torch.float32:  # what tf32 leaves of it
        a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))

    def run(memory):
        c = memory.poison("c", (16, n), float32)
        arguments = (memory.copy("a", a), memory.copy("b", b), c, n, k)
        samples.call("multiply_on_tensor_cores", code, *arguments)
        return (c,)

    expected = a.double() @ b.double().T
    assert_near(*samples.run_in_every_order(run), expected, PRODUCT[float32])


# ---- conversions --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_widens_and_comes_back(samples, dtype):
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    half = dtype == torch.float16
    with samples.memory() as memory:
        wide = memory.poison("wide", numbers.shape, float32)
        samples.call("convert", half, True, memory.copy("numbers", numbers), wide, len(numbers))
        back = memory.poison("back", numbers.shape, dtype)
        samples.call("convert", half, False, memory.copy("x", wide.read()), back, len(numbers))
        nan = numbers.isnan()
        assert torch.equal(wide.read()[~nan], numbers.float()[~nan])
        assert torch.equal(back.read()[~nan].view(torch.int16), numbers[~nan].view(torch.int16))
        assert wide.read()[nan].isnan().all()
        assert back.read()[nan].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_to_nearest_even(samples, dtype):
    numbers = torch.arange(-(2**15), 2**15 - 1).to(torch.int16).view(dtype).float()
    upward = torch.nextafter(numbers, torch.tensor(math.inf))
    between = (numbers[:-1].double() + numbers[1:].double()).div(2).float()
    x = torch.cat([numbers, upward, between])
    x = x[x.isfinite()]
    with samples.memory() as memory:
        found = memory.poison("found", x.shape, dtype)
        samples.call("convert", dtype == torch.float16, False, memory.copy("x", x), found, len(x))
        assert torch.equal(found.read().view(torch.int16), x.to(dtype).view(torch.int16))


# ---- what is watched ----------------------------------------------------------------------------


@traced
@pytest.mark.parametrize("n", [256, 1001])
def test_bytes_are_counted(samples, n):
    with samples.memory() as memory, samples.traffic() as moved:
        x, y = memory.copy("x", draw(n)), memory.copy("y", draw(n))
        samples.call("add", x, y, memory.poison("z", (n,), float32), n)
    assert moved == {
        "add_kernel": {"x": Moved(4 * n, 0), "y": Moved(4 * n, 0), "z": Moved(0, 4 * n)}
    }


@traced
def test_bytes_of_tiles_are_counted(samples):
    m, n, k, tile = 13, 9, 21, 8
    with samples.memory() as memory, samples.traffic() as moved:
        a, b = memory.copy("a", draw(m, k)), memory.copy("b", draw(k, n))
        samples.call("multiply", a, b, memory.poison("c", (m, n), float32), m, n, k)
    rows, columns = math.ceil(m / tile), math.ceil(n / tile)
    expected = {
        "a": Moved(4 * m * k * columns, 0),
        "b": Moved(4 * k * n * rows, 0),
        "c": Moved(0, 4 * m * n),
    }
    assert moved == {"multiply_kernel<8>": expected}


@traced
def test_inputs_are_read_only(samples):
    with samples.memory() as memory:
        x = memory.copy("x", draw(8))
        with pytest.raises(
            EmulationError, match=r"add_kernel, block \(0, 0, 0\), thread .*: writes to x"
        ):
            samples.call("add", x, x, x, 8)


@pytest.mark.parametrize("order", ORDERS)
def test_a_failed_launch_leaves_the_next_one_alone(samples, order):
    x = draw(300)
    with samples.memory() as memory, samples.order(order):
        if VARIANT == "traced":
            with pytest.raises(EmulationError, match="out of bounds"):
                samples.call("sum", memory.copy("x", x), memory.poison("y", (2,), float32), 301, 3)
        sums = memory.poison("sums", (3,), float32)
        samples.call("sum", memory.copy("x", x), sums, 300, 3)
        assert_near(sums.read().sum(), x.sum(), PRODUCT[float32])


@pytest.mark.parametrize("blocks", [0, -1])
def test_a_launch_that_a_device_would_refuse(samples, blocks):
    with samples.memory() as memory:
        x = memory.copy("x", draw(4))
        with pytest.raises(EmulationError, match=r"sum_kernel<96>: grid .*: expected 1 to"):
            samples.call("sum", x, memory.poison("y", (1,), float32), 4, blocks)
