"""Every kernel, dtype and configuration compiled for GPUs that need not be there."""

import collections
import itertools
from unittest import mock

import aot
import pytest
import torch
import triton
from test_backends import NORMALIZE, POWERS
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.roofline import model as roofline
from gls_fused.backends import triton as backend
from gls_fused.backends.triton import configs, symmetric
from gls_fused.capture.conv import ImageRows
from gls_fused.capture.linear import LinearRows
from gls_fused.capture.rows import SKETCH_ROWS
from gls_fused.reference import SubspaceInverse, Window

RANK = 32
# Sizes are multiples of 16, so that contiguous data is aligned. 8192 rows are cut in parts.
FEW, MANY, SIZE = 128, 8192, 1024
# 32-bit or narrower accesses that are not of a stream: (loads, stores) at most.
#   rows: lambda'.  sums over rows: of a block of them Y'Y, 1'Y and ||A||_F^2; those are added with
#   a lane for each element.
#   measures: growth of mean squares, which have a lane each; flag, step and the slow average.
#   roundings: seed and step.
#   updates: the step's counter and v, by the layer's last program.
#   tiles: the bias, its averages and U's last row, for which stores alone are counted; sums of rows
#   and columns have a lane each.
NARROW = {
    "_precondition_kernel": (1, 0),
    "_project_rows_kernel": (0, 9),
    "_sum_rows_kernel": (None, 2),
    "_measure_kernel": (19, 3),
    "_round_kernel": (2, 0),
    "_flat_update_kernel": (2, 2),
    "_walk_gradients_kernel": (None, 4),
    "_tile_update_kernel": (None, 4),
    "_blend_axes_kernel": (None, 4),
}


def make_inverse(dim, rank, by_columns=False):
    basis = torch.zeros(rank, dim).T if by_columns else torch.zeros(dim, rank)
    return SubspaceInverse(basis, torch.zeros(rank, rank), torch.ones(()))


def launch_products(dtype, rank, ones, by_columns=False):
    inverse = make_inverse(SIZE + ones, rank, by_columns)
    for n in (FEW, MANY):
        rows = torch.zeros(n, SIZE, dtype=dtype)
        backend.precondition_rows(rows, inverse, ones=ones)
        draw = torch.zeros((), dtype=torch.int64)
        backend.sum_rows(rows, inverse.basis, None, ones=ones, most=2048, draw=draw)
    if ones:
        backend.precondition_gradient(rows, rows[:, 0].clone(), inverse)


def launch_statistics(rank):
    for power in POWERS:
        backend.invert_core(torch.eye(rank), torch.ones(()), SIZE, 0.3, power)
        backend.invert_core(torch.eye(rank).double(), torch.ones(()).double(), SIZE, 0.3, power)
    core, sums = torch.eye(rank), torch.zeros(2 + rank * (rank + SIZE))
    backend.blend_subspace(
        torch.zeros(rank, SIZE).T, core, torch.ones(()), torch.ones(()), sums, 0.9
    )
    backend.refresh_subspace(core, torch.zeros(SIZE, rank))
    estimate = [
        torch.zeros(rank, SIZE).T,
        core,
        torch.ones(()),
        torch.ones(()),
        core,
        torch.ones(()),
    ]
    if backend.commits(estimate):
        for power, skip in zip(POWERS, (None, torch.tensor(False)) * 2, strict=True):
            options = {"beta": 0.9, "damping": 0.3, "power": power, "skip": skip}
            backend.commit_subspaces_([estimate], [sums], [[core]], **options)


def launch_measures():
    for dtype in (torch.float32, torch.bfloat16):
        weight, result = torch.zeros(SIZE, SIZE, dtype=dtype), torch.ones(())
        weights = [weight, weight], [result, result], [0.1, 0.2]
        # Of layers with a number for each output, and with one.
        squares, growths = [torch.zeros(SIZE), torch.zeros(())], [torch.ones(()) for _ in range(4)]
        steps = [torch.ones(())] * 2
        options = {"beta2": 0.95, "every": 10, "most": 2.0, "skip": torch.tensor(False)}
        backend.measure_layers_(*weights, squares, growths[:2], growths[2:], steps, **options)
        backend.measure_weights_(*weights)
        backend.measure_growths_(squares, growths[:2], growths[2:], steps, **options)


def launch_roundings():
    for dtype, kind in ((torch.bfloat16, torch.float32), (torch.float16, torch.float64)):
        param, value = torch.zeros(SIZE, SIZE, dtype=dtype), torch.zeros(SIZE, SIZE)
        backend.round_params_([param], [value], [1], [torch.ones((), dtype=kind)])


def launch_updates(
    dtype, rank, *, momentum=0.9, odd=False, by_columns=False, skip=None, rates=None
):
    state = torch.promote_types(dtype, torch.float32)
    shapes = [(SIZE, SIZE - odd), (SIZE,)]
    for normalize, walks in itertools.product(NORMALIZE, (True, False)):
        params = [torch.zeros(shape, dtype=dtype) for shape in shapes]
        averages = [torch.zeros(shape, dtype=state) for shape in shapes]
        lengths = {"rms": [()], "row": [SIZE], "factored": [SIZE, SIZE - odd + 1]}
        squares = [torch.zeros(length, dtype=state) for length in lengths.get(normalize, [])]
        for inverse in (None, make_inverse(SIZE - odd + 1, rank, by_columns)):
            with mock.patch.object(backend.update_plan, "walks_twice", return_value=walks):
                backend.update_layers_(
                    params,
                    params,
                    averages if momentum else [],
                    averages if normalize == "adam" else squares,
                    [torch.zeros(())],
                    [inverse],
                    layer_sizes=[2],
                    normalize=normalize,
                    lr=0.1,
                    momentum=momentum,
                    beta2=0.9,
                    eps=1e-8,
                    weight_decay=0.1,
                    skip=skip,
                    rates=rates,
                )


@pytest.fixture
def launches(monkeypatch):
    with aot.recorded(monkeypatch) as found:
        yield found


# Triton 3.6 keeps registers of three kernels in local memory on sm_90: up to 56 accesses of
# `_invert_core_kernel`, 45 of `_turn_kernel`, 6 of `_walk_gradients_kernel` in three terms of TF32.
MOST_SPILLS = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) else 56
# Where registers are left, ptxas keeps a few there across a loop that hardly needs them, for more
# warps at a time: 10 accesses of `_blend_gram_kernel` on sm_100, of some 1,500 instructions.
FEW_SPILLS = 0.01


def check(launches, target, folder, *, streams=False):
    """No spill for want of registers, no more shared memory than there is, tensor cores where TF32
    was asked for; with `streams`, wide accesses alone."""
    seen = set()
    for launch in launches:
        key = launch.key
        if key in seen:
            continue
        seen.add(key)
        compiled = aot.compile_launch(launch, aot.TARGETS[target])
        code = aot.read_hip(compiled) if target == "gfx942" else aot.read_cuda(compiled, folder)
        where = f"{launch.name} {launch.constants} on {target}"
        few = FEW_SPILLS * code.instructions if code.registers < 255 else 0
        assert code.spills <= max(MOST_SPILLS, few), where
        assert code.shared <= aot.SHARED_LIMIT[target], where
        assert 0 < code.registers <= (512 if target == "gfx942" else 255), where
        if code.tensor_cores is not None:
            claimed = launch.constants.get("PRECISION", "ieee") != "ieee"
            # Its operands are of 16 bits where nobody asked for float32.
            halves = launch.name == SYMMETRIC and launch.arguments["x"].dtype != torch.float32
            assert code.tensor_cores == (claimed or halves), where
        if streams and launch.name in NARROW:
            check_widths(code, launch, where)
    return seen


def check_widths(code, launch, where):
    loads, stores = NARROW[launch.name]
    found = {name: collections.Counter(bits) for name, bits in code.widths.items()}
    narrow_stores = sum(n for bits, n in found["STG"].items() if bits <= 32)
    assert narrow_stores <= stores, (where, found)
    read = found.get("LDG", collections.Counter()) + found.get("LDGSTS", collections.Counter())
    # The reduction's tiles and 16-bit rows of 64 columns may have 8 bytes to a thread.
    assert read[128] + read[64] > 0, (where, found)
    if loads is not None:
        assert sum(n for bits, n in read.items() if bits <= 32) <= loads, (where, found)


SYMMETRIC = "_symmetric_product_kernel"
QUICK = [("high", "sm_90")]
# A kernel takes seconds for each.
OTHERS = [pytest.param(target, marks=pytest.mark.slow) for target in ("sm_80", "sm_100")]
cuda = pytest.mark.parametrize("target", ["sm_90", *OTHERS])


@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_are_16_bytes_wide(launches, target, dtype, tmp_path):
    """Layers without a bias, whose rows are contiguous and aligned throughout."""
    launch_products(dtype, RANK, ones=False)
    launch_updates(dtype, RANK)
    launch_measures()
    launch_roundings()
    names = {launch.name for launch in launches}
    assert names >= NARROW.keys()
    check(launches, target, tmp_path, streams=True)


@pytest.mark.parametrize(
    ("precision", "target"),
    [
        pytest.param(name, target, marks=() if (name, target) in QUICK else pytest.mark.slow)
        for name in ("high", "medium")
        for target in ("sm_80", "sm_90", "sm_100")
    ],
)
def test_products_follow_the_precision_of_torch(launches, precision, target, tmp_path):
    """Those of rows and updates; the curvature's stay in float32."""
    torch.set_float32_matmul_precision(precision)
    try:
        launch_products(torch.float32, RANK, ones=False)
        launch_updates(torch.float32, RANK)
    finally:
        torch.set_float32_matmul_precision("highest")
    found = {
        (launch.name, launch.constants["PRECISION"])
        for launch in launches
        if "PRECISION" in launch.constants and launch.constants.get("FORMED", True)
    }
    chosen = {"high": "tf32x3", "medium": "tf32"}[precision]
    followers = (
        "_precondition_kernel",
        "_project_gradients_kernel",
        "_walk_gradients_kernel",
        "_tile_update_kernel",
    )
    curvature = ("_project_rows_kernel", "_sum_rows_kernel")
    assert found == {(name, chosen) for name in followers} | {(name, "ieee") for name in curvature}
    chosen = [launch for launch in launches if "PRECISION" in launch.constants]
    check(chosen, target, tmp_path, streams=True)


def test_newer_switch_of_torch_counts_as_high():
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    try:
        switch.fp32_precision = "tf32"
        assert configs.product_precision() == "tf32x3"
    finally:
        switch.fp32_precision = before
    assert configs.product_precision() == "ieee"


@cuda
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)]
)
def test_symmetric_products(launches, target, dtype, tmp_path):
    """Of a small and a large matrix, with and without an addend; tiles come by 16 bytes."""
    for size in (128, SIZE):
        symmetric.symmetric_product(torch.zeros(2, size, 4 * size, dtype=dtype))
        symmetric.symmetric_product(torch.zeros(2, size, size, dtype=dtype), 0.5, -2.0)
    assert [launch.constants["ADDS"] for launch in launches] == [False, True] * 2
    assert len({launch.constants["BLOCK"] for launch in launches}) == 1 + (dtype == torch.bfloat16)
    check(launches, target, tmp_path)
    for launch in launches:
        code = aot.read_cuda(aot.compile_launch(launch, aot.TARGETS[target]), tmp_path)
        read = code.widths.get("LDGSTS", []) + code.widths.get("LDG", [])
        assert read.count(128) >= 2, (target, launch.constants, code.widths)


@cuda
def test_statistics_fit(launches, target, tmp_path):
    launch_statistics(RANK)
    launch_statistics(configs.MAX_CORE_RANK)
    names = {"_blend_kernel", "_sweep_core_kernel"}
    assert {launch.name for launch in launches} >= names
    check(launches, target, tmp_path)


def test_updates_that_may_be_skipped(launches, tmp_path):
    """The flag is read ahead of all else; with bounds of lr too."""
    launch_updates(torch.float32, RANK, skip=torch.tensor(False), rates=torch.ones(1, 2))
    monitored = ("_flat_update_kernel", "_tile_update_kernel", "_blend_axes_kernel")
    chosen = [launch for launch in launches if launch.name in monitored]
    assert {launch.name for launch in chosen} == set(monitored)
    assert all(launch.constants["SKIPS"] for launch in chosen)
    check(chosen, "sm_90", tmp_path)


def test_the_last_program_of_a_layer_sees_what_the_others_wrote(launches):
    """All threads' writes come before the count, which releases and acquires them."""
    launch_updates(torch.float32, RANK)
    blending = [launch for launch in launches if launch.name == "_blend_axes_kernel"]
    summing = [launch for launch in launches if launch.constants.get("SUMS")]
    summing = [each for each in summing if each.constants["NORMALIZE"] in ("rms", "sgd")]
    assert {launch.name for launch in summing} == {"_flat_update_kernel", "_tile_update_kernel"}
    walking = [launch for launch in launches if launch.name == "_walk_gradients_kernel"]
    summing += [each for each in walking if each.constants["NORMALIZE"] in ("rms", "sgd")]
    counting = summing + blending
    assert blending
    for launch in counting:
        code = aot.compile_launch(launch, aot.TARGETS["sm_90"]).asm["ptx"]
        before, after = code.split("atom.global.gpu.acq_rel.add.u64")
        assert before.rindex("bar.sync") > before.rindex("st.global")
        assert after.index("bar.sync") < after.index("ld.global")


@cuda
@pytest.mark.slow
@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_configuration(launches, target, dtype, rank, tmp_path):
    for by_columns in (False, True):
        launch_products(dtype, rank, True, by_columns)
    for momentum in (0.0, 0.9):
        for odd in (False, True):
            launch_updates(dtype, rank, momentum=momentum, odd=odd, by_columns=not odd)
    launch_statistics(rank)
    check(launches, target, tmp_path)


@cuda
@pytest.mark.slow
def test_the_rest(launches, target, tmp_path):
    """float64, float16 at the usual rank, and layers with a bias."""
    launch_updates(torch.float64, RANK)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for by_columns in (False, True):
            launch_products(dtype, RANK, True, by_columns)
        launch_updates(dtype, RANK, odd=True)
        launch_updates(dtype, RANK, momentum=0.0, by_columns=True)
    check(launches, target, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_amd(launches, dtype, tmp_path):
    launch_products(dtype, RANK, ones=True)
    launch_updates(dtype, RANK)
    launch_statistics(RANK)
    check(launches, "gfx942", tmp_path)


@pytest.mark.skipif(torch.__version__ < "2.14", reason="triton 3.6 spills less of this tile")
def test_a_kernel_that_spills_is_seen(launches, tmp_path, monkeypatch):
    """The reading of the machine code itself: too few warps for the tile."""
    monkeypatch.setattr(backend.core, "core_warps", lambda *_: 1)
    backend.invert_core(torch.eye(64), torch.ones(()), SIZE, 0.3, 1)
    with pytest.raises(AssertionError, match="_invert_core_kernel"):
        check(launches, "sm_90", tmp_path)


def test_narrow_accesses_are_seen(launches, tmp_path):
    """Rows that begin at an odd element cannot be read 16 bytes at a time."""
    rows = torch.zeros(FEW, SIZE + 1)[:, 1:]
    backend.precondition_rows(rows, make_inverse(SIZE, RANK), ones=False)
    with pytest.raises(AssertionError, match="_precondition_kernel"):
        check(launches, "sm_90", tmp_path, streams=True)


class CountedOps(TorchDispatchMode):
    """Counts torch's ops that are launches on a GPU, those inside the backend's own ops too."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "gls_fused_triton":
            with self:
                return op._op_dk(torch._C.DispatchKey.CPU, *args)
        name = op._schema.name.removeprefix("aten::")
        self.count += not (op.is_view or name in ("empty", "new_empty", "_unsafe_view"))
        return op(*args, **(kwargs or {}))


def count_of_gathering(launches, rows, inputs):
    rows.backend, rows.ones, rows.statistics_dtype = backend, True, torch.float32
    rows.draw = torch.zeros((), dtype=torch.int64)
    # Which uploads the geometry of a convolution, for good.
    rows.gather(inputs)
    launches.clear()
    with CountedOps() as ops:
        rows.gather(inputs)
    return len(launches) + ops.count


@pytest.mark.parametrize("n", [128, 8192])
def test_roofline_counts_what_a_gathering_layer_launches(launches, n):
    rows = LinearRows()
    rows.test_matrix = torch.zeros(RANK, SIZE + 1).T
    count = count_of_gathering(launches, rows, torch.zeros(n, SIZE))
    assert count == roofline.sketch(n, SIZE).launches


def test_roofline_counts_what_a_gathering_convolution_launches(launches):
    images = ImageRows()
    images.window = Window((3, 3), (1, 1), (1, 1), (1, 1))
    images.test_matrix = torch.zeros(8, 4 * 9 + 1).T
    count = count_of_gathering(launches, images, torch.zeros(128, 4, 8, 8))
    assert count == roofline.sketch(SKETCH_ROWS, 4 * 9, 8).launches


@cuda
def test_sums_over_images(launches, target, tmp_path):
    """Of a line, too, and of sizes of 1, which Triton takes for constants."""
    window = Window((3, 3), (1, 1), (1, 1), (1, 1))
    options = {"ones": True, "most": 1024, "draw": torch.zeros((), dtype=torch.int64)}
    images = torch.zeros(128, 16, 32, 32)
    for rank in (16, 32, 64):
        basis = torch.zeros(rank, 16 * 9 + 1).T
        backend.sum_images(images, basis, None, window, groups=1, **options)
    images = images.to(memory_format=torch.channels_last)
    backend.sum_images(images, basis[:, :1], None, window, groups=1, **{**options, "most": 1})
    window = Window((1,), (1,), (0,), (1,))
    backend.sum_images(torch.zeros(1, 1, 1), torch.zeros(2, 1), None, window, groups=1, **options)
    backend.sum_rows(torch.zeros(3, 1), torch.zeros(2, 1), None, **{**options, "most": 1})
    check(launches, target, tmp_path)
