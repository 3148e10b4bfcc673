"""The kernels on a GPU, against the reference on the same GPU; see benchmarks/device_check.sh."""

import copy

import pytest
import torch

from gls_fused import GLS, available_backends, build_info, reference
from gls_fused.dispatch import resolve_backend
from gls_fused.reference import SubspaceInverse

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
# Products of thousands of float32 terms, and the last rounding of 16-bit results.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


BACKENDS = ["triton", "native"]


def load(name):
    if name == "native" and (why := available_backends()[name] or build_info()["cuda_failure"]):
        pytest.skip(f"no CUDA kernels: {why}")
    return resolve_backend(name, ["cuda"])


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    return load(request.param)


def make_inverse(dim, rank, by_columns):
    generator = torch.Generator("cuda").manual_seed(0)
    normal = torch.randn(dim, rank, generator=generator, device="cuda")
    basis = torch.linalg.qr(normal)[0].contiguous()
    root = torch.randn(rank, rank, generator=generator, device="cuda")
    core = root @ root.T
    inverse = reference.invert_core(core, 2 * core.trace(), dim, 0.3)
    return SubspaceInverse(basis.T.contiguous().T if by_columns else basis, *inverse)


def check(found, expected, tolerance):
    for one, two in zip(found, expected, strict=True):
        error = torch.linalg.vector_norm(one.double() - two.double())
        assert error <= tolerance * torch.linalg.vector_norm(two.double()), error


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(128, 3072, 32), (1000, 77, 16), (5000, 768, 64), (1, 1, 2)])
def test_rows_and_sketch(backend, shape, dtype, by_columns):
    n, size, rank = shape
    inverse = make_inverse(size + 1, rank, by_columns)
    rows = torch.randn(n, size, device="cuda").to(dtype)
    found = backend.precondition_rows(rows, inverse, ones=True)
    check(found, reference.precondition_rows(rows, inverse, ones=True), TOLERANCE[dtype])
    exact = reference.sketch_rows(rows, inverse.basis.double(), ones=True)
    check(backend.sketch_rows(rows, inverse.basis, ones=True), exact, 1e-5)


@pytest.mark.parametrize("shape", [(3072, 32, 128), (768, 64, 9), (33, 33, 5)])
def test_refresh_and_core(backend, shape):
    dim, rank, n = shape
    rows = torch.randn(n, dim, device="cuda")
    basis = make_inverse(dim, rank, True).basis
    core, sketch, trace = reference.sketch_rows(rows, basis, ones=False)
    found = backend.refresh_subspace(core, sketch)
    expected = reference.refresh_subspace(core, sketch)
    check([found[0].T @ found[0]], [torch.eye(rank, device="cuda")], 1e-5)
    products = [u @ m @ u.T for u, m in (found, expected)]
    check(products[:1], products[1:], 3e-4)
    args = (expected[1], trace, dim, 0.3)
    check(backend.invert_core(*args), reference.invert_core(*args), 3e-4)


def test_dependent_columns_are_replaced(backend):
    """The basis stays orthonormal, and spans what the sketch does."""
    columns = torch.randn(40, 3, device="cuda")
    sketch = torch.cat([columns, columns[:, :1] * 2, torch.zeros(40, 1, device="cuda")], dim=1)
    basis, core = backend.refresh_subspace(torch.eye(5, device="cuda"), sketch)
    check([basis.T @ basis], [torch.eye(5, device="cuda")], 1e-5)
    check([basis @ (basis.T @ sketch)], [sketch], 1e-5)
    assert core.isfinite().all()


SHAPES = [(64, 128), (64,), (37, 33), (37,), (20, 8, 3, 3), (20,), (3, 5), (0, 4)]


def make_update(dtype, normalize, momentum, odd):
    """Two layers with P and a bias, one with P alone of rank 70, two of which D is given."""

    def draw(shape):
        # Not at 16 bytes where `odd`.
        numel = torch.Size(shape).numel()
        return torch.randn(numel + odd, device="cuda")[odd:].view(shape)

    state = torch.promote_types(dtype, torch.float32)
    squares = []
    if normalize == "rms":
        squares = [torch.rand((), device="cuda").to(state) for _ in range(5)]
    elif normalize == "adam":
        squares = [draw(shape).square().to(state) for shape in SHAPES]
    inverses = [make_inverse(*size) for size in [(129, 32, True), (34, 7, False), (5, 5, True)]]
    return [
        [draw(shape).to(dtype) for shape in SHAPES],
        [draw(shape).to(dtype) for shape in SHAPES],
        [draw(shape).to(state) for shape in SHAPES] if momentum else [],
        squares,
        [torch.full((), float(i), device="cuda") for i in range(5)],
        [*inverses[:2], None, inverses[2], None],
    ]


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("normalize", ["rms", "adam", "sgd", "none"])
def test_update(backend, normalize, momentum, dtype, odd):
    torch.manual_seed(0)
    found = make_update(dtype, normalize, momentum, odd)
    sought = copy.deepcopy(found)
    options = {
        "layer_sizes": [2, 2, 2, 1, 1], "normalize": normalize, "momentum": momentum,
        "beta2": 0.9, "eps": 1e-6, "weight_decay": 0.2,
    }  # fmt: skip
    backend.update_layers_(*found, lr=torch.tensor(0.1, device="cuda"), **options)
    reference.update_layers_(*sought, lr=0.1, **options)
    for mine, its in zip(found[:5], sought[:5], strict=True):
        check(mine, its, TOLERANCE[dtype])


def test_same_step_gives_the_same_bits(backend):
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        arguments = make_update(torch.float32, "rms", 0.9, 0)
        backend.update_layers_(
            *arguments, layer_sizes=[2, 2, 2, 1, 1], normalize="rms", lr=0.1, momentum=0.9,
            beta2=0.9, eps=1e-6, weight_decay=0.0,
        )  # fmt: skip
        rows = torch.randn(3000, 77, device="cuda")
        sketch = backend.sketch_rows(rows, make_inverse(78, 16, True).basis, ones=True)
        results.append([*arguments[0], *sketch])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_scaled_gradients_and_skipped_steps():
    load("native")
    update = torch.ops.gls_fused.update_layers_
    start = make_update(torch.float32, "rms", 0.9, 0)
    scale = torch.tensor(1024.0, device="cuda")
    ways = []
    for grad_scale, found_inf in [(None, None), (scale, None), (scale, torch.ones_like(scale))]:
        *tensors, inverses = copy.deepcopy(start)
        if grad_scale is not None:
            tensors[1] = [gradient * grad_scale for gradient in tensors[1]]
        parts = zip(*(inverse or (None,) * 3 for inverse in inverses), strict=True)
        options = ([2, 2, 2, 1, 1], "rms", 0.1, 0.9, 0.9, 1e-6, 0.0)
        update(*tensors, *map(list, parts), *options, None, grad_scale, found_inf)
        ways.append(tensors)
    plain, scaled, skipped = ways
    for at in (0, 2, 3, 4):
        check(scaled[at], plain[at], 1e-5)
        assert all(map(torch.equal, skipped[at], start[at]))


@pytest.mark.parametrize("fast", BACKENDS)
@pytest.mark.parametrize("site", ["step", "backward"])
@pytest.mark.parametrize("normalize", ["rms", "adam", "none"])
def test_ten_steps(site, normalize, fast):
    """No further from float64 than five times the reference in float32."""
    load(fast)
    torch.manual_seed(0)
    start = torch.nn.Sequential(
        torch.nn.Linear(50, 40), torch.nn.Tanh(), torch.nn.Linear(40, 10)
    ).cuda()
    ways = []
    for name, dtype in (
        ("reference", torch.float64),
        ("reference", torch.float32),
        (fast, torch.float32),
    ):
        model = copy.deepcopy(start).to(dtype)
        optimizer = GLS(
            model, lr=1e-2, rank=8, curvature_every=2, normalize=normalize, site=site, backend=name
        )
        for step in range(10):
            torch.manual_seed(step)
            inputs = torch.randn(64, 50, device="cuda").to(dtype)
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
        pairs = zip(model.parameters(), start.parameters(), strict=True)
        ways.append(torch.cat([(p.double() - q.double()).flatten() for p, q in pairs]))
    exact, single, found = ways
    allowed = max(5 * float((single - exact).norm()), 1e-4 * float(exact.norm()))
    assert (found - exact).norm() <= allowed
