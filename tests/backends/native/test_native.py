"""The native ops one by one: sizes at both ends, numbers of threads, and the reference's steps."""

import os
import platform
import random

import pytest
import torch
from native_arguments import ones, update_options, valid_arguments
from nets import KINDS, loss_of, make_batch, make_net
from test_backends import (
    check_commit,
    check_skipped_commit,
    draw,
    make_inverse,
    start_estimates,
)
from tolerances import PRODUCT, SAME_STEPS, assert_near

from gls_fused import GLS, available_backends, reference
from gls_fused.backends.dispatch import resolve_backend
from gls_fused.curvature.estimate import COMMITTED
from gls_fused.reference import SubspaceInverse

if (why := available_backends()["native"]) is not None:
    pytest.skip(why, allow_module_level=True)
native = resolve_backend("native", ["cpu"])
ops = torch.ops.gls_fused


# ---- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_ones", [True, False])
@pytest.mark.parametrize("rank", [0, 1, 5])
@pytest.mark.parametrize("size", [0, 3])
@pytest.mark.parametrize("n", [0, 9])
def test_no_rows_no_columns_no_rank(n, size, rank, with_ones):
    dim = size + with_ones
    rows, basis = draw(n, size, dtype=torch.float32), draw(dim, rank, dtype=torch.float32)
    inverse = SubspaceInverse(basis, draw(rank, rank, dtype=torch.float32), torch.tensor(0.5))
    bias = draw(n, dtype=torch.float32) if with_ones else None
    found = (
        *native.precondition_rows(rows, inverse, ones=with_ones),
        *native.precondition_gradient(rows, bias, inverse),
        *native.sketch_rows(rows, basis, ones=with_ones),
    )
    sought = (
        *reference.precondition_rows(rows, inverse, ones=with_ones),
        *reference.precondition_gradient(rows, bias, inverse),
        *reference.sketch_rows(rows, basis, ones=with_ones),
    )
    for actual, expected in zip(found, sought, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            assert_near(actual, expected, PRODUCT[torch.float32])


def test_no_rank():
    basis, core, *_ = ops.refresh_subspace(ones(0, 0), ones(3, 0))
    assert (basis.shape, core.shape) == ((3, 0), (0, 0))
    core_inverse, shift = ops.invert_core(ones(0, 0), torch.tensor(6.0), 3, 0.5)
    assert core_inverse.shape == (0, 0)
    # lambda = 0.5 * 6 / 3, and all of the trace is outside the basis.
    assert_near(shift, torch.tensor(3.0), PRODUCT[torch.float32])


def test_no_rows_add_nothing():
    sums = ones(2 + 4 + 6)
    ops.add_sketch_(ones(0, 3), ones(3, 2), False, sums)
    assert torch.equal(sums, ones(12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("power", "counts"), [(1, True), (0.5, True), (0.5, False)])
def test_commit_of_all_layers_at_once(dtype, threads, power, counts):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check_commit(native, dtype, counts, power)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("skip", [False, True])
def test_commit_that_is_skipped_changes_nothing(skip):
    check_skipped_commit(native, torch.float32, skip)


def test_what_ops_write_to_has_another_version():
    """So that autograd notices where it is saved for a backward."""
    _, state, sums = start_estimates(native, torch.float32, 1)[0]
    layer = ones(2, 3), ones(2)
    step = torch.zeros(())
    written = [*(state[name] for name in COMMITTED), *layer, step]
    before = [tensor._version for tensor in written]
    native.commit_subspaces_(
        [[state[name] for name in COMMITTED]], [sums], [[]], beta=0.9, damping=0.3, power=1
    )
    native.update_layers_(
        layer, (ones(2, 3), ones(2)), [], [], [step], [None], layer_sizes=[2], normalize="none",
        lr=0.1, momentum=0.0, beta2=0.9, eps=0.0, weight_decay=0.0,
    )  # fmt: skip
    assert all(tensor._version > old for tensor, old in zip(written, before, strict=True))


def test_layer_without_columns_moves_its_bias():
    options = update_options(params=[ones(2, 0), ones(2)], gradients=[ones(2, 0), ones(2)])
    options.update(bases=[ones(1, 1)], core_inverses=[-0.25 * ones(1, 1)], shifts=[2 * ones()])
    ops.update_layers_(**options, layer_sizes=[2])
    # lr = 0.1, and P, which is [1, 1], is 0.25.
    assert_near(options["params"][1], ones(2) - 0.1 * 0.25, PRODUCT[torch.float32])


def test_more_elements_than_32_bits_count():
    # One row in memory; small integers, whose sums are exact.
    row = (torch.arange(1024, dtype=torch.float64) % 3)[None]
    basis = ((torch.arange(1024) % 7 == 0).double() - 2)[:, None]
    n = 2**21 + 3
    found = ops.sketch_rows(row.expand(n, -1), basis, False)
    for actual, expected in zip(found, reference.sketch_rows(row, basis, ones=False), strict=True):
        assert torch.equal(actual, n * expected)


@pytest.fixture
def far(tmp_path):
    """Lays the rows of a matrix 2^30 elements apart, in a file that takes no space between them."""

    def lay(values):
        rows, columns = values.shape
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        size = (rows - 1) * 2**30 + columns
        memory = torch.from_file(str(path), shared=True, size=size, dtype=values.dtype)
        return memory.as_strided((rows, columns), (2**30, 1)).copy_(values)

    return lay


def test_offsets_that_32_bits_do_not_hold(far):
    rows, bias = draw(5, 6, dtype=torch.float32), draw(5, dtype=torch.float32)
    basis, core_inverse, shift = inverse = make_inverse(7, 4, torch.float32)
    far_rows, far_basis, far_bias = far(rows), far(basis.T).T, far(bias[:, None])[:, 0]
    far_inverse = far_basis, far(core_inverse), shift
    sums, far_sums = torch.zeros(2, 2 + 16 + 28)
    ops.add_sketch_(rows, basis, True, sums)
    ops.add_sketch_(far_rows, far_basis, True, far_sums)
    found = (
        *ops.precondition_rows(far_rows, *far_inverse, True),
        *ops.precondition_gradient(far_rows, far_bias, *far_inverse),
        *ops.sketch_rows(far_rows, far_basis, True),
        *ops.invert_core(far(core_inverse @ core_inverse), ones(), 7, 0.3),
        far_sums,
    )
    sought = (
        *ops.precondition_rows(rows, *inverse, True),
        *ops.precondition_gradient(rows, bias, *inverse),
        *ops.sketch_rows(rows, basis, True),
        *ops.invert_core(core_inverse @ core_inverse, ones(), 7, 0.3),
        sums,
    )
    # Not to the last bit, as BLAS may take other strides in another way.
    for actual, expected in zip(found, sought, strict=True):
        assert_near(actual, expected, PRODUCT[torch.float32])


@pytest.mark.parametrize("normalize", ["rms", "row", "factored", "adam", "sgd", "none"])
def test_addresses_change_no_bit(normalize):
    """Of an update of fewer numbers than fill a vector, between memory that comes and goes."""
    given, found = [draw(*shape, dtype=torch.float64) for shape in ((3, 5), (3,))], set()
    inverse = make_inverse(6, 2, torch.float64)
    shapes = {"rms": [()], "row": [(3,)], "factored": [(3,), (6,)], "adam": [(3, 5), (3,)]}
    for seed in range(20):
        rng = random.Random(seed)
        held, largest, leaving = [], rng.choice([20, 100]), rng.uniform(0, 0.5)
        for _ in range(400):
            held.append(torch.empty(rng.randint(1, largest)))
            if rng.random() < leaving:
                held.pop(rng.randrange(len(held)))
            params, gradients, averages = ([x.clone() for x in given] for _ in range(3))
            squares = [torch.ones(shape).double() for shape in shapes.get(normalize, [])]
            native.update_layers_(
                params, gradients, averages, squares, [torch.zeros(())], [inverse],
                layer_sizes=[2], normalize=normalize, lr=0.1, momentum=0.9, beta2=0.9, eps=1e-8,
                weight_decay=0.1,
            )  # fmt: skip
            written = [x.flatten() for x in (*params, *averages, *squares)]
            found.add(tuple(torch.cat(written).tolist()))
    assert len(found) == 1


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere they cost no time")
@pytest.mark.parametrize("normalize", ["rms", "row", "factored", "adam", "sgd", "none"])
def test_numbers_below_the_normal_range_are_taken_for_zero(normalize):
    """Of the momentum of a dead unit; and the threads go on as they were."""
    shape = (300, 400)
    param, gradient, average = torch.ones(shape), torch.zeros(shape), torch.full(shape, 1e-40)
    shapes = {"rms": [()], "row": [(300,)], "factored": [(300,), (400,)], "adam": [shape]}
    squares = [torch.ones(shape) for shape in shapes.get(normalize, [])]
    torch.set_num_threads(2)
    try:
        native.update_layers_(
            [param], [gradient], [average], squares, [torch.zeros(())], [None], layer_sizes=[1],
            normalize=normalize, lr=0.1, momentum=0.9, beta2=0.9, eps=1e-8, weight_decay=0.0,
        )  # fmt: skip
        assert torch.equal(param, torch.ones(shape))
        assert not average.any()
        assert torch.full((1 << 20,), 1e-40).mul(0.5).all()
    finally:
        torch.set_num_threads(1)


FREE_MEMORY = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
takes_9_gb = pytest.mark.skipif(FREE_MEMORY < 12 * 10**9, reason="needs 12 GB of free memory")


@pytest.mark.slow
@takes_9_gb
def test_results_of_more_elements_than_32_bits_count():
    inverse = make_inverse(2048, 1, torch.float32)
    row, n = draw(1, 2048, dtype=torch.float32), 2**20 + 3
    product, _ = ops.precondition_rows(row.expand(n, -1), *inverse, False)
    expected, _ = ops.precondition_rows(row.expand(100, -1), *inverse, False)
    for i in (0, 2**20 - 1, 2**20, n - 1):
        assert torch.equal(product[i], expected[0])


@pytest.mark.parametrize("normalize", ["rms", "row", "factored", "adam", "sgd", "none"])
def test_update_of_more_layers_than_fit_in_one_run(normalize):
    """Each as by itself, with its own bias, inverse, squares, bound and growth."""
    layers = [((40, 700), 2), ((900, 800), 1), ((700, 900), 2), ((3, 5), 2), ((2048, 513), 1)]

    def make():
        lists = {key: [] for key in ("params", "gradients", "exp_avgs", "exp_avg_sqs", "inverses")}
        for seed, ((m, k), size) in enumerate(layers):
            shapes = [(m, k), (m,)][:size]
            for place, key in enumerate(("params", "gradients", "exp_avgs")):
                lists[key] += [
                    draw(*s, dtype=torch.float64, seed=10 * seed + place) for s in shapes
                ]
            kept = {"rms": [()], "row": [(m,)], "factored": [(m,), (k + size - 1,)]}
            kept = shapes if normalize == "adam" else kept.get(normalize, [])
            lists["exp_avg_sqs"] += [
                draw(1, *s, dtype=torch.float64, seed=seed)[0].square() for s in kept
            ]
            inverse = make_inverse(k + size - 1, 4, torch.float64)
            lists["inverses"].append(None if seed == 3 else inverse)
        return {**lists, "steps": [torch.tensor(float(i)) for i in range(len(layers))]}

    found, sought = make(), make()
    bounds, growths = [0.0625, 0.015625, 0.03125, 0.5, 0.125], [1.0, 2.0, 1.5, 1.25, 0.5]
    for backend, arrays in ((native, found), (reference, sought)):
        backend.update_layers_(
            **arrays, layer_sizes=[size for _, size in layers], normalize=normalize, lr=0.125,
            momentum=0.9, beta2=0.95, eps=1e-8, weight_decay=0.01,
            rates=torch.tensor([bounds, growths]).T,
        )  # fmt: skip
    for key in ("params", "exp_avgs", "exp_avg_sqs", "steps"):
        for actual, expected in zip(found[key], sought[key], strict=True):
            assert_near(actual, expected, SAME_STEPS)


@pytest.mark.slow
@takes_9_gb
def test_parameter_of_more_elements_than_32_bits_count():
    param, gradient = ones(2, 2**31 + 5, dtype=torch.bfloat16)
    options = update_options(params=[param], gradients=[gradient], normalize="rms", lr=0.5)
    ops.update_layers_(**{**options, "exp_avg_sqs": [torch.zeros(())]}, layer_sizes=[1])
    # The mean square is one, so the step is lr.
    assert param.aminmax() == (0.5, 0.5)


@pytest.mark.parametrize(
    "op",
    [
        "take_patches",
        "orthogonalize_each",
        "blend_directions_",
        "move_weights_",
        "commit_subspaces_",
        "measure_weights_",
        "measure_growths_",
    ],
)
def test_ops_that_the_cpu_alone_has_are_proper_torch_ops(op):
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(ops, op).default, (), valid_arguments(op), test_utils=tests)


# ---- threads ------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    yield torch.set_num_threads
    torch.set_num_threads(1)


def large_calls():
    """Our own sums on what is worth a second thread; update_layers_ is in test_backends."""
    rows, bias = draw(203, 3000, dtype=torch.float32), draw(203, dtype=torch.float32)
    inverse = make_inverse(3001, 17, torch.float32)
    core, sketch, trace = reference.sketch_rows(rows, inverse.basis, ones=True)

    return {
        "precondition_rows": lambda: ops.precondition_rows(rows, *inverse, True),
        "precondition_gradient": lambda: ops.precondition_gradient(rows, bias, *inverse),
        "refresh_subspace": lambda: ops.refresh_subspace(core, sketch),
        "invert_core": lambda: ops.invert_core(core, trace, 3001, 0.3),
    }


@pytest.mark.parametrize("call", large_calls().values(), ids=large_calls())
def test_number_of_threads_changes_nothing(call, threads):
    one = call()
    threads(2)
    assert all(map(torch.equal, call(), one))


@pytest.mark.parametrize("normalize", ["row", "factored"])
@pytest.mark.parametrize("turned", [False, True])
def test_threads_share_the_pieces_of_many_layers(normalize, turned, threads):
    """Each has the bits that it has alone, whatever the others' sizes and the number of threads."""
    shapes = [(90, 70), (1, 5), (700, 300), *[(120, 110)] * 12, (0, 4), (40, 2000)]

    def make(seed, shape):
        tensors = [draw(*shape, dtype=torch.float32, seed=100 * seed + i) for i in range(3)]
        if turned:
            tensors = [tensor.T.contiguous().T for tensor in tensors]
        sizes = [shape[:1]] if normalize == "row" else [shape[:1], shape[1:]]
        return [[tensor] for tensor in tensors], [torch.ones(size) for size in sizes]

    def step(layers):
        tensors, squares = zip(*layers, strict=True)
        lists = [[x for part in parts for x in part] for parts in zip(*tensors, strict=True)]
        native.update_layers_(
            *lists, [x for part in squares for x in part], [torch.zeros(()) for _ in layers],
            [None] * len(layers), layer_sizes=[1] * len(layers), normalize=normalize, lr=0.1,
            momentum=0.9, beta2=0.9, eps=1e-8, weight_decay=0.01,
        )  # fmt: skip
        return [*lists[0], *lists[2], *(x for part in squares for x in part)]

    alone = [step([make(*layer)]) for layer in enumerate(shapes)]
    params, averages, *squares = zip(*alone, strict=True)
    sought = [*params, *averages, *(x for own in zip(*squares, strict=True) for x in own)]
    for count in (1, 2, 3):
        threads(count)
        found = step([make(*layer) for layer in enumerate(shapes)])
        assert all(torch.equal(*pair) for pair in zip(found, sought, strict=True))


def test_sketch_by_two_threads(threads):
    """BLAS adds up in another order then."""
    rows = draw(203, 3000, dtype=torch.float32)
    basis = make_inverse(3001, 17, torch.float32).basis
    threads(2)
    found = ops.sketch_rows(rows, basis, True)
    exact = reference.sketch_rows(rows, basis.double(), ones=True)
    for actual, expected in zip(found, exact, strict=True):
        assert_near(actual, expected, PRODUCT[torch.float32])


@pytest.mark.parametrize("normalize", ["rms", "adam", "sgd", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_ten_steps_are_the_references(kind, normalize):
    trained = []
    for backend in ("native", "reference"):
        model = make_net(kind)
        options = {"rank": 5, "curvature_every": 1, "normalize": normalize, "lr": 0.01}
        with GLS(model, backend=backend, **options) as optimizer:
            for step in range(10):
                optimizer.zero_grad()
                loss_of(model, make_batch(kind, 7, step)).backward()
                optimizer.step()
        trained.append(list(model.parameters()))
    for ours, theirs in zip(*trained, strict=True):
        assert_near(ours, theirs, SAME_STEPS)


# ---- what the update is told in tensors ---------------------------------------------------------


def run_scaled(grad_scale=None, found_inf=None, lr=0.1, lr_tensor=None):
    """All tensors of a step of one layer with P, its gradients multiplied by `grad_scale`."""
    basis, core_inverse, shift = make_inverse(4, 2, torch.float32)
    gradients = [draw(2, 3, dtype=torch.float32), draw(2, dtype=torch.float32)]
    if grad_scale is not None:
        gradients = [gradient * grad_scale for gradient in gradients]
    options = update_options(
        gradients=gradients, exp_avgs=[ones(2, 3), ones(2)], exp_avg_sqs=[ones()], bases=[basis],
        core_inverses=[core_inverse], shifts=[shift], normalize="rms", momentum=0.9, lr=lr,
    )  # fmt: skip
    before = [gradient.clone() for gradient in gradients]
    scalars = {"grad_scale": grad_scale, "found_inf": found_inf, "lr_tensor": lr_tensor}
    ops.update_layers_(**options, layer_sizes=[2], **scalars)
    assert all(map(torch.equal, gradients, before))
    return [*options["params"], *options["exp_avgs"], *options["exp_avg_sqs"], *options["steps"]]


def test_scaled_gradients_take_the_same_step():
    for found, expected in zip(run_scaled(torch.tensor(1024.0)), run_scaled(), strict=True):
        assert_near(found, expected, PRODUCT[torch.float32])


def test_a_step_with_infinite_gradients_is_not_taken():
    scale = torch.tensor(float("inf"))
    found = run_scaled(scale, torch.tensor(1.0))
    start = [ones(2, 3), ones(2), ones(2, 3), ones(2), ones(), torch.zeros(())]
    assert all(map(torch.equal, found, start))
    assert not torch.equal(run_scaled(None, torch.tensor(0.0))[0], start[0])


def test_lr_may_be_a_tensor():
    for found, expected in zip(
        run_scaled(lr=7.0, lr_tensor=torch.tensor(0.1, dtype=torch.float64)), run_scaled(),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["grad_scale", "found_inf", "lr_tensor"])
def test_a_scalar_of_two_numbers_is_refused(name):
    with pytest.raises(RuntimeError, match=rf"expected {name} of one Float or Double, got \[2\]"):
        ops.update_layers_(**update_options(), layer_sizes=[2], **{name: ones(2)})
