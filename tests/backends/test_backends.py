"""Every backend against the reference, taken from the dispatch table."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import ITERATION, PRODUCT, SOLVE, assert_near

from gls_fused import GLS, available_backends, build_info, reference
from gls_fused.backends import factors
from gls_fused.backends.dispatch import resolve_backend
from gls_fused.curvature.estimate import (
    Subspace,
    add_sums,
    blend,
    commit,
    commits_at_once,
    settle,
)
from gls_fused.reference import SubspaceInverse

# Triton's kernels, which take no CPU tensors, have tests of their own in tests/backends/triton.
BACKENDS = [
    name
    for name, why in available_backends().items()
    if why is None and name not in ("reference", "triton")
]
NORMALIZE = ["rms", "row", "factored", "adam", "sgd", "none"]
POWERS = [1, 0.75, 0.5, 0.25]
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32)}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return resolve_backend(request.param, ["cpu"])


each_backend = pytest.mark.parametrize("name", BACKENDS)
shapes = st.tuples(
    st.one_of(st.integers(0, 40), st.integers(1000, 5000)),  # rows
    st.integers(1, 70),  # columns
    st.integers(1, 33),  # rank, at most d
    st.booleans(),  # a column of ones
)


def draw(*shape, dtype, seed=0, strided=False):
    """Normal numbers; `strided` keeps the values and makes them non-contiguous."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    values = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    if strided:
        wide = torch.full((*shape[:-1], 2 * shape[-1] + 1), torch.nan, dtype=dtype)
        wide[..., 1::2] = values
        values = wide[..., 1::2]
    return values


def make_inverse(dim, rank, dtype):
    """P of a random psd Sigma, in at least float32."""
    dtype = torch.promote_types(dtype, torch.float32)
    basis = torch.linalg.qr(draw(dim, rank, dtype=torch.float64))[0].to(dtype)
    root = draw(rank, rank, dtype=dtype, seed=1)
    core = root @ root.T
    return SubspaceInverse(basis, *reference.invert_core(core, 2 * core.trace(), dim, 0.3))


def in_float64(inverse):
    """For the result itself: where a row is one of U's, its two parts all but cancel."""
    return SubspaceInverse(*[x.double() for x in inverse])


def turn(x):
    """The same matrix, lying in memory by columns."""
    return x.T.contiguous().T if x.dim() == 2 else x


def assert_same(actual, expected, tolerances, dtype):
    for found, sought in zip(actual, expected, strict=True):
        assert (found is None) == (sought is None)
        if found is not None:
            assert found.dtype == sought.dtype
            assert_near(found, sought, tolerances[dtype])


def assert_same_estimate(found, expected, scale=1.0):
    """U+ and M+ are unique up to signs, and a rotation among equals; U+ M+ U+' is unique."""
    products = [u @ (m / scale) @ u.T for u, m in (found, expected)]
    assert_near(*products, SOLVE[products[0].dtype])


@each_backend
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@given(shape=shapes)
def test_precondition_rows(name, dtype, strided, shape):
    n, size, rank, ones = shape
    rank = min(rank, size + ones)
    inverse = make_inverse(size + ones, rank, dtype)
    rows = draw(n, size, dtype=dtype, strided=strided)
    actual = resolve_backend(name, ["cpu"]).precondition_rows(rows, inverse, ones=ones)
    exact = reference.precondition_rows(rows.double(), in_float64(inverse), ones=ones)
    assert_same(actual, [x if x is None else x.to(dtype) for x in exact], PRODUCT, dtype)


@each_backend
@pytest.mark.parametrize("lying", ["whole", "strided", "turned"])
@pytest.mark.parametrize("dtype", DTYPES)
@given(shape=shapes)
def test_precondition_gradient(name, dtype, lying, shape):
    m, size, rank, ones = shape
    rank = min(rank, size + ones)
    inverse = make_inverse(size + ones, rank, dtype)
    weight = draw(m, size, dtype=dtype, strided=lying == "strided")
    weight = turn(weight) if lying == "turned" else weight
    bias = draw(m, dtype=dtype) if ones else None
    actual = resolve_backend(name, ["cpu"]).precondition_gradient(weight, bias, inverse)
    wide = [x if x is None else x.double() for x in (weight, bias)]
    exact = reference.precondition_gradient(*wide, in_float64(inverse))
    assert_same(actual, [x if x is None else x.to(dtype) for x in exact], PRODUCT, dtype)


@each_backend
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@given(shape=shapes)
def test_sketch_rows(name, dtype, strided, shape):
    n, size, rank, ones = shape
    basis = make_inverse(size + ones, min(rank, size + ones), dtype).basis
    rows = draw(n, size, dtype=dtype, strided=strided)
    actual = resolve_backend(name, ["cpu"]).sketch_rows(rows, basis, ones=ones)
    exact = reference.sketch_rows(rows, basis.double(), ones=ones)
    assert_same(actual, [x.to(basis.dtype) for x in exact], PRODUCT, basis.dtype)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
@given(
    axes=st.integers(1, 3),
    groups=st.integers(1, 3),
    channels=st.integers(1, 3),
    sides=st.tuples(*[st.integers(1, 3)] * 6, *[st.integers(0, 2)] * 3),
    turned=st.booleans(),
    strided=st.booleans(),
    few=st.booleans(),
)
def test_take_patches(name, dtype, axes, groups, channels, sides, turned, strided, few):
    kernel, stride, padding = (sides[i : i + axes] for i in (0, 3, 6))
    more = tuple(step - 1 for step in stride) if turned else None
    window = reference.Window(kernel, stride, padding, (2,) * axes, more)
    images = draw(2, groups * channels, *(8, 7, 6)[:axes], dtype=dtype, strided=strided)
    total = math.prod(reference.count_patches(images, window, groups))
    places = torch.tensor([total - 1, 0, total // 2, 0]) if few else None
    found = resolve_backend(name, ["cpu"]).take_patches(images, window, places, groups)
    assert torch.equal(found, reference.take_patches(images, window, places, groups))


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(dim=st.integers(1, 90), rank=st.integers(1, 40), scale=st.sampled_from([1e-25, 1.0, 1e25]))
def test_refresh_and_inverse(name, dtype, dim, rank, scale):
    backend, rank = resolve_backend(name, ["cpu"]), min(rank, dim)
    rows = draw(3 * dim, dim, dtype=dtype)
    basis = make_inverse(dim, rank, dtype).basis
    core, sketch, trace = reference.sketch_rows(rows, basis, ones=False)
    core, sketch, trace = core * scale, sketch * scale, trace * scale
    moved = reference.refresh_subspace(core, sketch)
    assert_same_estimate(backend.refresh_subspace(core, sketch), moved, scale)
    for power in POWERS:
        # Where it is exact, as an eigendecomposition in float32 is not.
        wide = (moved[1].double(), trace.double(), dim, 0.3, power)
        expected = [part.to(dtype) for part in reference.invert_core(*wide)]
        found = backend.invert_core(moved[1], trace, dim, 0.3, power)
        assert_same(found, expected, SOLVE, dtype)


def draw_estimates(dtype):
    """Arguments of blend_subspaces for four layers, the second of which got no rows.

    The last estimate is zero, and so are its rows.
    """
    shapes = [(1, 3), (5, 70), (32, 600), (2, 6)]
    bases = [make_inverse(dim, rank, dtype).basis for rank, dim in shapes]
    cores = [draw(rank, rank, dtype=dtype) for rank, _ in shapes]
    traces = [draw(1, dtype=dtype)[0] for _ in shapes]
    sums = [draw(2 + rank * (rank + dim), dtype=dtype) for rank, dim in shapes]
    for mine, count in zip(sums, (9, 0, 200, 4), strict=True):
        mine[0] = count
        if not count:
            mine.zero_()
    cores[3].zero_()
    sums[3][2:].zero_()
    samples = [torch.tensor(count, dtype=dtype) for count in (8.0, 90.0, 3.0, 1.0)]
    return bases, cores, traces, samples, sums


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sums_blend_in(name, dtype):
    estimates = draw_estimates(dtype)
    _, cores, traces, samples, _ = estimates
    given = [x.clone() for x in (*cores, *traces, *samples)]
    found = resolve_backend(name, ["cpu"]).blend_subspaces(*estimates, 0.9)
    for *layer, actual in zip(*estimates, found, strict=True):
        assert_same(actual, reference.blend_subspace(*layer, 0.9), PRODUCT, dtype)
    assert_same([*cores, *traces, *samples], given, PRODUCT, dtype)
    # No rows, no change but for the shift.
    shift = reference.sketch_shift(traces[1], 70) * torch.eye(5, dtype=dtype)
    assert torch.equal(found[1][1], cores[1] + shift)
    assert torch.equal(found[1][2], traces[1])
    assert torch.equal(found[1][3], samples[1])
    # U of what no row has shown is not mixed in.
    assert not found[3][0].any()


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weights_are_measured(name, dtype):
    """One that is not contiguous, one below its least, an empty one; none where `skip` is true."""
    backend, wide = resolve_backend(name, ["cpu"]), torch.promote_types(dtype, torch.float32)
    weights = [draw(*shape, dtype=dtype) for shape in [(130, 70), (3, 2), (0, 4)]]
    weights[0] = weights[0].T
    results = [torch.full((), 7.0, dtype=wide) for _ in weights]
    backend.measure_weights_(weights, results, [0.1, 50.0, 0.2], torch.tensor(True))
    assert results == [7] * 3
    backend.measure_weights_(weights, results, [0.1, 50.0, 0.2], torch.tensor(False))
    expected = [weights[0].double().square().mean().sqrt(), 50.0, 0.2]
    assert_same(results, [torch.as_tensor(x, dtype=wide) for x in expected], PRODUCT, wide)
    backend.measure_weights_([weights[1]], results[:1], [0.0])
    assert_same(results[:1], [weights[1].double().square().mean().sqrt().to(wide)], PRODUCT, wide)


@each_backend
@pytest.mark.parametrize("normalize", ["rms", "row", "factored", "adam"])
def test_mean_square_that_falls_at_once_is_kept(name, normalize):
    """Without decay, by 1e-12: a difference of two such numbers in float32 is 0."""
    found = []
    for module in (resolve_backend(name, ["cpu"]), reference):
        torch.manual_seed(0)
        param, gradient = torch.randn(8, 16), torch.randn(8, 16)
        shapes = {"rms": [()], "row": [(8,)], "factored": [(8,), (16,)], "adam": [(8, 16)]}
        squares = [torch.zeros(shape) for shape in shapes[normalize]]
        step = torch.zeros(())
        for scale in (1, 1e-6):
            module.update_layers_(
                [param], [scale * gradient], [], squares, [step], [None], layer_sizes=[1],
                normalize=normalize, lr=0.1, momentum=0.0, beta2=0.0, eps=0.0, weight_decay=0.0,
            )  # fmt: skip
        found.append([param, *squares])
    assert_same(*found, PRODUCT, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_are_rounded_by_the_same_draws(backend, dtype):
    check_rounding(backend, dtype)


@pytest.mark.parametrize("damping", [0.3, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_commit_over_no_row_leaves_the_estimate(backend, dtype, damping):
    for ops in (backend, reference):
        check_commit_over_no_row(ops, dtype, damping)


def start_estimates(ops, dtype, power, shapes=((40, 3), (33, 17))):
    """States of some layers, and the sums of a step."""
    layers = []
    for dim, rank in shapes:
        kind = Subspace(dim, rank, ops)
        matrix, state = kind.test_matrix(dtype, torch.device("cpu")), {}
        sums = []
        for basis, n in ((matrix, 50), (None, 60)):
            basis = state["basis"] if basis is None else basis
            rows = draw(n, dim, dtype=dtype, seed=n + dim)
            core, sketch, trace = reference.sketch_rows(rows, basis, ones=False)
            sums.append(add_sums(None, n, trace, (core, sketch), weight=1.0))
            if len(sums) == 1:
                settle([(kind, state, kind.start(state, matrix, sums[0]))], 0.3, power)
        layers.append((kind, state, sums[1]))
    return layers


def check_commit(backend, dtype, counts, power):
    """Of layers of two ranks; rows whose gradients are all zero do not count.

    Nor do those of a bias alone that is frozen."""
    zeros = torch.zeros(3, 7, 2, 3).to(memory_format=torch.channels_last)
    last = torch.zeros(2049, dtype=torch.bfloat16)
    last[-1] = 1e-30 if counts else -0.0
    led_to = [[zeros, last], [last, zeros[:, :3]]]
    found = [start_estimates(ops, dtype, power) for ops in (backend, reference)]
    given = [(*layer, own) for layer, own in zip(found[0], led_to, strict=True)]
    assert all(commits_at_once(kind, state) for kind, state, _ in found[0])
    held = [dict(state) for _, state, _ in found[0]]
    commit(given, 0.9, 0.3, power)
    expected = [(kind, state, sums * counts) for kind, state, sums in found[1]]
    settle(blend(expected, 0.9), 0.3, power)
    for (_, state, _), (_, sought, _) in zip(*found, strict=True):
        pairs = [(each["basis"], each["core"]) for each in (state, sought)]
        assert_same_estimate(*pairs)
        basis = state["basis"]
        assert_near(basis.T @ basis, torch.eye(basis.shape[1], dtype=dtype), PRODUCT[dtype])
        inverses = [
            each["basis"] @ each["core_inverse"] @ each["basis"].T for each in (state, sought)
        ]
        assert_near(*inverses, SOLVE[dtype])
        for key in ("trace", "samples", "shift"):
            assert_near(state[key], sought[key], SOLVE[dtype])
    # In place.
    for (_, state, _), before in zip(found[0], held, strict=True):
        assert all(state[key] is value for key, value in before.items())


def check_skipped_commit(backend, dtype, skip):
    layers = start_estimates(backend, dtype, 0.5)
    before = [{key: value.clone() for key, value in state.items()} for _, state, _ in layers]
    commit([(*layer, []) for layer in layers], 0.9, 0.3, 0.5, torch.tensor(skip))
    for (_, state, _), old in zip(layers, before, strict=True):
        for key, value in state.items():
            assert torch.equal(value, old[key]) == skip, key


def check_commit_over_no_row(backend, dtype, damping):
    """The estimate stays to the bit, however often; P is made anew of it."""
    layers = start_estimates(backend, dtype, 0.5)
    nothing = [(kind, state, sums * 0, []) for kind, state, sums in layers]
    held = [torch.zeros(3), torch.zeros(2, 2).T]
    unmoved = [(kind, state, sums, held) for kind, state, sums in layers]
    before = [{key: value.clone() for key, value in state.items()} for _, state, _ in layers]
    for own in (nothing, unmoved) if commits_at_once(*layers[0][:2]) else (nothing,):
        for _ in range(3):
            commit(own, 0.9, damping, 0.5)
    for (_, state, _), old in zip(layers, before, strict=True):
        stayed = {key for key, value in state.items() if torch.equal(value, old[key])}
        made_anew = set() if damping == 0.3 else {"core_inverse", "shift"}
        assert stayed == state.keys() - made_anew


def check_rounding(backend, dtype):
    """Turned, channels last, with gaps, empty; one that threads share; what is not finite."""
    shapes = [(7, 33), (40, 70), (2, 3, 4, 5), (4, 3), (0, 3), (70_000,)]
    values = [1e-3 * draw(*shape, dtype=torch.float32) for shape in shapes]
    values.append(torch.tensor([torch.nan, torch.inf, -torch.inf, 1e-8, -3e-7, 0.0]))
    start = [torch.full_like(value, torch.nan, dtype=dtype) for value in values]
    start[1] = start[1].T.contiguous().T
    start[2] = start[2].to(memory_format=torch.channels_last)
    start[3] = torch.full((4, 7), torch.nan, dtype=dtype)[:, 1::2]
    seeds, steps = list(range(7)), [torch.tensor(3.0 + i) for i in range(7)]
    found, sought = [list(start) for _ in range(2)]
    for params in (found, sought):
        params[:3] = [param.clone() for param in start[:3]]
        params[3] = torch.full((4, 7), torch.nan, dtype=dtype)[:, 1::2]
        params[4:] = [param.clone() for param in start[4:]]
    backend.round_params_(found, values, seeds, steps)
    reference.round_params_(sought, values, seeds, steps)
    for actual, expected, value in zip(found, sought, values, strict=True):
        assert actual.isnan().equal(value.isnan())
        assert expected.isnan().equal(value.isnan())
        assert actual[~value.isnan()].equal(expected[~value.isnan()])


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_some_layers_at_once(name, dtype):
    backend, dims = resolve_backend(name, ["cpu"]), [3, 40, 32]
    moments = []
    for rank, dim in zip((1, 5, 32), dims, strict=True):
        basis = make_inverse(dim, rank, dtype).basis
        moments.append(reference.sketch_rows(draw(9, dim, dtype=dtype), basis, ones=False))
    cores, sketches, traces = zip(*moments, strict=True)
    moved = backend.refresh_subspaces(cores, sketches)
    for actual, *layer in zip(moved, cores, sketches, strict=True):
        assert_same_estimate(actual, reference.refresh_subspace(*layer))
    for samples in (None, [torch.tensor(count, dtype=dtype) for count in (2.0, 9.5, 1e3)]):
        inverted = backend.invert_cores(cores, traces, dims, 0.3, 0.75, samples)
        rows = samples or [None] * 3
        for actual, *layer, mine in zip(inverted, cores, traces, dims, rows, strict=True):
            assert_same(actual, reference.invert_core(*layer, 0.3, 0.75, mine), SOLVE, dtype)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("power", [0.75, 0.5, 0.25])
def test_power_of_the_worst_conditioned_core(name, dtype, power):
    """Eigenvalues from t down to 0 at the least damping that is admitted, which is 32 eps t."""
    values = torch.cat([torch.ones(1), torch.logspace(0, -20, 30), torch.zeros(1)]).double()
    vectors = torch.linalg.qr(draw(32, 32, dtype=torch.float64))[0]
    core = ((vectors * values) @ vectors.T).to(dtype)
    trace, damping = core.trace(), 1e-30
    found, shift = resolve_backend(name, ["cpu"]).invert_core(core, trace, 32, damping, power)
    wide = reference.invert_core(core.double(), trace.double(), 32, 32 * 32 * EPS[dtype], power)
    # A change of the core by its rounding changes the least eigenvalue by a 32nd.
    assert_near(found, wide[0].to(dtype), 0.05)
    assert_near(shift, wide[1].to(dtype), SOLVE[dtype])


@each_backend
@pytest.mark.parametrize("damping", [1e-1, 1e-4, 1e-7, 1e-10])
@pytest.mark.parametrize("power", [0.75, 0.5, 0.25])
def test_power_keeps_the_digits_that_the_conditioning_leaves(name, damping, power):
    """A mean eigenvalue of 1 and a least one of damping: rounding errs by eps r / damping."""
    values = torch.cat([torch.ones(1), torch.logspace(0, -12, 31)]).double()
    vectors = torch.linalg.qr(draw(32, 32, dtype=torch.float64))[0]
    core = (vectors * values) @ vectors.T
    found, _ = resolve_backend(name, ["cpu"]).invert_core(core, core.trace(), 32, damping, power)
    expected, _ = reference.invert_core(core, core.trace(), 32, damping, power)
    assert_near(found, expected, 4 * EPS[torch.float64] * 32 / damping)


@each_backend
@pytest.mark.parametrize("power", [1, 0.75, 0.5, 0.25])
def test_core_that_rounding_left_indefinite(name, power):
    core, trace = torch.diag(torch.tensor([4.0, -1.0])), torch.tensor(3.0)
    found = resolve_backend(name, ["cpu"]).invert_core(core, trace, 5, 0.3, power)
    assert_same(found, reference.invert_core(core, trace, 5, 0.3, power), SOLVE, torch.float32)
    unknown = resolve_backend(name, ["cpu"]).invert_core(core * torch.nan, trace, 5, 0.3, power)
    assert not unknown[0].diagonal().isfinite().any()


def make_update(dtype, normalize, momentum, strided=False, *, turned=False):
    """Arguments of update_layers_ for three layers, one larger than a chunk, one empty.

    Args:
        strided: whether weights are parts of larger tensors.
        turned: whether matrices lie by columns, the first with more than one block of them.
    """
    state = torch.promote_types(dtype, torch.float32)
    outputs, inputs = (300, 140) if turned else (37, 1001)
    shapes, sizes = [(outputs, inputs), (outputs,), (5, 3), (0, 4), (0,)], [2, 1, 2]
    lie = turn if turned else (lambda x: x)
    like = [lie(draw(*shape, dtype=dtype, strided=strided and len(shape) > 1)) for shape in shapes]
    squares = []
    if normalize == "rms":
        squares = [torch.tensor(0.5 + i, dtype=state) for i in range(3)]
    elif normalize == "row":
        squares = [draw(m, dtype=state, seed=3).square() for m in (outputs, 5, 0)]
    elif normalize == "factored":
        # The bias that the second layer has takes no step.
        lengths = (outputs, inputs + 1, 5, 4, 0, 5)
        squares = [draw(length, dtype=state, seed=3).square() for length in lengths]
    elif normalize == "adam":
        squares = [draw(*shape, dtype=state, seed=3).square() for shape in shapes]
    return {
        "params": like,
        "gradients": [lie(draw(*shape, dtype=dtype, seed=1)) for shape in shapes],
        "exp_avgs": [lie(draw(*shape, dtype=state, seed=2)) for shape in shapes if momentum],
        "exp_avg_sqs": squares,
        "steps": [torch.tensor(float(i + 1)) for i in range(3)],
        "inverses": [make_inverse(inputs + 1, 7, dtype), None, None],
        "layer_sizes": sizes,
        "normalize": normalize,
        "lr": 0.1,
        "momentum": momentum,
        "beta2": 0.9,
        "eps": 1e-6,
        "weight_decay": 0.2,
    }


LISTS = ("params", "gradients", "exp_avgs", "exp_avg_sqs", "steps", "inverses")


def run_update(backend, options):
    named = {key: value for key, value in options.items() if key not in LISTS}
    backend.update_layers_(*(options[key] for key in LISTS), **named)


@pytest.mark.parametrize("lying", [{}, {"strided": True}, {"turned": True}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_update_layers(backend, normalize, momentum, dtype, lying):
    found = make_update(dtype, normalize, momentum, **lying)
    sought = make_update(dtype, normalize, momentum, **lying)
    run_update(backend, found)
    run_update(reference, sought)
    for key in ("params", "exp_avgs", "exp_avg_sqs"):
        for actual, expected in zip(found[key], sought[key], strict=True):
            assert_near(actual, expected, PRODUCT[dtype])
    if normalize == "rms":
        # An empty layer has no mean square to blend in.
        assert found["exp_avg_sqs"][2].isfinite()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_bound_and_growth_of_the_rate(backend, normalize, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    rates = {"rates": torch.tensor([[0.01, 1.5], [3.0, 1.7], [0.02, 1.0]], dtype=wide)}
    found, sought, free = (make_update(dtype, normalize, 0.9, strided=False) for _ in range(3))
    run_update(backend, {**found, **rates})
    run_update(reference, {**sought, **rates})
    run_update(reference, free)
    for actual, expected in zip(found["params"], sought["params"], strict=True):
        assert_near(actual, expected, PRODUCT[dtype])
    # The first layer is bounded, the second grows.
    assert not any(map(torch.equal, sought["params"][:2], free["params"][:2]))


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_gradient_that_is_no_number_reaches_the_whole_layer_where_its_norm_counts(
    backend, normalize
):
    found, sought = (make_update(torch.float64, normalize, 0.9, strided=False) for _ in range(2))
    for run in (found, sought):
        run["gradients"][0].view(-1)[1] = torch.nan
    run_update(backend, found)
    run_update(reference, sought)
    for actual, expected in zip(found["params"], sought["params"], strict=True):
        assert actual.isnan().equal(expected.isnan())
    if normalize in ("rms", "factored", "sgd"):
        assert found["params"][0].isnan().all()


def test_unknown_scale_is_refused(backend):
    found = make_update(torch.float64, "none", 0.0, strided=False)
    with pytest.raises((ValueError, RuntimeError), match=r"normalize.* got '?nothing"):
        run_update(backend, {**found, "normalize": "nothing"})


@pytest.mark.parametrize("normalize", ["row", "factored"])
def test_bias_of_another_length_is_refused(backend, normalize):
    found = make_update(torch.float64, normalize, 0.0, strided=False)
    place = next(i for i, param in enumerate(found["params"]) if param.ndim == 1)
    for key in ("params", "gradients"):
        found[key][place] = found[key][place][:-1]
    before = [param.clone() for param in found["params"]]
    with pytest.raises((ValueError, RuntimeError)):
        run_update(backend, found)
    if backend is not reference:
        assert all(map(torch.equal, found["params"], before))


def run_skipping(backend, normalize, dtype, strided, skips):
    """What an update with a flag wrote, and what it must have written."""
    found = make_update(dtype, normalize, 0.9, strided)
    expected = make_update(dtype, normalize, 0.9, strided)
    if skips:
        for gradient in found["gradients"][:2]:
            gradient.view(-1)[1] = torch.nan
    else:
        run_update(backend, expected)
    run_update(backend, {**found, "skip": torch.tensor(skips)})
    written = ("params", "exp_avgs", "exp_avg_sqs", "steps")
    return [[tensor for key in written for tensor in run[key]] for run in (found, expected)]


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_update_that_is_skipped_writes_nothing(backend, normalize, dtype, strided, skips):
    for actual, expected in zip(
        *run_skipping(backend, normalize, dtype, strided, skips), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_number_of_threads_changes_nothing(backend, normalize, turned):
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        options = make_update(torch.float32, normalize, 0.9, turned=turned)
        run_update(backend, options)
        results.append(options["params"])
    torch.set_num_threads(1)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_native_ops_are_proper_torch_ops():
    if "native" not in BACKENDS:
        pytest.skip(available_backends()["native"])
    resolve_backend("native", ["cpu"])
    ops, check = torch.ops.gls_fused, torch.library.opcheck
    basis, *_ = inverse = make_inverse(8, 3, torch.float32)
    rows = draw(5, 7, dtype=torch.float32)
    core, sketch, trace = reference.sketch_rows(rows, basis, ones=True)
    update = make_update(torch.float32, "rms", 0.9, strided=False)
    tests = ("test_schema", "test_faketensor")
    check(ops.precondition_rows.default, (rows, *inverse, True), test_utils=tests)
    check(ops.precondition_rows.default, (rows, basis[:7], *inverse[1:], False), test_utils=tests)
    for gradient in (rows, turn(rows)):
        arguments = (gradient, rows[:, 0].clone(), *inverse)
        check(ops.precondition_gradient.default, arguments, test_utils=tests)
    check(ops.sketch_rows.default, (rows, basis, True), test_utils=tests)
    check(ops.refresh_subspace.default, (core, sketch), test_utils=tests)
    check(ops.invert_core.default, (core, trace, 8, 0.3), test_utils=tests)
    check(ops.refresh_subspaces.default, ([core], [sketch]), test_utils=tests)
    check(ops.invert_cores.default, ([core], [trace], [8], 0.3, 0.5, [trace]), test_utils=tests)
    estimate = [[x] for x in (basis, core, trace, trace, torch.zeros(2 + 9 + 24))]
    check(ops.blend_subspaces.default, (*estimate, 0.9), test_utils=tests)
    check(ops.add_sketch_.default, (rows, basis, True, torch.zeros(2 + 9 + 24)), test_utils=tests)
    *tensors, inverses = (update.pop(key) for key in LISTS)
    parts = zip(*(inverse or (None,) * 3 for inverse in inverses), strict=True)
    arguments = (*tensors, *map(list, parts), *update.values())
    check(ops.update_layers_.default, arguments, test_utils=tests)


def test_unknown_and_unavailable_backends():
    with pytest.raises(ValueError, match=r"expected auto, triton, native, reference, got 'cuda'"):
        GLS(torch.nn.Linear(2, 2), backend="cuda")
    with pytest.raises(RuntimeError, match="'native' has no kernels for mps, use 'auto'"):
        resolve_backend("native", ["mps"]) if "native" in BACKENDS else pytest.skip()


def test_cuda_kernels_that_were_not_built_raise_with_the_reason(monkeypatch):
    if "native" not in BACKENDS:
        pytest.skip(available_backends()["native"])
    native = resolve_backend("native", ["cpu"])
    reason = "no CUDA toolkit: nvcc not found in PATH; install CUDA 13.0 or set CUDA_HOME"
    monkeypatch.setattr(native, "cuda_failure", reason)
    with pytest.raises(RuntimeError, match=f"'native' has no kernels for cuda, .*{reason}"):
        resolve_backend("native", ["cuda"])
    # The CPU's are as they were.
    assert resolve_backend("native", ["cpu"]) is native
    info = build_info()
    assert (info["cuda"], info["cuda_architectures"]) == (None, [])
    assert info["cuda_failure"] == reason
    if available_backends()["triton"] is not None:
        assert resolve_backend("auto", ["cuda"]) is reference
    monkeypatch.setattr(native, "cuda_failure", None)
    assert resolve_backend("native", ["cuda"]) is native
    if available_backends()["triton"] is not None:
        assert resolve_backend("auto", ["cuda"]) is native


@pytest.fixture
def mixed(monkeypatch):
    """What auto is where both of its backends could run on a CUDA device."""
    from gls_fused.backends import dispatch

    if "native" not in BACKENDS:
        pytest.skip(available_backends()["native"])
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(resolve_backend("native", ["cpu"]), "cuda_failure", None)
    dispatch._load.cache_clear()
    yield resolve_backend("auto", ["cuda"])
    dispatch._load.cache_clear()


def test_auto_on_cuda_takes_each_op_from_the_faster_backend(mixed, monkeypatch):
    from gls_fused.backends import native, triton
    from gls_fused.backends.choices import CHOICES
    from gls_fused.backends.dispatch import backend_name, describe_backend

    assert resolve_backend(backend_name(mixed), ()) is mixed
    modules = {"triton": triton, "native": native}
    split = {"refresh_subspaces", "invert_cores"}
    for op in CHOICES.keys() - split:
        assert getattr(mixed, op, None) is getattr(modules[CHOICES[op][0]], op, None)
    # All that every backend has, and of what one of them has more, what belongs to the choice.
    assert all(hasattr(mixed, op) for op in mixed.__all__)
    assert set(native.__all__) & set(triton.__all__) == set(mixed.__all__)
    summed = CHOICES["sketch_rows"][0] == "native"
    assert (hasattr(mixed, "add_sketch_"), hasattr(mixed, "sum_rows")) == (summed, not summed)
    assert mixed.commits is modules[CHOICES["commit_subspaces_"][0]].commits
    described = describe_backend("mixed")
    for op, (name, _) in CHOICES.items():
        assert (op in described) == (name != described.split(",")[0])
    assert describe_backend("native") == "native"
    # Not on other devices, nor where one is missing.
    assert resolve_backend("auto", ["cpu"]) is native
    assert resolve_backend("auto", ["cuda", "cpu"]) is native
    monkeypatch.setattr(native, "cuda_failure", "no nvcc")
    assert resolve_backend("auto", ["cuda"]) is triton
    with pytest.raises(RuntimeError, match="'native' has no kernels for cuda"):
        resolve_backend("mixed", ["cuda"])


@pytest.mark.parametrize("first", ["triton", "native"])
def test_layers_whose_rank_only_one_backend_has_kernels_for(mixed, monkeypatch, first):
    from gls_fused.backends import native, triton

    calls = []

    def record(name):
        def op(cores, *parts):
            calls.append((name, [len(core) for core in cores]))
            return [(core, name) for core in cores]

        return op

    for module, name in ((triton, "triton"), (native, "native")):
        monkeypatch.setattr(module, "refresh_subspaces", record(name))
        monkeypatch.setattr(module, "invert_cores", record(name))
    monkeypatch.setattr(mixed, "CHOICES", dict.fromkeys(mixed.CHOICES, (first, "")))
    # Kernels reach to 32 and to 64; what is beyond both is the first one's.
    cores = [torch.eye(rank) for rank in (8, 48, 70, 32)]
    found = mixed.refresh_subspaces(cores, cores)
    assert all(core is result[0] for core, result in zip(cores, found, strict=True))
    assert [result[1] for result in found] == [first, "native", first, first]
    # To 128 both, but in float64 to 64 and to 88, and where the power is not 1 to 32 and to 88.
    assert mixed.invert_cores(cores, [None] * 4, [9] * 4, 0.3) == [(x, first) for x in cores]
    wide = [torch.eye(rank, dtype=torch.float64) for rank in (8, 70)]
    found = mixed.invert_cores(wide, [None] * 2, [9] * 2, 0.3, 1, [None] * 2)
    assert [result[1] for result in found] == [first, "native"]
    assert mixed.invert_core(cores[1], None, 9, 0.3, 0.5) == (cores[1], "native")
    # All layers of a backend in one call.
    together = [("triton", [8, 70, 32]), ("native", [48])]
    assert calls[:2] == together if first == "triton" else calls[0] == ("native", [8, 48, 70, 32])


def test_triton_without_a_gpu_raises_with_the_reason(monkeypatch):
    from gls_fused.backends import dispatch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._load.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="'triton' is not available: there is no CUDA dev"):
            GLS(torch.nn.Linear(2, 2), backend="triton")
    finally:
        dispatch._load.cache_clear()


def test_missing_native_backend_raises_with_its_cause(monkeypatch):
    from gls_fused.backends import dispatch

    cause = ImportError("no C++ compiler: 'c++' not found")
    monkeypatch.setattr(
        dispatch, "_load", lambda name: (None, cause) if name == "native" else (reference, None)
    )
    assert dispatch.available_backends()["native"] == str(cause)
    with pytest.raises(RuntimeError, match=r"'native' is not available: no C\+\+ comp") as error:
        GLS(torch.nn.Linear(2, 2), backend="native")
    assert error.value.__cause__ is cause


def draw_conditioned(m, k, smallest):
    """Singular values from 1 to `smallest`, evenly in their logarithm."""
    u, v = (torch.linalg.qr(draw(n, min(m, k), dtype=torch.float64))[0] for n in (m, k))
    values = torch.logspace(0, math.log10(smallest), min(m, k), dtype=torch.float64)
    return (u * values) @ v.T


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_orthogonal_updates_of_all_layers(name, dtype, monkeypatch):
    """Tall and wide, of one shape and of others, one of zeros, well and badly conditioned."""
    monkeypatch.setattr(factors, "_multiplies_bfloat16", lambda device: False)
    shapes = [(3, 7), (7, 3), (3, 7), (5, 5), (1, 4), (40, 33), (0, 3), (130, 300), (300, 290)]
    matrices = [draw(*shape, dtype=dtype) for shape in shapes] + [torch.zeros(3, 7, dtype=dtype)]
    for smallest in (0.1, 1e-3, 1e-6):
        matrices += [draw_conditioned(m, 64, smallest).to(dtype) for m in (24, 60, 200)]
    given = [matrix.clone() for matrix in matrices]
    found = resolve_backend(name, ["cpu"]).orthogonal_updates(matrices)
    expected = reference.orthogonal_updates([matrix.double() for matrix in given])
    for actual, wanted in zip(found, expected, strict=True):
        assert_near(actual, wanted.to(dtype), ITERATION[dtype])
    assert_same(matrices, given, PRODUCT, dtype)
    assert not found[len(shapes)].any()


SPECTRAL = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "rate on the device": {"lr": torch.tensor(0.02, dtype=torch.float64), "weight_decay": 0.1},
    "bounds": {"lr_bounds": torch.tensor([1.0, 0.01, 0.0, 0.02, 1.0, 0.01]).double()},
    "no momentum": {"momentum": 0.0},
    "little momentum": {"momentum": 0.3},
    "taken": {"skip": torch.tensor(False)},
    "skipped": {"skip": torch.tensor(True)},
    "parts": {"split": 2},
}


@each_backend
@pytest.mark.parametrize("lying", ["whole", "turned", "channels last", "strided"])
@pytest.mark.parametrize("kind", SPECTRAL)
def test_orthogonal_steps_of_all_layers(name, kind, lying):
    """Three steps of a few layers, some with a bias and a P, are the reference's."""
    # Weight, whether it has a bias, whether a P.
    layers = [
        ((6, 7), True, True), ((40, 90), True, False), ((200, 30), False, True),
        ((4, 3, 3, 3), True, True), ((300, 200), True, True), ((2, 1), True, False),
    ]  # fmt: skip
    options = {
        "layer_sizes": [1 + bias for _, bias, _ in layers], "lr": 0.02, "momentum": 0.9,
        "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.0, **SPECTRAL[kind],
    }  # fmt: skip

    def lay(x, of_state=False):
        if lying == "turned" and not of_state:
            return turn(x)
        if lying == "channels last" and x.dim() == 4 and not of_state:
            return x.contiguous(memory_format=torch.channels_last)
        return x.repeat_interleave(2, -1)[..., ::2] if lying == "strided" else x

    shapes = [part for shape, bias, _ in layers for part in [shape, shape[:1]][: 1 + bias]]

    def tensors(seed, **laid):
        drawn = (draw(*x, dtype=torch.float64, seed=seed + i) for i, x in enumerate(shapes))
        return [lay(x, **laid) for x in drawn]

    sizes = [(math.prod(shape[1:]) + bias, p) for shape, bias, p in layers]
    inverses = [make_inverse(size, 2, torch.float64) if p else None for size, p in sizes]
    runs = []
    for module in (resolve_backend(name, ["cpu"]), reference):
        params = tensors(0)
        averages = [x.zero_() for x in tensors(0, of_state=True)] if options["momentum"] else []
        squares = [torch.zeros(shape[0], dtype=torch.float64) for shape, *_ in layers]
        steps = [torch.zeros(()) for _ in layers]
        for step in range(3):
            module.update_spectral_layers_(
                params, tensors(100 * step + 50), averages, squares, steps, inverses, **options
            )
        runs.append([*params, *averages, *squares, *steps])
    assert_same(*runs, ITERATION, torch.float64)
    moved = any(not torch.equal(new, old) for new, old in zip(runs[0], tensors(0), strict=False))
    assert moved == (kind != "skipped")


@pytest.mark.parametrize("capabilities", [{}, {"amx_bf16": True}, {"avx512_bf16": True}])
def test_dtype_of_factors_on_a_cpu(capabilities, monkeypatch):
    """bfloat16 of large matrices where there are tiles for it, but of float64."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    factors._multiplies_bfloat16.cache_clear()
    try:
        tiles = "amx_bf16" in capabilities
        large = torch.empty(2, 256, 512)
        assert factors.factor_dtype(large) == (torch.bfloat16 if tiles else torch.float32)
        assert factors.factor_dtype(large[..., 1:]) == torch.float32
        assert factors.factor_dtype(large.double()) == torch.float64
    finally:
        factors._multiplies_bfloat16.cache_clear()


@pytest.mark.parametrize("smallest", [0.1, 1e-2])
def test_orthogonal_factor_in_bfloat16(smallest, monkeypatch):
    """As on CUDA devices: singular values come within 15% of 1, where they are not tiny."""
    monkeypatch.setattr(factors, "factor_dtype", lambda x: torch.bfloat16)
    monkeypatch.setattr(factors, "LONG", math.inf)
    matrix = draw_conditioned(60, 90, smallest).float()
    (found,) = factors.orthogonal_updates([matrix])
    assert found.dtype == torch.float32
    assert_near(found, reference.orthogonal_updates([matrix])[0], ITERATION[torch.bfloat16])
    values = torch.linalg.svdvals(found) / reference.spectral_length(matrix)
    assert values.min() > 0.85
    assert values.max() < 1.15
