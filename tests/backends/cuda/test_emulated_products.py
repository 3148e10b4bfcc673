"""product.cuh, rows.cuh and sketch.cuh, emulated, against gls_fused.reference in float64."""

import pytest
import torch
from cuda_emulation.emulator import VARIANT, Emulator
from tolerances import PRODUCT, assert_near

from gls_fused import reference
from gls_fused.reference import SubspaceInverse

DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
ABSENT, ONES, COLUMN = 0, 1, 2
# Rows, columns, rank: one, edges of tiles on both sides, several parts of the columns, no rows or
# columns, the greatest rank.
SHAPES = [
    (1, 1, 1),
    (32, 64, 32),
    (33, 65, 9),
    (67, 136, 17),
    (5, 1100, 33),
    (0, 8, 3),
    (3, 0, 1),
    (70, 128, 64),
]
# float16 differs from bfloat16 in its conversions alone.
CASES = [(dtype, shape) for dtype in (torch.float32, torch.bfloat16) for shape in SHAPES]
CASES += [(torch.float16, (33, 65, 9)), (torch.float16, (67, 136, 17))]


@pytest.fixture(scope="module")
def emulator():
    return Emulator("drivers/products.cpp", ["rows_kernels.cu", "sketch_kernels.cu"])


def draw(*shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def make_inverse(dim, rank):
    basis = torch.linalg.qr(draw(dim, rank, dtype=torch.float64))[0]
    root = draw(rank, rank, dtype=torch.float64, seed=1)
    core = root @ root.T
    exact = (basis, *reference.invert_core(core, 2 * core.trace(), dim, 0.3, 1))
    return SubspaceInverse(*(x.float() for x in exact))


def precondition(emulator, kind, x, last, inverse, *, pitch=None, misaligned=None):
    """The product [n, size] and its last column [n]; rows of x are `pitch` apart."""
    dtype, (n, size), rank = x.dtype, x.shape, inverse.basis.shape[1]
    spaced = torch.full((n, pitch or size), torch.nan, dtype=dtype)
    spaced[:, :size] = x

    def run(memory):
        output = memory.poison("output", (n, size), dtype, offset=int(misaligned == "output"))
        output_last = memory.poison("output_last", (n,), dtype)
        emulator.call(
            "precondition", DTYPES[dtype], kind,
            memory.copy("x", spaced, offset=int(misaligned == "x")),
            memory.copy("last", last) if last is not None else None,
            memory.copy("basis", inverse.basis.T), memory.copy("core", inverse.core_inverse),
            memory.copy("shift", inverse.shift),
            memory.poison("parts", (64, n, rank), torch.float32), output, output_last, n, size,
            spaced.shape[1], rank,
        )  # fmt: skip
        return (output,) if kind == ABSENT else (output, output_last)

    return emulator.run_in_every_order(run)


def check(emulator, dtype, shape, kind, **options):
    n, size, rank = shape
    dim = size + (kind != ABSENT)
    inverse = make_inverse(dim, min(rank, dim))
    x = draw(n, size, dtype=dtype)
    last = draw(n, dtype=dtype, seed=2) if kind == COLUMN else None
    found = precondition(emulator, kind, x, last, inverse, **options)
    exact = SubspaceInverse(*(part.double() for part in inverse))
    if kind == COLUMN:
        expected = reference.precondition_gradient(x.double(), last.double(), exact)
    else:
        expected = reference.precondition_rows(x.double(), exact, ones=kind == ONES)
    for actual, sought in zip(found, expected, strict=False):
        assert_near(actual, sought, PRODUCT[dtype])


@pytest.mark.parametrize("kind", [ABSENT, ONES, COLUMN])
@pytest.mark.parametrize(("dtype", "shape"), CASES)
def test_precondition(emulator, dtype, shape, kind):
    if kind == ABSENT and shape[1] == 0:
        return
    check(emulator, dtype, shape, kind)


@pytest.mark.parametrize("options", [{"misaligned": "x"}, {"misaligned": "output"}, {"pitch": 83}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_no_multiple_of_16_bytes(emulator, dtype, options):
    check(emulator, dtype, (35, 72, 5), ONES, **options)


SKETCHES = [(*case, ones) for case in CASES for ones in (True, False)]


# The last one has more rows than 128 parts of 32.
@pytest.mark.parametrize(
    ("dtype", "shape", "with_ones"), [*SKETCHES, (torch.float32, (4100, 12, 5), True)]
)
def test_sketch(emulator, dtype, shape, with_ones):
    n, size, rank = shape
    dim = size + with_ones
    if dim == 0:
        return
    rank = min(rank, dim)
    rows, basis = draw(n, size, dtype=dtype), make_inverse(dim, rank).basis

    def run(memory):
        projected = memory.poison("projected", (n, rank), torch.float32)
        core = memory.poison("core", (rank, rank), torch.float32)
        last = memory.poison("last", (rank,), torch.float32)
        trace = memory.poison("trace", (), torch.float32)
        emulator.call(
            "sketch", DTYPES[dtype], memory.copy("rows", rows), memory.copy("basis", basis.T),
            memory.poison("parts", (64, n, rank), torch.float32), projected,
            memory.poison("squares", (64 * (n // 32 + 1),), torch.float64),
            memory.poison("gram_parts", (128, rank * rank + rank), torch.float32), core,
            last if with_ones else None, trace, n, size, size, rank,
        )  # fmt: skip
        return (projected, core, trace, last) if with_ones else (projected, core, trace)

    projected, core, trace, *last = emulator.run_in_every_order(run)
    wide = rows.double()
    wide = reference.append_ones(wide) if with_ones else wide
    exact = basis.double()
    expected_core, expected_sketch, expected_trace = reference.sketch_rows(wide, exact, ones=False)
    assert_near(projected, wide @ exact, PRODUCT[torch.float32])
    assert_near(core, expected_core, PRODUCT[torch.float32])
    assert_near(trace, expected_trace, PRODUCT[torch.float32])
    for found in last:  # the last row of A'Y
        assert_near(found, expected_sketch[-1], PRODUCT[torch.float32])


@pytest.mark.parametrize("with_ones", [False, True])
@pytest.mark.parametrize("value", [0.5, torch.nan, torch.inf, 1e20, 0.0])
def test_sums_are_added_where_they_are_usable(emulator, value, with_ones):
    """Not of rows that hold a NaN or an infinity, overflow, or are all zero."""
    rank = 9
    for n, size in ((40, 33), (3, 1100)):
        rows = draw(n, size, dtype=torch.float32)
        rows[2, 1] = value
        if value == 0:
            rows.zero_()
        basis = make_inverse(size + with_ones, rank).basis
        core, sketch, trace = reference.sketch_rows(rows.double(), basis.double(), ones=with_ones)
        fresh = [torch.tensor([n, trace]), core.flatten(), sketch.T.flatten()]
        sums = draw(2 + rank * (rank + size + with_ones), dtype=torch.float32, seed=1)
        transposed = sketch.T.float()
        if with_ones:
            # Nobody has written it.
            transposed[:, -1] = torch.nan

        def run(memory, n=n, size=size, rows=rows, basis=basis, sums=sums, transposed=transposed):
            result = memory.copy("sums", sums, writable=True)
            emulator.call(
                "add_sketch", memory.copy("rows", rows), with_ones, memory.copy("basis", basis.T),
                memory.copy("transposed", transposed),
                memory.poison("parts", (64, n, rank), torch.float32),
                memory.poison("projected", (n, rank), torch.float32),
                memory.poison("squares", (64 * (n // 32 + 1),), torch.float64),
                memory.poison("gram_parts", (128, rank * rank + rank), torch.float32), result, n,
                size, rank,
            )  # fmt: skip
            return (result,)

        (found,) = emulator.run_in_every_order(run)
        # The column of ones makes the zeros' sums those of other rows.
        if value == 0.5 or (value == 0 and with_ones):
            assert_near(found, sums.double() + torch.cat(fresh), PRODUCT[torch.float32])
        else:
            assert torch.equal(found, sums)


@pytest.mark.skipif(VARIANT != "traced", reason="the sanitized build traces nothing")
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_per_element(emulator, dtype):
    n, size = 64, 512
    x = draw(n, size, dtype=dtype)
    with emulator.traffic() as moved:
        precondition(emulator, ONES, x, None, make_inverse(size + 1, 8))
    total = sum(
        sum(bytes_) for buffers in moved.values() for name, bytes_ in buffers.items()
        if name in ("x", "output")
    )  # fmt: skip
    # X twice and the output once, in each of four orders.
    assert total == 4 * 3 * x.nbytes
