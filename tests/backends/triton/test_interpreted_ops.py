"""Every kernel against the reference, in Triton's interpreter."""

import math

import pytest
import torch
import triton
from hypothesis import given
from hypothesis import strategies as st
from test_backends import (
    NORMALIZE,
    POWERS,
    assert_same,
    assert_same_estimate,
    check_commit,
    check_commit_over_no_row,
    check_rounding,
    check_skipped_commit,
    draw,
    draw_estimates,
    make_inverse,
    make_update,
    run_skipping,
    run_update,
)
from tolerances import ITERATION, PRODUCT, SOLVE, assert_near

from gls_fused import reference
from gls_fused.apply.fallback import adam_
from gls_fused.backends import triton as backend
from gls_fused.backends.triton import configs, launch, symmetric
from gls_fused.capture.conv import ImageRows
from gls_fused.capture.linear import LinearRows
from gls_fused.reference import DenseInverse, SubspaceInverse, Window

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
shapes = st.tuples(
    st.integers(0, 40),  # rows
    st.integers(1, 140),  # columns
    st.integers(1, 40),  # rank, at most d
    st.booleans(),  # a column of ones
    st.booleans(),  # strided rows
    st.booleans(),  # the basis by columns
)


def lay_out(matrix, by_columns):
    return matrix.T.contiguous().T if by_columns else matrix.contiguous()


def make_problem(shape, dtype):
    n, size, rank, ones, strided, by_columns = shape
    inverse = make_inverse(size + ones, min(rank, size + ones), dtype)
    inverse = inverse._replace(basis=lay_out(inverse.basis, by_columns))
    return draw(n, size, dtype=dtype, strided=strided), inverse, ones


@pytest.mark.parametrize("dtype", FLOATS)
@given(shape=shapes)
def test_rows(dtype, shape):
    rows, inverse, ones = make_problem(shape, dtype)
    actual = backend.precondition_rows(rows, inverse, ones=ones)
    assert_same(actual, reference.precondition_rows(rows, inverse, ones=ones), PRODUCT, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@given(shape=shapes)
def test_gradient(dtype, shape):
    weight, inverse, ones = make_problem(shape, dtype)
    bias = draw(len(weight), dtype=dtype, strided=True) if ones else None
    actual = backend.precondition_gradient(weight, bias, inverse)
    expected = reference.precondition_gradient(weight, bias, inverse)
    assert_same(actual, expected, PRODUCT, dtype)


def test_bias_keeps_its_own_dtype():
    weight, bias = draw(5, 8, dtype=torch.bfloat16), draw(5, dtype=torch.float32)
    inverse = make_inverse(9, 3, torch.float32)
    actual = backend.precondition_gradient(weight, bias, inverse)[1]
    expected = reference.precondition_gradient(weight, bias, inverse)[1]
    assert actual.dtype == expected.dtype
    assert_near(actual, expected, PRODUCT[torch.float32])


@pytest.mark.parametrize("dtype", FLOATS)
@given(shape=shapes)
def test_sketch(dtype, shape):
    rows, inverse, ones = make_problem(shape, dtype)
    actual = backend.sketch_rows(rows, inverse.basis, ones=ones)
    exact = reference.sketch_rows(rows, inverse.basis.double(), ones=ones)
    assert_same(actual, [x.float() for x in exact], PRODUCT, torch.float32)


@pytest.mark.parametrize("rank", [5, 16])
@pytest.mark.parametrize("ones", [False, True])
def test_ops_are_what_torch_asks_of_an_op(rank, ones):
    """Shapes, strides and aliases are what torch.compile is told."""
    ops, tests = torch.ops.gls_fused_triton, ("test_schema", "test_faketensor")
    rows, inverse = draw(9, 20, dtype=torch.float32), make_inverse(20 + ones, rank, torch.float32)
    last = draw(9, dtype=torch.float32) if ones else None
    number, earlier = torch.tensor(3), torch.zeros(2 + rank * (rank + 20 + ones))
    for arguments in ((None, None, ones, 9, False), (earlier, number, ones, 4, True)):
        torch.library.opcheck(
            ops.sum_rows.default, (rows, inverse.basis, *arguments), test_utils=tests
        )
    for arguments in ((rows, None, *inverse, ones), (rows, last, *inverse, False)):
        torch.library.opcheck(ops.precondition.default, arguments, test_utils=tests)


@pytest.mark.parametrize("ones", [False, True])
def test_sketch_of_many_rows_is_cut_in_parts(ones):
    n = 2 * configs.ROWS_PER_SPLIT + 3
    rows, basis = draw(n, 33, dtype=torch.float32), make_inverse(33 + ones, 5, torch.float32).basis
    assert configs.sketch_splits(n) == 2
    actual = backend.sketch_rows(rows, basis, ones=ones)
    exact = reference.sketch_rows(rows, basis.double(), ones=ones)
    assert_same(actual, [x.float() for x in exact], PRODUCT, torch.float32)
    for one, two in zip(actual, backend.sketch_rows(rows, basis, ones=ones), strict=True):
        assert torch.equal(one, two)


def lines_of(ones):
    rows = LinearRows()
    rows.ones = ones
    return rows


def images_of(ones, window, groups=1):
    rows = ImageRows()
    rows.ones, rows.window, rows.groups = ones, Window(*window), groups
    return rows


SAMPLES = {
    "rows": (lines_of, (3, 20, 9)),
    "many rows": (lines_of, (40, 30, 9)),
    "images": (lambda ones: images_of(ones, ((3, 2), (2, 1), (1, 0), (1, 2))), (5, 3, 9, 8)),
    "many images": (lambda ones: images_of(ones, ((1, 3), (1, 2), (0, 1), (1, 1))), (20, 2, 3, 8)),
    "groups": (lambda ones: images_of(ones, ((3,), (2,), (1,), (2,)), 40), (5, 80, 7)),
    "volumes": (lambda ones: images_of(ones, ((1, 1, 2), *[(1,) * 3] * 3)), (2, 2, 2, 2, 3)),
}


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("kind", SAMPLES)
def test_sums_of_a_sample(monkeypatch, kind, ones):
    """Over two passes, the same rows as in the reference, in two launches each."""
    most = 1024 if kind in ("rows", "images") else 100
    for module in ("linear", "conv"):
        monkeypatch.setattr(f"gls_fused.capture.{module}.SKETCH_ROWS", most)
    launches = record_launches(monkeypatch, backend.sketch)
    make, shape = SAMPLES[kind]
    inputs = draw(*shape, dtype=torch.float32)
    if kind == "many images":
        inputs = inputs.to(memory_format=torch.channels_last)
    elif kind == "many rows":
        inputs = inputs.transpose(0, 1)
    found = []
    for ops in (backend, reference):
        rows = make(ones)
        rows.backend, rows.statistics_dtype = ops, torch.float32
        rows.draw = torch.tensor(5)
        dim = shape[-1] if "rows" in kind else shape[1] // rows.groups
        dim *= 1 if "rows" in kind else math.prod(rows.window.kernel_size)
        rows.test_matrix = make_inverse(dim + ones, 3, torch.float32).basis
        rows.gather(inputs)
        rows.gather(2 * inputs)
        found.append(rows.sums)
    assert found[0][0] == found[1][0]
    assert_near(found[0], found[1], PRODUCT[torch.float32])
    assert len(launches) == 4


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf, 1e19])
def test_rows_that_say_nothing_add_nothing(value):
    """All zero, not finite, or with squares that overflow."""
    rows = lines_of(True)
    rows.backend, rows.statistics_dtype = backend, torch.float32
    rows.ones, rows.test_matrix = value != 0, make_inverse(4 + (value != 0), 2, torch.float32).basis
    rows.gather(torch.full((3, 4), value))
    assert not rows.sums.any()
    rows.gather(torch.ones(3, 4))
    before = rows.sums.clone()
    assert before[0] == 3
    rows.gather(torch.full((3, 4), value))
    assert torch.equal(rows.sums, before)


# The interpreter computes with numpy, which warns of what a GPU does silently.
not_finite = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide):RuntimeWarning")


@not_finite
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_row_stays_alone(value):
    rows, inverse = draw(20, 9, dtype=torch.float32), make_inverse(10, 4, torch.float32)
    rows[3, 2] = value
    product, last = backend.precondition_rows(rows, inverse, ones=True)
    good = torch.arange(20) != 3
    assert not product[3].isfinite().all()
    assert not last[3].isfinite()
    assert product[good].isfinite().all()
    assert last[good].isfinite().all()
    core, sketch, trace = backend.sketch_rows(rows, inverse.basis, ones=True)
    assert not any(x.isfinite().all() for x in (core, sketch, trace))


def test_all_zero_inputs_give_zeros():
    inverse = make_inverse(8, 3, torch.float32)
    product, last = backend.precondition_rows(torch.zeros(5, 8), inverse, ones=False)
    assert last is None
    assert torch.equal(product, torch.zeros(5, 8))
    for result in backend.sketch_rows(torch.zeros(5, 8), inverse.basis, ones=False):
        assert not result.any()


@given(dim=st.integers(1, 90), rank=st.integers(1, 40), scale=st.sampled_from([1e-25, 1.0, 1e25]))
def test_refresh(dim, rank, scale):
    rank = min(rank, dim)
    rows = draw(3 * dim, dim, dtype=torch.float32)
    basis = make_inverse(dim, rank, torch.float32).basis
    core, sketch, _ = (x * scale for x in reference.sketch_rows(rows, basis, ones=False))
    check_refresh(core, sketch, scale)


@pytest.mark.parametrize("shape", [(3, 40, 20), (1, 7, 7), (10, 32, 32), (4, 100, 5)])
def test_refresh_with_fewer_rows_than_directions(shape):
    """The sketch is rank deficient, as it is at the first step of a small batch."""
    n, dim, rank = shape
    rows = draw(n, dim, dtype=torch.float32)
    basis = make_inverse(dim, rank, torch.float32).basis
    core, sketch, _ = reference.sketch_rows(rows, basis, ones=False)
    check_refresh(core, sketch, 1.0)


def test_refresh_of_columns_that_repeat_and_vanish():
    rows = draw(50, 12, dtype=torch.float32)
    basis = torch.zeros(12, 6)
    basis[[0, 0, 1, 2, 2], [0, 1, 2, 3, 4]] = 1.0  # columns 0 = 1 and 3 = 4, the last one zero
    core, sketch, _ = reference.sketch_rows(rows, basis, ones=False)
    check_refresh(core, sketch, 1.0)


def test_refresh_of_nothing():
    found = backend.refresh_subspace(torch.zeros(3, 3), torch.zeros(8, 3))
    assert_near(found[0].T @ found[0], torch.eye(3), SOLVE[torch.float32])
    assert not found[1].any()


def record_launches(monkeypatch, module):
    """The launches that a module of the backend makes from here on, which still run."""
    launches, original = [], module.launch
    monkeypatch.setattr(module, "launch", lambda *a, **k: (launches.append(a), original(*a, **k)))
    return launches


def test_bases_of_all_layers_at_once(monkeypatch):
    """Five launches per padded rank, the same numbers as one by one."""
    launches = record_launches(monkeypatch, backend.subspace)
    layers = []
    for dim, rank in ((90, 5), (33, 16), (70, 32), (64, 20), (40, 40)):
        rows = draw(50, dim, dtype=torch.float32)
        basis = make_inverse(dim, rank, torch.float32).basis
        layers.append(reference.sketch_rows(rows, basis, ones=False)[:2])
    found = backend.refresh_subspaces(*zip(*layers, strict=True))
    assert len(launches) == 10
    for layer, actual in zip(layers, found, strict=True):
        assert_same_estimate(actual, reference.refresh_subspace(*layer))


def test_sums_of_all_layers_at_once(monkeypatch):
    """A launch per padded rank; d is more than one block."""
    launches = record_launches(monkeypatch, backend.blend)
    estimates = draw_estimates(torch.float32)
    found = backend.blend_subspaces(*estimates, 0.9)
    assert len(launches) == 2
    for *layer, actual in zip(*estimates, found, strict=True):
        assert_same(actual, reference.blend_subspace(*layer, 0.9), PRODUCT, torch.float32)


@pytest.mark.parametrize(("power", "counts"), [(1, True), (0.5, True), (0.5, False)])
def test_commit_of_all_layers_at_once(monkeypatch, counts, power):
    """Three launches for all ranks."""
    launches = record_launches(monkeypatch, backend.commit)
    check_commit(backend, torch.float32, counts, power)
    assert len(launches) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_growths_are_measured_at_once(monkeypatch, dtype):
    """In one launch; where weights have two dtypes, or numbers another, in two."""
    launches = record_launches(monkeypatch, backend.measure)
    weights = [draw(*shape, dtype=dtype) for shape in [(130, 70), (3, 2), (0, 4)]]
    least, options = [0.1, 50.0, 0.2], {"beta2": 0.95, "every": 10, "most": 1.9}
    found, sought = ([[torch.full((), 0.1) for _ in weights] for _ in range(3)] for _ in range(2))
    squares = [draw(*shape, dtype=torch.float32).square() for shape in [(1500,), (1,), (9,)]]
    steps = [torch.tensor(float(21 + 10 * i)) for i in range(3)]
    for skip in (torch.tensor(True), torch.tensor(False)):
        backend.measure_layers_(
            weights, found[0], least, squares, *found[1:], steps, **options, skip=skip
        )
        reference.measure_weights_(weights, sought[0], least, skip)
        reference.measure_growths_(squares, *sought[1:], steps, **options, skip=skip)
        for numbers, expected in zip(found, sought, strict=True):
            torch.testing.assert_close(numbers, expected, rtol=1e-5, atol=0)
    assert len(launches) == 2
    launches.clear()
    weights[1] = weights[1].to(torch.float16)
    backend.measure_layers_(weights, found[0], least, squares, *found[1:], steps, **options)
    assert len(launches) == 2
    backend.measure_layers_(
        weights[:1], found[0][:1], least[:1], [x.double() for x in squares],
        *([x.double() for x in numbers] for numbers in found[1:]), steps, **options,
    )  # fmt: skip
    assert len(launches) == 4


@not_finite
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_growths_are_measured_at_once(monkeypatch, dtype):
    """One launch for several blocks, an empty layer, and numbers beyond the dtype."""
    launches = record_launches(monkeypatch, backend.measure)
    squares = [draw(*shape, dtype=dtype).square() for shape in [(1500,), (13,), (0, 4)]]
    squares.append(squares[1].mean())
    squares += [torch.full((7,), value, dtype=dtype) for value in (torch.inf, torch.nan, 0.0)]
    squares.append(draw(90, dtype=dtype).square()[::3])
    steps = [torch.tensor(float(1 + 30 * i)) for i in range(len(squares))]
    for skip in (torch.tensor(True), torch.tensor(False), None):
        found, sought = (
            [[torch.full((), x, dtype=dtype) for _ in squares] for x in (1.5, 0.1)]
            for _ in range(2)
        )
        for ops, numbers in ((backend, found), (reference, sought)):
            ops.measure_growths_(
                squares, *numbers, steps, beta2=0.95, every=10, most=1.9, skip=skip
            )
        for numbers, expected in zip(found, sought, strict=True):
            torch.testing.assert_close(
                numbers, expected, rtol=SAME_GROWTH[dtype], atol=0, equal_nan=True
            )
    assert len(launches) == 3
    # More than a program adds.
    many = [torch.ones(backend.measure.MOST_SQUARES + 1)]
    numbers = [[torch.zeros(())] for _ in range(2)]
    backend.measure_growths_(many, *numbers, [steps[1]], beta2=0.0, every=10, most=1.9)
    assert numbers == [[1.0], [1.0]]
    assert len(launches) == 3


# The reference rounds each number of float32.
SAME_GROWTH = {torch.float32: 1e-5, torch.float64: 1e-12}


def test_weights_are_measured_at_once(monkeypatch):
    """One launch for several blocks and an empty one; where the flag says so none is written."""
    launches = record_launches(monkeypatch, backend.measure)
    weights = [draw(*shape, dtype=torch.float32) for shape in [(130, 70), (3, 2), (0, 4)]]
    results, least = [torch.zeros(()) for _ in weights], [0.1, 50.0, 0.2]
    backend.measure_weights_(weights, results, least, torch.tensor(True))
    assert not any(results)
    backend.measure_weights_(weights, results, least, torch.tensor(False))
    assert len(launches) == 2
    assert_near(results[0], weights[0].square().mean().sqrt(), PRODUCT[torch.float32])
    assert_near(torch.stack(results[1:]), torch.tensor([50.0, 0.2]), PRODUCT[torch.float32])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_are_rounded_at_once(monkeypatch, dtype):
    """As by the reference, which draws the same, in one launch."""
    launches = record_launches(monkeypatch, backend.rounding)
    check_rounding(backend, dtype)
    assert len(launches) == 1


@pytest.mark.parametrize("skip", [False, True])
def test_commit_that_is_skipped_changes_nothing(skip):
    check_skipped_commit(backend, torch.float32, skip)


@pytest.mark.parametrize("damping", [0.3, 0.6])
def test_commit_over_no_row_leaves_the_estimate(damping):
    check_commit_over_no_row(backend, torch.float32, damping)


def check_refresh(core, sketch, scale):
    found = basis, moved = backend.refresh_subspace(core, sketch)
    assert_near(basis.T @ basis, torch.eye(len(core)), PRODUCT[torch.float32])
    assert torch.equal(moved, moved.T)
    assert_same_estimate(found, reference.refresh_subspace(core, sketch), scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(rank=st.integers(1, 40), extra=st.integers(0, 30), damping=st.sampled_from([1e-3, 0.3, 10]))
def test_core(dtype, rank, extra, damping):
    root = draw(rank, rank, dtype=dtype)
    core, dim = root @ root.T, rank + extra
    trace = core.trace() * (1 if extra == 0 else 1.5)
    actual = backend.invert_core(core.T, trace, dim, damping, 1)
    assert_same(actual, reference.invert_core(core, trace, dim, damping, 1), SOLVE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", POWERS[1:])
@given(rank=st.integers(1, 32), extra=st.integers(0, 30), damping=st.sampled_from([1e-3, 0.3, 10]))
def test_core_to_a_power(power, dtype, rank, extra, damping):
    root = draw(rank, rank, dtype=dtype)
    core, dim = root @ root.T, rank + extra
    trace = core.trace() * (1 if extra == 0 else 1.5)
    actual = backend.invert_core(core.T, trace, dim, damping, power)
    exact = reference.invert_core(core.double(), trace.double(), dim, damping, power)
    assert_same(actual, [x.to(dtype) for x in exact], SOLVE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", POWERS[1:])
@pytest.mark.parametrize("kept", [1, 16, 31])
def test_steps_suffice_for_the_least_that_damping_admits(power, dtype, kept):
    """All but a few eigenvalues are zero, and lambda is its floor."""
    values = torch.zeros(32, dtype=dtype)
    values[:kept] = 1.0
    dim, damping = 32, 32 * 32 * torch.finfo(dtype).eps
    core = torch.diag(values)
    actual = backend.invert_core(core, core.trace(), dim, damping / 2, power)
    expected = reference.invert_core(core, core.trace(), dim, damping, power)
    assert_same(actual, expected, SOLVE, dtype)
    turn = torch.linalg.qr(draw(32, 32, dtype=torch.float64))[0]
    full = ((turn * values.double()) @ turn.T).to(dtype)
    full = (full + full.T) / 2
    found, _ = backend.invert_core(full, full.trace(), dim, damping / 2, power)
    exact, _ = reference.invert_core(full.double(), full.trace().double(), dim, damping, power)
    if dtype == torch.float32:
        assert_near(found, exact.to(dtype), SOLVE[dtype])
    # In float64 the reference errs by percents there. The fallback would be far smaller.
    assert found.norm() > exact.norm() / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_reach_from_one_rounding(dtype):
    """A few more than the unit's powers of 2.44; near 1 the distance is squared."""
    unit = torch.finfo(dtype).eps
    value = torch.tensor(unit, dtype=torch.float64)
    for _ in range(backend.core.root_steps(dtype)):
        value *= ((5 - value) / 4) ** 4
    assert 1 - value < unit
    assert backend.core.root_steps(dtype) == {torch.float32: 22, torch.float64: 46}[dtype]


@pytest.mark.parametrize("rank", [33, 65])
def test_powers_of_wide_cores_are_the_reference(rank):
    core = draw(rank, rank, dtype=torch.float32)
    core, trace = core @ core.T, core.square().sum()
    actual = backend.invert_core(core, trace, 80, 0.3, 0.5)
    expected = reference.invert_core(core, trace, 80, 0.3, 0.5)
    assert torch.equal(actual[0], expected[0])


@pytest.mark.parametrize("damping", [1e-3, 0.3])
@pytest.mark.parametrize("rank", [65, 97, 128])
def test_core_in_memory(rank, damping):
    root = draw(rank, rank, dtype=torch.float32)
    core = root @ root.T
    trace = core.trace() * 1.5
    actual = backend.invert_core(core, trace, 2 * rank, damping, 1)
    exact = reference.invert_core(core.double(), trace.double(), 2 * rank, damping, 1)
    assert_same(actual, [x.float() for x in exact], SOLVE, torch.float32)


@pytest.mark.parametrize("place", [3, 80])
def test_core_in_memory_that_is_not_positive_definite_falls_back(place):
    core = torch.eye(90)
    core[place, place] = -5.0
    expected = reference.invert_core(core, core.trace(), 100, 0.3, 1)
    actual = backend.invert_core(core, core.trace(), 100, 0.3, 1)
    assert_same(actual, expected, SOLVE, torch.float32)


@pytest.mark.parametrize("power", POWERS)
def test_cores_of_all_layers_at_once(monkeypatch, power):
    """One launch per padded rank, the same numbers as one by one."""
    launches = record_launches(monkeypatch, backend.core)
    cores, traces, dims = [], [], []
    for rank in (1, 7, 16, 32):
        root = draw(rank, rank, dtype=torch.float32)
        cores.append(root @ root.T)
        traces.append(2 * cores[-1].trace())
        dims.append(50)
    samples = [torch.tensor(count) for count in (1.0, 20.0, 49.5, 90.0)]
    found = backend.invert_cores(cores, traces, dims, 0.3, power, samples)
    assert len(launches) == 2
    for pair, *arguments, mine in zip(found, cores, traces, dims, samples, strict=True):
        expected = reference.invert_core(*arguments, 0.3, power, mine)
        assert_same(pair, expected, SOLVE, torch.float32)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("values", [[1.0, -0.9], [1.0, -5.0, 6.0], [2.0, -0.46]])
def test_core_that_is_not_positive_definite_falls_back(values, power):
    core = torch.diag(torch.tensor(values))
    actual = backend.invert_core(core, torch.tensor(6.0), 4, 0.3, power)
    expected = reference.invert_core(core, torch.tensor(6.0), 4, 0.3, power)
    assert_same(actual, expected, SOLVE, torch.float32)


@not_finite
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1e3])
def test_core_without_a_sensible_inverse(value, power):
    """What the reference gives: nothing finite, or for p = 1 a negative multiple of I."""
    core = value * torch.eye(2)
    found = backend.invert_core(core, torch.tensor(6.0), 4, 0.3, power)
    sought = reference.invert_core(core, torch.tensor(6.0), 4, 0.3, power)
    for actual, expected in zip(found, sought, strict=True):
        assert_near(actual.nan_to_num(), expected.nan_to_num(), SOLVE[torch.float32])
        assert torch.equal(actual.isfinite(), expected.isfinite())


@pytest.mark.parametrize("power", POWERS)
def test_core_with_a_trace_below_its_own(power):
    """What rounding leaves of t - tr M where U spans all rows is no negative rho."""
    core = torch.diag(torch.tensor([1.0, 5.0]))
    actual = backend.invert_core(core, torch.tensor(5.4), 4, 0.3, power)
    expected = reference.invert_core(core, torch.tensor(5.4), 4, 0.3, power)
    assert_same(actual, expected, SOLVE, torch.float32)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("damping", [1e-30, 0.3])
def test_core_of_nearly_nothing(damping, power):
    """Singular, and tiny: the damping's floor and the scale keep it finite."""
    core = torch.full((3, 3), 1e-30)
    actual = backend.invert_core(core, core.trace(), 3, damping, power)
    # What the floor is in float32.
    floored = max(damping, 3 * 32 * torch.finfo(torch.float32).eps)
    expected = reference.invert_core(core.double(), core.trace().double(), 3, floored, power)
    loose = damping < 0.1 and power == 1
    for found, sought in zip(actual, expected, strict=True):
        assert found.isfinite().all()
        found, sought = found.double() * 1e-30, sought * 1e-30
        assert_near(found, sought, 1e-2 if loose else SOLVE[torch.float32])


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_update(normalize, momentum, dtype, strided):
    found = make_update(dtype, normalize, momentum, strided)
    sought = make_update(dtype, normalize, momentum, strided)
    run_update(backend, found)
    run_update(reference, sought)
    compare_updates(found, sought, dtype)


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_update_that_is_skipped_writes_nothing(normalize, strided, skips):
    runs = run_skipping(backend, normalize, torch.float32, strided, skips)
    for actual, expected in zip(*runs, strict=True):
        assert torch.equal(actual, expected)


def compare_updates(found, sought, dtype):
    for key in ("params", "exp_avgs", "exp_avg_sqs", "steps"):
        for actual, expected in zip(found[key], sought[key], strict=True):
            assert_near(actual, expected, PRODUCT[dtype])


# Of a D that is given, that is formed in two passes, and by walking rows twice.
LAUNCHES = {
    "none": (1, 2, 2),
    "adam": (1, 2, 2),
    "rms": (2, 3, 2),
    "sgd": (2, 3, 2),
    "row": (3, 4, 3),
    "factored": (3, 4, 3),
}


@pytest.mark.parametrize("skip", [None, False, True])
def test_others_take_adams_update_in_one_launch(monkeypatch, skip):
    """As torch's fused op makes it, of any shapes; with a rate on the device."""
    launches = record_launches(monkeypatch, backend.update_plan)
    group = {"lr": torch.tensor(0.1), "momentum": 0.9, "beta2": 0.95, "eps": 1e-8}
    group |= {"weight_decay": 0.2, "low_precision": "nearest"}
    flag = None if skip is None else torch.tensor(skip)
    found = []
    for ops in (None, backend):
        params = [draw(*shape, dtype=torch.float32) for shape in [(3, 50, 50), (7,), (1,)]]
        states = [{} for _ in params]
        for seed in (1, 2):
            for param in params:
                param.grad = draw(*param.shape, dtype=torch.float32, seed=seed)
            adam_(params, states, group, None, flag, ops)
        found.append((params, states))
    assert len(launches) == 2
    for one, other in zip(*(params for params, _ in found), strict=True):
        assert_near(other, one, PRODUCT[torch.float32])
    for one, other in zip(*(states for _, states in found), strict=True):
        assert other["step"] == one["step"] == (0 if skip else 2)
        for key in ("exp_avg", "exp_avg_sq"):
            assert_near(other[key], one[key], PRODUCT[torch.float32])


# Of exp_avg_sqs: the layer's own, not the bias's.
OWN = ("rms", "row", "factored")


@pytest.mark.parametrize("way", ["given", "formed", "walked"])
@pytest.mark.parametrize("normalize", LAUNCHES)
def test_launches_of_an_update(monkeypatch, normalize, way):
    """As the table at the top of update.py says."""
    monkeypatch.setattr(backend.update_plan, "walks_twice", lambda *_: way == "walked")
    launches = record_launches(monkeypatch, backend.update_plan)
    option = make_update(torch.float32, normalize, 0.9, strided=False)
    option["inverses"] = [None] * 3
    if way != "given":
        for key, count in (("params", 2), ("gradients", 2), ("exp_avgs", 2), ("steps", 1)):
            option[key] = option[key][:count]
        squares = 1 if normalize in ("rms", "row") else 2
        option["exp_avg_sqs"] = option["exp_avg_sqs"][:squares]
        option["layer_sizes"], option["inverses"] = [2], [make_inverse(1002, 7, torch.float32)]
    run_update(backend, option)
    place = ["given", "formed", "walked"].index(way)
    assert len(launches) == LAUNCHES[normalize][place]


@pytest.mark.parametrize("normalize", ["none", "rms", "factored"])
def test_layers_of_all_ranks_and_a_given_direction_share_launches(monkeypatch, normalize):
    """The reference runs last, and launches nothing."""
    launches = record_launches(monkeypatch, backend.update_plan)
    options = [make_update(torch.float32, normalize, 0.9, strided=False) for _ in range(2)]
    for option, ops in zip(options, (backend, reference), strict=True):
        ranks = [make_inverse(dim, r, torch.float32) for dim, r in ((1002, 20), (3, 2))]
        option["inverses"] = [*ranks, None]
        # In the place of an empty layer, which is no tile.
        for key in ("params", "gradients", "exp_avgs"):
            option[key][3:] = [draw(*shape, dtype=torch.float32) for shape in ((6, 4), (6,))]
        if normalize == "factored":
            option["exp_avg_sqs"][4:] = [torch.ones(6), torch.ones(5)]
        run_update(ops, option)
    assert len(launches) == LAUNCHES[normalize][2]
    compare_updates(*options, torch.float32)


@not_finite  # of elements beyond the end, which are undefined
@pytest.mark.parametrize("bias", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", LAUNCHES)
def test_any_program_may_be_the_last_of_its_layer(monkeypatch, normalize, bias):
    """Of one launch, or with a bias of another dtype of two; three updates, one of them skipped."""
    builder = triton.runtime.interpreter.interpreter_builder
    set_index, results = builder.set_grid_idx, []

    def set_index_from_the_end(*at):
        set_index(*(n - 1 - i for n, i in zip(builder.grid_dim, at, strict=True)))

    for ops, order in (
        (backend, set_index),
        (backend, set_index_from_the_end),
        (reference, set_index),
    ):
        monkeypatch.setattr(builder, "set_grid_idx", order)
        option = make_update(torch.float32, normalize, 0.9, strided=False)
        for key in ("params", "gradients", "exp_avgs", "exp_avg_sqs"):
            if normalize not in OWN or key != "exp_avg_sqs":
                option[key][1:2] = [tensor.to(bias) for tensor in option[key][1:2]]
        for skip in (False, True, False):
            run_update(ops, {**option, "skip": torch.tensor(skip)})
        results.append(option)
    compare_updates(results[0], results[2], torch.float32)
    for key in ("params", "exp_avgs", "exp_avg_sqs", "steps"):
        assert all(map(torch.equal, results[0][key], results[1][key]))


@pytest.mark.parametrize("walks", [False, True])
@pytest.mark.parametrize("layout", ["rows", "columns", "mixed"])
@pytest.mark.parametrize("normalize", ["rms", "sgd", "row", "factored"])
def test_update_that_forms_its_directions(monkeypatch, normalize, layout, walks):
    """Several layers of different sizes and ranks, with and without a bias, in one launch."""
    monkeypatch.setattr(backend.update_plan, "walks_twice", lambda *_: walks)
    options = [make_update(torch.float32, normalize, 0.9, strided=False) for _ in range(2)]
    for option in options:
        found = [make_inverse(1002, 16, torch.float32), make_inverse(3, 2, torch.float32)]
        for index, inverse in enumerate(found):
            by_columns = layout == "columns" or (layout == "mixed" and index == 1)
            found[index] = inverse._replace(basis=lay_out(inverse.basis, by_columns))
        option["inverses"] = [*found, None]
        option["lr"] = torch.tensor(0.1)
    run_update(backend, options[0])
    run_update(reference, options[1])
    compare_updates(*options, torch.float32)


@pytest.mark.parametrize("normalize", OWN)
def test_update_through_a_dense_inverse_and_channels_last(normalize):
    """With a bias of another dtype."""
    results = []
    for ops in (backend, reference):
        option = make_update(torch.float32, normalize, 0.9, strided=False)
        matrix = torch.eye(1002) + 0.1 * draw(1002, 1002, dtype=torch.float32)
        option["inverses"] = [DenseInverse(matrix), None, None]
        shape = (4, 3, 2, 2)
        for key in ("params", "gradients", "exp_avgs"):
            tensor = draw(*shape, dtype=torch.float32, seed=len(key))
            option[key][2] = tensor.to(memory_format=torch.channels_last)
            option[key][1] = option[key][1].double()
        if normalize != "rms":
            at = 1 if normalize == "row" else 2
            option["exp_avg_sqs"][at] = torch.ones(4)
        if normalize == "factored":
            option["exp_avg_sqs"][3] = torch.ones(13)
        run_update(ops, option)
        results.append(option)
    compare_updates(*results, torch.float32)
    assert results[0]["params"][2].is_contiguous(memory_format=torch.channels_last)


@not_finite
def test_update_of_a_bad_gradient_spoils_its_layer_alone():
    option = make_update(torch.float32, "rms", 0.9, strided=False)
    option["gradients"][0][1, 1] = torch.nan
    run_update(backend, option)
    assert option["params"][0].isnan().all()
    assert option["params"][1].isnan().all()
    assert option["params"][2].isfinite().all()


@pytest.mark.parametrize("formed", [False, True])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_update_within_bounds_of_the_rate(normalize, formed):
    """Below lr and above it, with lr on the device; the decay follows lr."""
    options = [make_update(torch.float32, normalize, 0.9, strided=False) for _ in range(2)]
    for option, ops in zip(options, (backend, reference), strict=True):
        option["lr"] = torch.tensor(0.1)
        option["rates"] = torch.tensor([[0.01, 1.0], [0.3, 1.5], [0.0, 2.0]])
        if not formed:
            option["inverses"] = [None] * 3
        run_update(ops, option)
    compare_updates(*options, torch.float32)


@not_finite
def test_update_within_a_bound_that_is_not_a_number():
    option = make_update(torch.float32, "none", 0.9, strided=False)
    option["rates"] = torch.tensor([[0.01, 2.0], [torch.nan, 2.0], [0.0, 2.0]])
    run_update(backend, option)
    assert option["params"][0].isfinite().all()
    assert option["params"][2].isnan().all()


# Weight and bias of layers of one tile and of several; without columns, rows or both; convolutions.
AXIS_SHAPES = [(1, 1), (3, 200), (70, 64), (65, 130), (4, 0), (0, 4), (0, 0), (5, 2, 3, 3)]


@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("normalize", ["row", "factored"])
def test_mean_squares_of_rows_and_columns(normalize, frozen, dtype):
    """Two steps of layers with D given; c counts a bias that takes no step."""
    state, runs = torch.promote_types(dtype, torch.float32), []
    # The reference has no scale for a layer without columns or a bias.
    layers = [shape for shape in AXIS_SHAPES if not frozen or 0 not in shape[1:]]
    shapes, squares = [], []
    for shape in layers:
        shapes += [shape] if frozen else [shape, shape[:1]]
        squares += [shape[0]]
        squares += [torch.Size(shape[1:]).numel() + 1] if normalize == "factored" else []
    for ops in (backend, reference):
        option = {
            **make_update(dtype, normalize, 0.9, strided=False),
            "params": [draw(*shape, dtype=dtype) for shape in shapes],
            "exp_avgs": [torch.zeros(shape, dtype=state) for shape in shapes],
            "exp_avg_sqs": [torch.full((n,), 0.25, dtype=state) for n in squares],
            "steps": [torch.tensor(3.0) for _ in layers],
            "inverses": [None] * len(layers),
            "layer_sizes": [1 if frozen else 2] * len(layers),
        }
        for seed in (1, 2):
            option["gradients"] = [draw(*shape, dtype=dtype, seed=seed) for shape in shapes]
            run_update(ops, option)
        runs.append(option)
    compare_updates(*runs, dtype)
    if frozen and normalize == "factored":
        assert all(c[-1] == 0.25 for c in runs[0]["exp_avg_sqs"][1::2])


@not_finite
@pytest.mark.parametrize("formed", [False, True])
@pytest.mark.parametrize("normalize", ["row", "factored"])
def test_update_of_a_bad_gradient_spoils_its_row_or_its_layer(normalize, formed):
    """As in the reference: without P a row of "row", else the layer."""
    options = [make_update(torch.float32, normalize, 0.9, strided=False) for _ in range(2)]
    for option, ops in zip(options, (backend, reference), strict=True):
        option["gradients"][0][1, 1] = torch.nan
        if not formed:
            option["inverses"] = [None] * 3
        run_update(ops, option)
    for key in ("params", "exp_avgs", "exp_avg_sqs"):
        for found, sought in zip(options[0][key], options[1][key], strict=True):
            assert torch.equal(found.isnan(), sought.isnan())
            assert_near(found.nan_to_num(), sought.nan_to_num(), PRODUCT[torch.float32])
    assert options[0]["params"][0].isnan().any()


@pytest.mark.parametrize("normalize", ["row", "factored"])
def test_axes_of_zero_gradients_leave_the_decay(normalize):
    """Of zeros alone the mean of v is clamped, and the scale that of a zero."""
    option = make_update(torch.float32, normalize, 0.0, strided=False)
    before = [param.clone() for param in option["params"]]
    option["gradients"] = [torch.zeros_like(g) for g in option["gradients"]]
    option["exp_avg_sqs"] = [torch.zeros_like(v) for v in option["exp_avg_sqs"]]
    run_update(backend, option)
    for found, old in zip(option["params"], before, strict=True):
        assert_near(found, old * (1 - 0.1 * 0.2), PRODUCT[torch.float32])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_update_of_zero_gradients_decays_and_follows_the_average(momentum):
    options = [make_update(torch.float32, "sgd", momentum, strided=False) for _ in range(2)]
    for option, ops in zip(options, (backend, reference), strict=True):
        option["gradients"] = [torch.zeros_like(g) for g in option["gradients"]]
        run_update(ops, option)
    compare_updates(*options, torch.float32)


def test_update_refuses_averages_without_momentum():
    option = make_update(torch.float32, "rms", 0.9, strided=False)
    option["momentum"] = 0.0
    with pytest.raises(ValueError, match="expected exactly with momentum, got momentum 0"):
        run_update(backend, option)


def test_wide_ranks_and_double_take_the_reference():
    rank = configs.MAX_RANK + 1
    for dtype, r in ((torch.float32, rank), (torch.float64, 3)):
        rows, inverse = draw(3, rank, dtype=dtype), make_inverse(rank, r, dtype)
        actual = backend.precondition_rows(rows, inverse, ones=False)
        expected = reference.precondition_rows(rows, inverse, ones=False)
        assert torch.equal(actual[0], expected[0])
        assert isinstance(inverse, SubspaceInverse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 64, 100), (1, 1, 3), (3, 129, 40), (1, 600, 8), (2, 5, 0)])
def test_symmetric_products(shape, dtype):
    """Tiles on the diagonal, below it and at the edge; 600 rows take the larger ones."""
    x = (draw(*shape, dtype=torch.float32) / 4).to(dtype)
    product = symmetric.symmetric_product(x)
    assert_near(product, x.double() @ x.double().mT, PRODUCT[dtype])
    blended = symmetric.symmetric_product(product, 0.5, -2.0)
    expected = 0.5 * product.double() @ product.double().mT - 2.0 * product.double()
    assert_near(blended, expected, PRODUCT[dtype])


def test_orthogonal_updates_by_symmetric_products(monkeypatch):
    """Two launches a step for all matrices of a shape, turned or not."""
    launches = record_launches(monkeypatch, symmetric)
    matrices = [draw(*shape, dtype=torch.float32) for shape in [(30, 70), (70, 30), (16, 16)]]
    found = backend.orthogonal_updates(matrices)
    assert len(launches) == 2 * 2 * 5
    for actual, expected in zip(found, reference.orthogonal_updates(matrices), strict=True):
        assert_near(actual, expected, ITERATION[torch.float32])


def test_tables_in_use_are_kept():
    first = launch.upload([1, 2], torch.device("cpu"))
    dropped = launch.upload([3, 4], torch.device("cpu"))
    for value in range(launch.KEPT_TABLES):
        assert launch.upload([value], torch.device("cpu")).tolist() == [value]
        assert launch.upload([1, 2], torch.device("cpu")) is first
    assert launch.upload([3, 4], torch.device("cpu")) is not dropped
