"""The kernels of update_layers_, emulated, against gls_fused.reference in float64."""

import ctypes
import re
from dataclasses import dataclass

import pytest
import torch
from cuda_emulation import build
from cuda_emulation.emulator import VARIANT, Emulator
from tolerances import PRODUCT, assert_near

from gls_fused import reference
from gls_fused.reference import SubspaceInverse

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# What the layer is scaled with: csrc/cuda/update.h.
NORMALIZE = {"rms": 1, "row": 3, "factored": 4, "adam": 0, "sgd": 2, "none": 0}
# One v for each row, or c for each column.
AXIS = ("row", "factored")
# The others differ in what is read and written alone.
MOMENTA = [pytest.param(0.0, marks=pytest.mark.slow), 0.8]
SLOW_DOUBLE, SLOW_BFLOAT16 = (
    pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float64, torch.bfloat16)
)
OPTIONS = {"lr": 0.3, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.2}
# Weight, whether there is a bias, rank of the inverse (None: the direction is given; these come
# first). 16-byte rows and others, several chunks and tiles, several parts of T, one element, none.
LAYERS = [
    ((3, 5), True, None),
    ((70, 64), False, None),
    ((1, 1), True, None),
    ((0, 4), False, None),
    ((67, 136), True, 9),
    ((5, 33), True, 3),
    ((1, 8), False, 1),
    ((3, 520), True, 2),
]
# Rows and columns alone, none of either, several tiles of both, several blocks of v and parts of T,
# a bias that takes no step (None), an inverse of rank 0.
AXES = [
    ((1, 7), True, None),
    ((9, 1), True, None),
    ((4, 0), True, None),
    ((0, 5), True, None),
    ((70, 264), None, None),
    ((131, 77), True, None),
    ((5, 6), True, 0),
    ((1, 1), True, 2),
    ((67, 264), None, 3),
    ((257, 3), True, 2),
    ((2, 518), False, 2),
]


@pytest.fixture(scope="module")
def emulator():
    return Emulator(
        "drivers/update.cpp",
        [
            "update_kernels.cu",
            "rows_kernels.cu",
            "tile_update_kernels.cu",
            "axis_update_kernels.cu",
        ],
    )


@dataclass
class Layer:
    params: list
    gradients: list
    exp_avgs: list
    # One per layer for "rms" and "row", two for "factored", one per parameter for "adam".
    exp_avg_sqs: list
    step: torch.Tensor
    inverse: SubspaceInverse | None
    rates: torch.Tensor | None = None


def draw(*shape, dtype):
    return torch.randn(shape, dtype=torch.float64, generator=GENERATOR).to(dtype)


GENERATOR = torch.Generator()


def make_layers(layers, dtype, normalize, momentum):
    GENERATOR.manual_seed(0)
    state = torch.promote_types(dtype, torch.float32)
    made = []
    for weight, bias, rank in layers:
        shapes = [weight, weight[:1]] if bias else [weight]
        dim = weight[1] + bool(bias)
        # A bias that takes no step has its column all the same.
        columns = (weight[1] + (bias is not False),)
        sizes = {
            "rms": [()], "row": [weight[:1]], "factored": [weight[:1], columns], "adam": shapes,
        }.get(normalize, [])  # fmt: skip
        inverse = None
        if rank is not None:
            basis = torch.linalg.qr(draw(dim, rank, dtype=torch.float64))[0]
            root = draw(rank, rank, dtype=torch.float64)
            core = root @ root.T
            exact = (basis, *reference.invert_core(core, 2 * core.trace() + 1, dim, 0.3, 1))
            inverse = SubspaceInverse(*(x.to(state) for x in exact))
        made.append(
            Layer(
                [draw(*s, dtype=dtype) for s in shapes],
                [draw(*s, dtype=dtype) for s in shapes],
                [draw(*s, dtype=state) for s in shapes] if momentum else [],
                [draw(*s, dtype=state).square() for s in sizes],
                torch.tensor(3.0),
                inverse,
            )
        )
    return made


def update_by_reference(layers, normalize, momentum, scale=1.0, **options):
    """In float64: params, exp_avgs, exp_avg_sqs, steps afterwards."""

    def flat(name):
        return [x.double().clone() for layer in layers for x in getattr(layer, name)]

    params, averages, squares = flat("params"), flat("exp_avgs"), flat("exp_avg_sqs")
    steps = [layer.step.double().clone() for layer in layers]
    inverses = [x.inverse and SubspaceInverse(*(y.double() for y in x.inverse)) for x in layers]
    rates = [x.rates.double() for x in layers if x.rates is not None]
    reference.update_layers_(
        params, [g * scale for g in flat("gradients")], averages, squares, steps, inverses,
        layer_sizes=[len(layer.params) for layer in layers], normalize=normalize,
        rates=torch.stack(rates) if rates else None,
        momentum=momentum, **{**OPTIONS, **options},
    )  # fmt: skip
    return params, averages, squares, steps


def update_in(emulator, memory, layers, normalize, momentum, *, misaligned=None, grad_scale=None,
              found_inf=None, lr=None):  # fmt: skip
    """The same buffers, in the same order as `update_by_reference`."""
    dtype = layers[0].params[0].dtype
    emulator.call("start_update", DTYPES[dtype])
    params, averages, squares, steps = [], [], [], []

    def place(name, tensor, **options):
        return memory.copy(name, tensor, offset=int(name == misaligned), **options)

    for layer in layers:
        mine = [place("param", p, writable=True) for p in layer.params]
        gradients = [place("gradient", g) for g in layer.gradients]
        m = [place("exp_avg", x, writable=True) for x in layer.exp_avgs]
        v = [place("exp_avg_sq", x, writable=True) for x in layer.exp_avg_sqs]
        step = memory.copy("step", layer.step, writable=True)
        rates = None if layer.rates is None else memory.copy("rates", layer.rates)
        emulator.call("add_layer", step, v[0] if normalize == "rms" else None, rates)
        per_param = v if normalize == "adam" else [None] * len(mine)
        arrays = list(zip(mine, gradients, m or [None] * len(mine), per_param, strict=True))
        tiled = layer.inverse is not None or normalize in AXIS
        if not tiled:
            for p, (param, gradient, average, square) in zip(layer.params, arrays, strict=True):
                emulator.call("add_flat", param, gradient, gradient, average, square, p.numel())
        else:
            n, size = layer.params[0].shape
            rank, inverse, scratch = 0, [None] * 3, [None]
            if layer.inverse is not None:
                rank = layer.inverse.basis.shape[1]
                inverse = [
                    memory.copy("basis", layer.inverse.basis.T),
                    memory.copy("core_inverse", layer.inverse.core_inverse),
                    memory.copy("shift", layer.inverse.shift),
                ]
                scratch = [memory.poison("parts", (64, n, rank), torch.float32)]
            arrays += [(None,) * 4] * (2 - len(arrays))
            if normalize in AXIS:
                arrays = [array[:3] for array in arrays]
                inverse = [*v, *[None] * (2 - len(v)), *inverse]
            function = "add_axes" if normalize in AXIS else "add_tiles"
            emulator.call(function, *arrays[0], *arrays[1], *inverse, *scratch, n, size, rank)
        params += mine
        averages += m
        squares += v
        steps.append(step)
    squares_count, axis_count = ctypes.c_int64(), ctypes.c_int64()
    emulator.call("count_sums", ctypes.byref(squares_count), ctypes.byref(axis_count))
    rates = [layer.rates for layer in layers if layer.rates is not None]
    emulator.call(
        "run_update", NORMALIZE[normalize], OPTIONS["lr"] if lr is None else 0.0,
        None if lr is None else memory.copy("lr", lr), lr is not None and lr.dtype != torch.float32,
        bool(rates) and rates[0].dtype == torch.float64, dtype == torch.float64,
        None if grad_scale is None else memory.copy("grad_scale", grad_scale),
        None if found_inf is None else memory.copy("found_inf", found_inf), float(momentum),
        OPTIONS["beta2"], OPTIONS["eps"], OPTIONS["weight_decay"],
        memory.poison("squares", (squares_count.value, 2), torch.float64),
        memory.poison("axis_sums", (axis_count.value,), torch.promote_types(dtype, torch.float32)),
        memory.poison("layer_steps", (len(layers), 5), torch.float64),
    )  # fmt: skip
    return params, averages, squares, steps


def assert_updated(found, expected, dtype):
    state = torch.promote_types(dtype, torch.float32)
    for group, wanted, kind in zip(found, expected, (dtype, state, state, state), strict=True):
        assert len(group) == len(wanted)
        for actual, sought in zip(group, wanted, strict=True):
            assert_near(actual, sought, PRODUCT[kind])


def check(emulator, layers, normalize, momentum, **options):
    dtype = layers[0].params[0].dtype
    counts = []

    def run(memory):
        groups = update_in(emulator, memory, layers, normalize, momentum, **options)
        counts[:] = [len(group) for group in groups]
        return [buffer for group in groups for buffer in group]

    results = list(emulator.run_in_every_order(run))
    found = [[results.pop(0) for _ in range(count)] for count in counts]
    lr = {} if options.get("lr") is None else {"lr": options["lr"].double()}
    scale = 1 / float(options.get("grad_scale", torch.ones(())))
    assert_updated(found, update_by_reference(layers, normalize, momentum, scale, **lr), dtype)


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_update(emulator, dtype, normalize, momentum):
    # In float64, D is formed by torch's products.
    layers = [x for x in LAYERS if x[2] is None or dtype != torch.float64]
    check(emulator, make_layers(layers, dtype, normalize, momentum), normalize, momentum)


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("normalize", AXIS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_columns(emulator, dtype, normalize, momentum):
    layers = [x for x in AXES if x[2] is None or dtype != torch.float64]
    if normalize == "row":
        layers.append(((4, 0), False, None))
    check(emulator, make_layers(layers, dtype, normalize, momentum), normalize, momentum)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("normalize", AXIS)
def test_a_scale_of_nothing(emulator, normalize, rank):
    """Of zeros alone the scale is that of a zero."""
    layers = make_layers([((6, 8), True, rank)], torch.float32, normalize, 0.0)
    for tensor in (*layers[0].gradients, *layers[0].exp_avg_sqs):
        tensor.zero_()
    check(emulator, layers, normalize, 0.0)


@pytest.mark.parametrize("normalize", AXIS)
def test_a_column_that_is_not_finite(emulator, normalize):
    layers = make_layers([((6, 8), True, None)], torch.float32, normalize, 0.8)
    layers[0].gradients[0][2, 3] = float("nan")
    with emulator.memory() as memory:
        found = update_in(emulator, memory, layers, normalize, 0.8)
        expected = update_by_reference(layers, normalize, 0.8)
        for actual, sought in zip(found[0] + found[2], expected[0] + expected[2], strict=True):
            assert torch.equal(actual.read().isnan(), sought.isnan())


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("dtype", [torch.float32, SLOW_DOUBLE])
def test_a_bound_and_a_growth_of_each_layers_rate(emulator, dtype, normalize, momentum):
    """Bounds below the rate that has grown, and above it; the decay is lr's."""
    layers = make_layers(LAYERS, torch.float32, normalize, momentum)
    for index, layer in enumerate(layers):
        layer.rates = torch.tensor([0.1 * (index + 1), 1 + 0.1 * index], dtype=dtype)
    options = {} if momentum else {"lr": torch.tensor(0.25, dtype=dtype)}
    check(emulator, layers, normalize, momentum, **options)


@pytest.mark.parametrize("normalize", ["rms", *AXIS])
@pytest.mark.parametrize("name", ["param", "gradient", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("dtype", [torch.float32, SLOW_BFLOAT16])
def test_an_address_that_is_no_multiple_of_16_bytes(emulator, dtype, name, normalize):
    layers = make_layers(LAYERS, dtype, normalize, 0.8)
    check(emulator, layers, normalize, 0.8, misaligned=name)


@pytest.mark.parametrize("normalize", ["sgd", *AXIS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_learning_rate_and_loss_scale_in_device_memory(emulator, dtype, normalize):
    layers = make_layers(LAYERS, torch.float32, normalize, 0.8)
    options = {"lr": torch.tensor(0.7, dtype=dtype), "grad_scale": torch.tensor(8.0)}
    check(emulator, layers, normalize, 0.8, **options)


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_a_step_that_is_not_taken(emulator, normalize):
    layers = make_layers(LAYERS, torch.float32, normalize, 0.8)
    with emulator.memory() as memory:
        found = update_in(
            emulator, memory, layers, normalize, 0.8, found_inf=torch.ones(()),
            grad_scale=torch.tensor(2.0),
        )  # fmt: skip
        names = ("params", "exp_avgs", "exp_avg_sqs")
        for group, name in zip(found, names, strict=False):
            before = [x for layer in layers for x in getattr(layer, name)]
            assert all(torch.equal(a.read(), b) for a, b in zip(group, before, strict=True))
        assert all(step.read() == 3 for step in found[3])


# ---- more than tables hold, in 4 KiB: 69 parameters, 80 layers, 26 with tiles; 24 with scales of
# rows and columns, 48 of them to be blended

# The first has no bias, so that the last of a table is a weight whose bias is in the next.
PARAMETERS = [((70, 64), False, None), *(((i % 3 + 5, i % 7 + 1), True, None) for i in range(35))]
# Rows of 16 bytes and others in turn; several tiles in the last of each.
TILED = [((i % 4 + 5, 8 - i % 2), i % 3 > 0, 2) for i in range(60)]
TILED += [((70, 136), True, 3), ((67, 133), True, 3)]


@pytest.mark.parametrize(
    ("layers", "normalize"),
    [
        pytest.param(PARAMETERS, "sgd", id="71 parameters"),
        pytest.param([((i % 2 + 3, 3), False, None) for i in range(90)], "rms", id="90 layers"),
        pytest.param([*PARAMETERS, *TILED], "rms", id="71 parameters and 62 tiled layers"),
        pytest.param([*PARAMETERS, *TILED], "factored", id="36 layers and 62 that form D"),
    ],
)
def test_many_layers(emulator, layers, normalize):
    check(emulator, make_layers(layers, torch.float32, normalize, 0.8), normalize, 0.8)


def test_entries_that_a_table_holds(emulator):
    """docs/cuda.md has how many, in 32,400 bytes; here it is 3,880."""
    sizes = (ctypes.c_int64 * 8)()
    emulator.call("entry_bytes", sizes)
    tensors, layers, *others = [32400 // size for size in sizes]
    text = (build.ROOT / "docs" / "cuda.md").read_text()
    held = f"A table holds {tensors} parameters whose D is given, and at least "
    assert held + f"{min(layers, *others)} layers" in " ".join(text.split())
    header = (build.ROOT / "csrc" / "cuda" / "table.h").read_text()
    assert "kTableBytes = CUDART_VERSION >= 13000 ? 32400 : 3880;" in header


# ---- bytes of global memory ---------------------------------------------------------------------


def read_table():
    """docs/cuda.md: {(whether D is formed, normalize): (bytes, bytes with momentum, launches)}."""
    text = (build.ROOT / "docs" / "cuda.md").read_text()
    row = r"^\| (given|formed).* \| ([a-z, ]+?)(?: \(.*\))? \| (\d+) / (\d+) \| (\d+) \|$"
    return {
        (kind == "formed", normalize): tuple(map(int, numbers))
        for kind, names, *numbers in re.findall(row, text, re.MULTILINE)
        for normalize in names.split(", ")
    }


@pytest.mark.skipif(VARIANT != "traced", reason="the sanitized build traces nothing")
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("formed", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_bytes_and_launches_are_those_of_the_docs(emulator, momentum, formed, normalize):
    shape = (128, 256)
    layers = make_layers(
        [(shape, False, 8 if formed else None)], torch.float32, normalize, momentum
    )
    with emulator.memory() as memory, emulator.traffic() as moved:
        update_in(emulator, memory, layers, normalize, momentum)
    large = {"param", "gradient", "exp_avg"} | ({"exp_avg_sq"} if normalize == "adam" else set())
    total = sum(
        sum(bytes_) for buffers in moved.values() for name, bytes_ in buffers.items()
        if name in large
    )  # fmt: skip
    plain, averaged, launches = read_table()[formed, normalize]
    assert total == (averaged if momentum else plain) * shape[0] * shape[1]
    # Each launch is of a kernel of its own.
    assert len(moved) == launches


@pytest.mark.skipif(VARIANT != "traced", reason="the sanitized build traces nothing")
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_launches_where_some_layers_form_their_direction(emulator, normalize):
    """As the docs say; ranks and alignments share them."""
    layers = [((4, 8), True, None), ((3, 5), False, None), ((4, 8), True, 2), ((3, 7), False, 1)]
    layers = make_layers(layers, torch.float32, normalize, 0.8)
    with emulator.memory() as memory, emulator.traffic() as moved:
        update_in(emulator, memory, layers, normalize, 0.8)
    text = " ".join((build.ROOT / "docs" / "cuda.md").read_text().split())
    few, many = re.search(r"(\d+) with \"none\" and \"adam\", (\d+) with the others", text).groups()
    assert len(moved) == int(few if normalize in ("none", "adam") else many)
