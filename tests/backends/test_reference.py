"""Each op of the definition against the mathematics, in float64 brute force."""

import itertools
import math

import pytest
import torch
from brute_force import (
    DTYPES,
    WIDE,
    as_matrix,
    blend,
    covariance,
    damped_inverse,
    exact_products,
    orthonormal,
    randn,
    seeds,
    sizes,
    spread_rows,
    start,
    subspace_inverse,
)
from hypothesis import given
from hypothesis import strategies as st
from tolerances import HEADROOM, PRODUCT, SOLVE, assert_near, relative_error

from gls_fused import reference

# ---- the tolerances ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_tolerance_of_products_is_the_error_of_pytorch(dtype):
    rows = randn(64, 16, dtype=dtype)
    exact = exact_products(rows)
    error = relative_error(rows.T @ rows, exact)
    assert error <= PRODUCT[dtype] <= HEADROOM * error


@pytest.mark.parametrize("dtype", WIDE)
def test_tolerance_of_solves_is_the_error_of_pytorch(dtype):
    sigma = covariance(spread_rows(64, 16, decades=4) @ orthonormal(16, 16)).to(dtype)
    damped = sigma + 1e-3 * sigma.trace() / 16 * torch.eye(16).to(dtype)
    # Two orders of elimination differ by the error of each.
    error = relative_error(torch.linalg.inv(damped), torch.linalg.inv(damped.flip(0, 1)).flip(0, 1))
    assert error <= SOLVE[dtype] <= HEADROOM * error


# ---- capture -------------------------------------------------------------------------------------


@given(n=sizes, k=sizes, ones=st.booleans(), dtype=st.sampled_from(DTYPES), seed=seeds)
def test_sum_gram(n, k, ones, dtype, seed):
    rows = randn(n, k, seed=seed, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    gram, trace = reference.sum_gram(rows, dtype=wide, ones=ones)
    assert gram.dtype == trace.dtype == wide
    expected = torch.zeros(k + ones, k + ones, dtype=torch.float64)
    for row in rows.double().tolist():
        a = torch.tensor([*row, 1.0] if ones else row, dtype=torch.float64)
        expected += torch.outer(a, a)
    assert_near(gram, expected, PRODUCT[wide])
    assert_near(trace, expected.trace(), PRODUCT[wide])


@given(n=sizes, k=sizes, r=sizes, ones=st.booleans(), dtype=st.sampled_from(DTYPES), seed=seeds)
def test_sketch_rows(n, k, r, ones, dtype, seed):
    rows = randn(n, k, seed=seed, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    basis = randn(k + ones, r, seed=seed + 1, dtype=wide)
    core, sketch, trace = reference.sketch_rows(rows, basis, ones=ones)
    assert core.dtype == sketch.dtype == trace.dtype == wide
    full = rows.double()
    full = torch.cat([full, torch.ones(n, 1)], 1) if ones else full
    gram, u = full.T @ full, basis.double()
    scale = float(gram.trace() * u.square().sum())
    assert float((core - u.T @ gram @ u).abs().max()) <= PRODUCT[wide] * scale
    assert float((sketch - gram @ u).abs().max()) <= PRODUCT[wide] * scale
    assert_near(trace, gram.trace(), PRODUCT[wide])


@st.composite
def windows(draw):
    """Of one to three spatial dimensions, with the size of images that they fit into."""
    dims = draw(st.integers(1, 3))
    most = 3 if dims < 3 else 2

    def numbers(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    sides = numbers(1, most), numbers(1, 3), numbers(0, 2), numbers(1, most)
    extra = numbers(0, 3)
    if draw(st.booleans()):
        more = tuple(draw(st.integers(0, max(s, d) - 1)) for _, s, _, d in zip(*sides, strict=True))
        size = [1 + -(-2 * p // s) + e for s, p, e in zip(*sides[1:3], extra, strict=True)]
        return reference.Window(*sides, more), size
    size = [
        max(1, d * (k - 1) + 1 - 2 * p) + e for k, _, p, d, e in zip(*sides, extra, strict=True)
    ]
    return reference.Window(*sides), size


def patches_pixel_by_pixel(images, window):
    """im2col with nothing but indexing: of each output, the pixels by place in the kernel."""
    places = []
    for size, k, s, p, d, more in zip(
        images.shape[2:], *window[:4], window.output_padding or window.stride, strict=True
    ):
        if window.output_padding is None:
            tops = range(-p, size + p - d * (k - 1), s)
            places.append([[top + d * i for i in range(k)] for top in tops])
        else:
            # Output y is the sum over pixels x and places i with s x + d i = y + p.
            outputs = range((size - 1) * s - 2 * p + d * (k - 1) + more + 1)
            steps = [[y + p - d * i for i in range(k)] for y in outputs]
            places.append([[x // s if x % s == 0 else -1 for x in step] for step in steps])
    rows = []
    for image, *steps in itertools.product(range(len(images)), *places):
        row = []
        for channel, *pixel in itertools.product(range(images.shape[1]), *steps):
            inside = all(0 <= x < size for x, size in zip(pixel, images.shape[2:], strict=True))
            row.append(float(images[(image, channel, *pixel)]) if inside else 0.0)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@given(
    geometry=windows(),
    count=st.integers(1, 2),
    channels=st.integers(1, 3),
    groups=st.integers(1, 3),
    seed=seeds,
)
def test_images_are_the_rows_of_their_patches(geometry, count, channels, groups, seed):
    window, size = geometry
    images = randn(count, groups * channels, *size, seed=seed)
    rows = patches_pixel_by_pixel(images.view(count * groups, channels, *size), window)
    many, *out = reference.count_patches(images, window, groups)
    assert many * math.prod(out) == len(rows)
    assert torch.equal(reference.take_patches(images, window, None, groups), rows)
    places = torch.randint(len(rows), (5,))
    assert torch.equal(reference.take_patches(images, window, places, groups), rows[places])


# ---- curvature -----------------------------------------------------------------------------------


@given(n=st.integers(1, 20), d=sizes, damping=st.sampled_from([0.1, 1.0]), seed=seeds)
def test_subspace_of_full_rank_is_dense(n, d, damping, seed):
    sigma = covariance(spread_rows(n, d, seed=seed))
    basis, core = start(sigma, d, seed=seed + 1)
    dense = reference.DenseInverse(reference.invert_gram(sigma, damping))
    whole = subspace_inverse(basis, core, sigma.trace(), damping)
    assert_near(as_matrix(whole), as_matrix(dense), SOLVE[torch.float64])


@pytest.mark.parametrize("cut", [0, 1])
@given(n=st.integers(1, 20), d=st.integers(2, 12), r=st.integers(1, 6), seed=seeds)
def test_undo_inverse(cut, n, d, r, seed):
    """Also of a P without its last row and column, whose U is not orthonormal."""
    sigma = covariance(spread_rows(n, d, seed=seed))
    basis, core = start(sigma, min(r, d), seed=seed + 1)
    whole = subspace_inverse(basis, core, sigma.trace(), 1.0)
    inverse = whole._replace(basis=whole.basis[: d - cut])
    rows = spread_rows(3, d - cut, seed=seed + 2)
    found = reference.undo_inverse(reference.multiply_inverse(rows, inverse), inverse)
    assert_near(found, rows, SOLVE[torch.float64])


@given(d=st.integers(2, 12), r=st.integers(1, 6), rank=st.integers(1, 6), seed=seeds)
def test_start_is_exact_when_the_rows_span_no_more_than_the_rank(d, r, rank, seed):
    r = min(r, d)
    rows = randn(10, min(rank, r), seed=seed) @ randn(min(rank, r), d, seed=seed + 1)
    sigma = covariance(rows)
    basis, core = start(sigma, r, seed=seed + 2)
    # A random test matrix leaves an error of some units of rounding over its smallest angle.
    assert_near(basis @ core @ basis.T, sigma, 1e-8)


@given(d=st.integers(1, 12), r=st.integers(1, 6), n=st.integers(1, 12), seed=seeds)
def test_refresh_keeps_its_invariants(d, r, n, seed):
    r = min(r, d)
    sigma = covariance(spread_rows(n, d, seed=seed))
    u = orthonormal(d, r, seed=seed + 1)
    basis, core = reference.refresh_subspace(u.T @ sigma @ u, sigma @ u)
    eye = torch.eye(r).double()
    assert_near(basis.T @ basis, eye, PRODUCT[torch.float64])
    assert_near(core, core.T.contiguous(), PRODUCT[torch.float64])
    assert torch.linalg.eigvalsh(core)[0] >= -1e-14 * float(sigma.trace())
    # Nystrom's approximation never exceeds Sigma.
    gap = torch.linalg.eigvalsh(sigma - basis @ core @ basis.T)[0]
    assert gap >= -1e-12 * float(sigma.trace())


def test_core_stays_positive_when_the_inputs_turn():
    """Old and new rows of other directions and scales, blended: every core can be inverted."""
    for seed in range(30):
        d, r, beta = 12, 5, 0.9
        turn, scale = orthonormal(d, d, seed=seed), 10.0 ** (seed % 7 - 3)
        old = covariance(spread_rows(30, d, seed=seed, decades=6))
        new = covariance(spread_rows(30, d, seed=seed + 100, decades=6) @ turn * scale)
        basis, core = start(old, r, seed=seed)
        for _ in range(6):
            basis, core = blend(basis, core, new, beta)
            assert torch.linalg.eigvalsh(core)[0] >= -1e-12 * float(core.trace())


def test_refresh_of_full_rank_is_exact():
    sigma = covariance(spread_rows(40, 7))
    u = orthonormal(7, 7, seed=1)
    basis, core = reference.refresh_subspace(u.T @ sigma @ u, sigma @ u)
    assert_near(basis @ core @ basis.T, sigma, 1e-12)


def test_subspace_converges_to_the_leading_eigenvectors():
    sigma = covariance(spread_rows(200, 20, decades=4))
    leading = torch.linalg.eigh(sigma)[1][:, -4:]
    basis, core = start(sigma, 4, seed=1)
    trace = sigma.trace()
    angles = []
    for _ in range(150):
        basis, core = blend(basis, core, sigma, 0.5)
        angles.append(1 - float(torch.linalg.svdvals(leading.T @ basis)[-1]))
    assert angles[0] > 1e-3
    assert angles[-1] < 1e-9
    assert_near(torch.linalg.eigvalsh(core), torch.linalg.eigvalsh(sigma)[-4:], 1e-8)
    # P then has the exact inverse on that subspace and the mean of the rest outside.
    rest = (trace - torch.linalg.eigvalsh(sigma)[-4:].sum()) / 16
    outside = torch.eye(20).double() - leading @ leading.T
    ideal = leading @ (leading.T @ sigma @ leading) @ leading.T + rest * outside
    damped = ideal + 0.1 * trace / 20 * torch.eye(20).double()
    inverse = as_matrix(subspace_inverse(basis, core, trace, 0.1))
    assert_near(inverse, torch.linalg.inv(damped), 1e-7)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_refresh_at_any_scale(dtype, scale):
    sigma = covariance(spread_rows(30, 8)).to(dtype)
    u = orthonormal(8, 3, seed=1).to(dtype)
    core, sketch = u.T @ sigma @ u, sigma @ u
    basis, once = reference.refresh_subspace(core, sketch)
    scaled_basis, scaled = reference.refresh_subspace(core * scale, sketch * scale)
    assert_near(
        scaled_basis @ (scaled / scale) @ scaled_basis.T, basis @ once @ basis.T, SOLVE[dtype]
    )


# ---- orthogonal steps ----------------------------------------------------------------------------

# Of the Frobenius norm of the factor, by the condition number of the matrix: what five steps leave.
# 13% is what the iteration leaves of each singular value above 2e-3 of the norm.
ORTHOGONALITY = {1.0: 0.13, 10.0: 0.13, 100.0: 0.13, 1e3: 0.2}


@pytest.mark.parametrize("condition", ORTHOGONALITY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (64, 64)])
def test_iteration_against_the_polar_factor(shape, dtype, condition):
    rank = min(shape)
    values = torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64)
    u, v = orthonormal(shape[0], rank, seed=1), orthonormal(shape[1], rank, seed=2)
    matrix = (u * values) @ v.T
    assert_near(reference.orthogonal_factor(matrix), u @ v.T, 1e-10)
    found = reference.orthogonalize(matrix.to(dtype)).double()
    error = torch.linalg.matrix_norm(found - u @ v.T) / rank**0.5
    rounding = 0.05 if dtype is torch.bfloat16 else 0.0
    assert error <= ORTHOGONALITY[condition] + rounding
    # It is worse than it has to be: a factor that is exact would pass a looser table, too.
    assert error >= 0.03


def test_polar_factor_of_what_is_rank_deficient():
    matrix = torch.zeros(4, 3, dtype=torch.float64)
    assert not reference.orthogonal_factor(matrix).any()
    matrix[1, 2] = -5
    assert_near(reference.orthogonal_factor(matrix), matrix / 5, 1e-14)
    assert not reference.orthogonalize(torch.zeros(4, 3)).any()


# ---- solve ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("damping", [1e-3, 0.1, 1.0, 10.0])
@pytest.mark.parametrize(("n", "d"), [(64, 16), (5, 16), (1, 3), (4, 1)])
def test_invert_gram(dtype, damping, n, d):
    sigma = covariance(spread_rows(n, d))
    inverse = reference.invert_gram(sigma.to(dtype), damping)
    assert inverse.dtype == dtype
    assert_near(inverse, damped_inverse(sigma, damping), SOLVE[dtype])


@given(
    d=st.integers(1, 12),
    r=st.integers(1, 6),
    damping=st.sampled_from([1e-3, 0.1, 1.0, 10.0]),
    dtype=st.sampled_from(WIDE),
    seed=seeds,
)
def test_invert_core(d, r, damping, dtype, seed):
    """P is the inverse of U M U' + rho (I - U U') + lambda I."""
    r = min(r, d)
    basis = orthonormal(d, r, seed=seed)
    core = covariance(spread_rows(20, r, seed=seed + 1))
    trace = core.trace() * 1.5 if r < d else core.trace()
    low = basis @ core @ basis.T
    if r < d:
        outside = torch.eye(d).double() - basis @ basis.T
        low = low + (trace - core.trace()) / (d - r) * outside
    expected = torch.linalg.inv(low + damping * trace / d * torch.eye(d).double())
    inverse = subspace_inverse(basis.to(dtype), core.to(dtype), trace.to(dtype), damping)
    assert inverse.core_inverse.dtype == dtype
    assert_near(as_matrix(inverse), expected, SOLVE[dtype])


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("power", [1, 0.75, 0.5, 0.25])
@given(d=st.integers(1, 12), r=st.integers(1, 6), damping=st.sampled_from([0.1, 1.0]), seed=seeds)
def test_powers_of_p_are_those_of_the_inverse(power, dtype, d, r, damping, seed):
    """P^4 is (Sigma + lambda I)^-1 to the power 4p, where U M U' + rho (I - U U') is Sigma."""
    r = min(r, d)
    basis, core = orthonormal(d, r, seed=seed), covariance(spread_rows(20, r, seed=seed + 1))
    trace = core.trace() * 1.5 if r < d else core.trace()
    outside = torch.eye(d).double() - basis @ basis.T
    rest = (trace - core.trace()) / max(1, d - r)
    sigma = basis @ core @ basis.T + rest * outside
    damped = sigma + damping * trace / d * torch.eye(d).double()
    found = reference.invert_core(core.to(dtype), trace.to(dtype), d, damping, power)
    inverse = reference.SubspaceInverse(basis.to(dtype), *found)
    expected = torch.linalg.matrix_power(torch.linalg.inv(damped), round(4 * power))
    matrices = [as_matrix(inverse), reference.invert_gram(sigma.to(dtype), damping, power)]
    for matrix in matrices:
        assert_near(torch.linalg.matrix_power(matrix.double(), 4), expected, 4 * SOLVE[dtype])


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("power", [0.75, 0.5, 0.25])
def test_power_of_the_core_of_fewer_rows_than_directions(power, dtype):
    """Rounding tilts spare directions towards the others, and takes their diagonals below zero."""
    eps, eye = torch.finfo(dtype).eps, torch.eye(6).double()
    tilted = eye + 4 * eps**0.5 * randn(6, 6)
    basis, values = torch.linalg.qr(tilted).Q, torch.tensor([1, 0.5, 0, 0, 0, 0]).double()
    core = (basis * values) @ basis.T - 64 * eps * eye
    assert (core.diagonal()[2:] < 0).any()
    damp = torch.tensor(0.1, dtype=torch.float64)
    found = reference.invert_damped(core.to(dtype), damp.to(dtype), power)
    inverse = torch.linalg.inv(core + damp * eye)
    expected = torch.linalg.matrix_power(inverse, round(4 * power))
    assert_near(torch.linalg.matrix_power(found.double(), 4), expected, 4 * SOLVE[dtype])


@pytest.mark.parametrize("power", [0.75, 0.5, 0.25])
def test_power_of_what_is_not_positive_definite_is_a_multiple_of_the_identity(power):
    damp, matrix = torch.tensor(0.5), torch.diag(torch.tensor([1.0, -0.75]))
    found = reference.invert_damped(matrix, damp, power)
    assert torch.equal(found, torch.eye(2) / (damp + 0.125) ** power)
    assert not reference.invert_damped(matrix / 0, damp, power).isfinite().any()


@pytest.mark.parametrize("power", [0.75, 0.5, 0.25])
def test_dense_inverse_of_inputs_that_are_mostly_dead(power):
    """float32's own eigenvalues of such a Sigma do not converge."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(128, 784, generator=generator).relu()
    rows[:, torch.rand(784, generator=generator) < 0.7] = 0
    sigma = rows.T @ rows / len(rows)
    found = reference.invert_gram(sigma, 0.3, power)
    assert_near(found, reference.invert_gram(sigma.double(), 0.3, power).float(), 1e-5)


@pytest.mark.parametrize(
    ("failures", "expected"), [(1, [1.5**-0.5, 2.5**-0.5]), (2, [2**-0.5] * 2)]
)
def test_eigenvalues_that_are_no_numbers(monkeypatch, failures, expected):
    """LAPACK's float32 does not always say that it has not converged; asked again, float64 may.

    Where it does not, P is a multiple of I.
    """
    own, outcomes = torch.linalg.eigh, iter([math.nan] * failures + [1.0] * 2)

    def spoil(matrix):
        values, vectors = own(matrix)
        return values, vectors * next(outcomes)

    monkeypatch.setattr(torch.linalg, "eigh", spoil)
    matrix, damp = torch.diag(torch.tensor([1.0, 2.0])), torch.tensor(0.5)
    found = reference.invert_damped(matrix, damp, 0.5)
    assert_near(found, torch.diag(torch.tensor(expected)), 1e-6)


@given(n=st.integers(1, 20), k=sizes, m=sizes, ones=st.booleans(), whole=st.booleans(), seed=seeds)
def test_direction_is_the_damped_least_squares_step(n, k, m, ones, whole, seed):
    """Over the rows: each asks for the output change -n g_i, further rows for damping."""
    rows, grads = spread_rows(n, k, seed=seed), randn(n, m, seed=seed + 1)
    full = torch.cat([rows, torch.ones(n, 1).double()], 1) if ones else rows
    d, damping = k + ones, 0.1
    damp = damping * full.square().sum() / n / d
    system = torch.cat([full / math.sqrt(n), damp.sqrt() * torch.eye(d).double()])
    wanted = torch.cat([-n * grads / math.sqrt(n), torch.zeros(d, m).double()])
    step = torch.linalg.lstsq(system, wanted).solution.T

    sigma = covariance(full)
    if whole:
        basis, core = start(sigma, d, seed=seed + 2)
        inverse = subspace_inverse(basis, core, sigma.trace(), damping)
    else:
        inverse = reference.DenseInverse(reference.invert_gram(sigma, damping))
    weight, bias = reference.precondition_gradient(
        grads.T @ rows, grads.sum(0) if ones else None, inverse
    )
    found = weight if bias is None else torch.cat([weight, bias[:, None]], 1)
    assert_near(-found, step, SOLVE[torch.float64])
