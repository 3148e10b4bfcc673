"""The kernels on a GPU, against the reference on the same GPU; see benchmarks/device_check.sh.

Where there is none the native backend runs on the CPU, which tests these tests, and under
TRITON_INTERPRET=1 Triton's interpreter, which takes minutes for all of them.
"""

import copy
import os

import pytest
import torch

from gls_fused import GLS, available_backends, build_info, reference
from gls_fused.backends.dispatch import resolve_backend
from gls_fused.reference import SubspaceInverse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Products of thousands of float32 terms, and the last rounding of 16-bit results.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton", "native"] if DEVICE == "cuda" or INTERPRETED else ["native"]


def load(name):
    why = available_backends()[name]
    if name == "native" and DEVICE == "cuda":
        why = why or build_info()["cuda_failure"]
    if why:
        pytest.skip(f"no {name} kernels: {why}")
    return resolve_backend(name, [DEVICE])


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    return load(request.param)


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def make_inverse(dim, rank, by_columns, dtype=torch.float32):
    generator = torch.Generator(DEVICE).manual_seed(0)
    normal = torch.randn(dim, rank, generator=generator, device=DEVICE, dtype=torch.float64)
    basis = torch.linalg.qr(normal)[0]
    root = torch.randn(rank, rank, generator=generator, device=DEVICE, dtype=torch.float64)
    core = root @ root.T
    exact = (basis, *reference.invert_core(core, 2 * core.trace(), dim, 0.3))
    basis, *rest = (x.to(wide(dtype)).contiguous() for x in exact)
    return SubspaceInverse(basis.T.contiguous().T if by_columns else basis, *rest)


def check(found, expected, tolerance):
    for one, two in zip(found, expected, strict=True):
        error = torch.linalg.vector_norm(one.double() - two.double())
        assert error <= tolerance * torch.linalg.vector_norm(two.double()), error


SHAPES = [(128, 3072, 32), (1000, 77, 16), (5000, 768, 64), (300, 200, 96), (1, 2, 2)]


@pytest.mark.parametrize(("by_columns", "ones"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_and_sketch(backend, shape, dtype, by_columns, ones):
    n, size, rank = shape
    inverse = make_inverse(size + ones, rank, by_columns, dtype)
    rows = torch.randn(n, size, device=DEVICE).to(dtype)
    found = backend.precondition_rows(rows, inverse, ones=ones)
    expected = reference.precondition_rows(rows, inverse, ones=ones)
    check(found[: 1 + ones], expected[: 1 + ones], TOLERANCE[dtype])
    exact = reference.sketch_rows(rows, inverse.basis.double(), ones=ones)
    check(backend.sketch_rows(rows, inverse.basis, ones=ones), exact, TOLERANCE[wide(dtype)])


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_of_a_sketch(shape, dtype, ones):
    load("native")
    n, size, rank = shape
    rows = torch.randn(n, size, device=DEVICE).to(dtype)
    basis = make_inverse(size + ones, rank, True, dtype).basis
    core, sketch, trace = reference.sketch_rows(rows, basis.double(), ones=ones)
    head = torch.stack([torch.full_like(trace, n), trace])
    fresh = torch.cat([head, core.flatten(), sketch.T.flatten()])
    sums = torch.ones_like(fresh).to(basis.dtype)
    torch.ops.gls_fused.add_sketch_(rows, basis, ones, sums)
    check([sums], [1 + fresh], TOLERANCE[wide(dtype)])
    before = sums.clone()
    rows[-1, -1] = torch.inf
    torch.ops.gls_fused.add_sketch_(rows, basis, ones, sums)
    assert torch.equal(sums, before)


@pytest.mark.parametrize("library", ["cublas", "cublaslt"])
@pytest.mark.parametrize("rank", [64, 96])
@pytest.mark.filterwarnings("default:torch.backends.cuda.preferred_blas_library")
def test_products_keep_float32_where_tf32_is_allowed(rank, library):
    native = load("native")
    preferred = torch.backends.cuda.preferred_blas_library()
    inverse = make_inverse(768, rank, True)
    rows = torch.randn(3000, 768, device=DEVICE)
    torch.backends.cuda.preferred_blas_library(library)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        (product, _), sketch = (
            native.precondition_rows(rows, inverse, ones=False),
            native.sketch_rows(rows, inverse.basis, ones=False),
        )
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.preferred_blas_library(preferred)
    exact = SubspaceInverse(*(x.double() for x in inverse))
    check([product], [reference.precondition_rows(rows.double(), exact, ones=False)[0]], 1e-5)
    check(sketch, reference.sketch_rows(rows, exact.basis, ones=False), 1e-5)


@pytest.mark.parametrize("shape", [(3072, 32, 128), (768, 64, 9), (33, 33, 5)])
def test_refresh_and_core(backend, shape):
    dim, rank, n = shape
    rows = torch.randn(n, dim, device=DEVICE)
    basis = make_inverse(dim, rank, True).basis
    core, sketch, trace = reference.sketch_rows(rows, basis, ones=False)
    found = backend.refresh_subspace(core, sketch)
    expected = reference.refresh_subspace(core, sketch)
    check([found[0].T @ found[0]], [torch.eye(rank, device=DEVICE)], 1e-5)
    products = [u @ m @ u.T for u, m in (found, expected)]
    check(products[:1], products[1:], 3e-4)
    args = (expected[1], trace, dim, 0.3)
    check(backend.invert_core(*args), reference.invert_core(*args), 3e-4)


def test_dependent_columns_are_replaced(backend):
    """The basis stays orthonormal, and spans what the sketch does."""
    columns = torch.randn(40, 3, device=DEVICE)
    sketch = torch.cat([columns, columns[:, :1] * 2, torch.zeros(40, 1, device=DEVICE)], dim=1)
    basis, core = backend.refresh_subspace(torch.eye(5, device=DEVICE), sketch)
    check([basis.T @ basis], [torch.eye(5, device=DEVICE)], 1e-5)
    check([basis @ (basis.T @ sketch)], [sketch], 1e-5)
    assert core.isfinite().all()


# Weight and bias; rank of P, the last beyond the kernels' and the others' D given.
LAYERS = [
    ([(64, 128), (64,)], 32),
    ([(37, 33), (37,)], 7),
    ([(20, 8, 3, 3), (20,)], 9),
    ([(20, 8, 3, 3), (20,)], None),
    ([(3, 5)], 5),
    ([(0, 4)], None),
    ([(40, 120), (40,)], 96),
]
LAYOUTS = {
    "plain": torch.Tensor.contiguous,
    # Not at 16 bytes.
    "odd": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    "channels_last": lambda x: x.to(memory_format=torch.channels_last) if x.dim() == 4 else x,
    "strided": lambda x: torch.stack([x, x], dim=-1)[..., 1],
    "expanded": lambda x: x[:1].clone().expand(x.shape),
}


def make_update(dtype, normalize, momentum, layers=LAYERS, layout=("plain", "plain")):
    """All of `update_layers_`; `layout` of the parameters and their averages, of the gradients."""
    torch.manual_seed(0)
    state = wide(dtype)
    shapes = [shape for mine, _ in layers for shape in mine]

    def draw(kind, dtype):
        tensors = [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]
        return [LAYOUTS[kind](x) if x.numel() else x for x in tensors]

    squares = []
    if normalize == "rms":
        squares = [torch.rand((), device=DEVICE).to(state) for _ in layers]
    elif normalize == "adam":
        squares = [x.square_() for x in draw(layout[0], state)]
    inverses = []
    for i, (mine, rank) in enumerate(layers):
        dim = torch.Size(mine[0][1:]).numel() + len(mine) - 1
        inverses.append(None if rank is None else make_inverse(dim, rank, i % 2 == 0, dtype))
    tensors = [
        draw(layout[0], dtype),
        draw(layout[1], dtype),
        draw(layout[0], state) if momentum else [],
        squares,
        [torch.full((), float(i), device=DEVICE) for i in range(len(layers))],
        inverses,
    ]
    options = {
        "layer_sizes": [len(mine) for mine, _ in layers], "normalize": normalize,
        "momentum": momentum, "beta2": 0.9, "eps": 1e-6, "weight_decay": 0.2,
    }  # fmt: skip
    return tensors, options


def check_update(backend, dtype, normalize, momentum, **which):
    found, options = make_update(dtype, normalize, momentum, **which)
    sought = copy.deepcopy(found)
    lr = torch.tensor(0.1, device=DEVICE)
    backend.update_layers_(*found, lr=lr, **options)
    reference.update_layers_(*sought, lr=float(lr), **options)
    for mine, its in zip(found[:5], sought[:5], strict=True):
        check(mine, its, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("normalize", ["rms", "adam", "sgd", "none"])
def test_update(backend, normalize, momentum, dtype):
    check_update(backend, dtype, normalize, momentum)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("normalize", ["adam", "sgd"])
@pytest.mark.parametrize(
    "layout",
    [
        ("odd", "odd"),
        ("channels_last", "channels_last"),
        ("channels_last", "plain"),
        ("strided", "plain"),
        ("plain", "strided"),
        ("plain", "expanded"),
    ],
    ids="-".join,
)
def test_layouts(backend, layout, normalize, dtype):
    check_update(backend, dtype, normalize, 0.9, layout=layout)


# More than a table of the native kernels holds: 64 parameters, 28 layers with P, 80 layers, 32
# bases, 64 cores. The first has no bias, so that a layer's two are in two tables.
MANY = [([(70, 64)], None)] + [([(5, i % 7 + 1), (5,)], None) for i in range(35)]
MANY += [([(5, 8 - i % 2), (5,)], 2) for i in range(60)]


@pytest.mark.parametrize("normalize", ["rms", "sgd"])
def test_many_layers(backend, normalize):
    check_update(backend, torch.float32, normalize, 0.9, layers=MANY)


def test_many_cores_and_bases(backend):
    rows = [torch.randn(9, 20 + i, device=DEVICE) for i in range(70)]
    sketches = [
        reference.sketch_rows(x, make_inverse(x.shape[1], 1 + i % 5, True).basis, ones=False)
        for i, x in enumerate(rows)
    ]
    cores, sketched, traces = (list(parts) for parts in zip(*sketches, strict=True))
    moved = backend.refresh_subspaces(cores, sketched)
    for found, expected in zip(moved, reference.refresh_subspaces(cores, sketched), strict=True):
        check(*([u @ m @ u.T] for u, m in (found, expected)), 3e-4)
    dims = [x.shape[1] for x in rows]
    inverted = backend.invert_cores(cores, traces, dims, 0.3)
    expected = reference.invert_cores(cores, traces, dims, 0.3)
    for mine, its in zip(inverted, expected, strict=True):
        check(mine, its, 3e-4)


def test_same_step_gives_the_same_bits(backend):
    results = []
    for _ in range(2):
        arguments, options = make_update(torch.float32, "rms", 0.9)
        backend.update_layers_(*arguments, lr=0.1, **options)
        rows = torch.randn(3000, 77, device=DEVICE)
        sketch = backend.sketch_rows(rows, make_inverse(78, 16, True).basis, ones=True)
        results.append([*arguments[0], *sketch])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_scaled_gradients_and_skipped_steps():
    load("native")
    update = torch.ops.gls_fused.update_layers_
    start, chosen = make_update(torch.float32, "rms", 0.9)
    scale = torch.tensor(1024.0, device=DEVICE)
    ways = []
    for grad_scale, found_inf in [(None, None), (scale, None), (scale, torch.ones_like(scale))]:
        *tensors, inverses = copy.deepcopy(start)
        if grad_scale is not None:
            tensors[1] = [gradient * grad_scale for gradient in tensors[1]]
        parts = zip(*(inverse or (None,) * 3 for inverse in inverses), strict=True)
        options = (chosen["layer_sizes"], "rms", 0.1, 0.9, 0.9, 1e-6, 0.0)
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
    ).to(DEVICE)
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
            inputs = torch.randn(64, 50, device=DEVICE).to(dtype)
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
        pairs = zip(model.parameters(), start.parameters(), strict=True)
        ways.append(torch.cat([(p.double() - q.double()).detach().flatten() for p, q in pairs]))
    exact, single, found = ways
    allowed = max(5 * float((single - exact).norm()), 1e-4 * float(exact.norm()))
    assert (found - exact).norm() <= allowed
