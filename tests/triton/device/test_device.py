"""The kernels on a GPU, against the reference on the same GPU; see benchmarks/device_check.sh."""

import copy

import pytest
import torch

from gls_fused import GLS, reference
from gls_fused.dispatch import resolve_backend
from gls_fused.reference import SubspaceInverse

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
# Products of thousands of float32 terms, and the last rounding of 16-bit results.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(scope="module")
def backend():
    return resolve_backend("triton", ["cuda"])


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


@pytest.mark.parametrize("site", ["step", "backward"])
@pytest.mark.parametrize("normalize", ["rms", "adam", "none"])
def test_ten_steps(site, normalize):
    """No further from float64 than five times the reference in float32."""
    torch.manual_seed(0)
    start = torch.nn.Sequential(
        torch.nn.Linear(50, 40), torch.nn.Tanh(), torch.nn.Linear(40, 10)
    ).cuda()
    ways = []
    for name, dtype in (
        ("reference", torch.float64),
        ("reference", torch.float32),
        ("triton", torch.float32),
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
