"""Matrices and products in float64 that the tests of the ops compare with."""

import math

import torch
from hypothesis import strategies as st
from tolerances import PRODUCT, SOLVE

from gls_fused import reference

DTYPES = tuple(PRODUCT)
WIDE = tuple(SOLVE)

seeds = st.integers(0, 2**31)
sizes = st.integers(1, 9)


def randn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def spread_rows(n, d, seed=0, decades=2.0):
    """Rows whose covariance has a spectrum over some decades."""
    return randn(n, d, seed=seed) * torch.logspace(0, -decades / 2, d, dtype=torch.float64)


def covariance(rows):
    return rows.T @ rows / len(rows)


def orthonormal(d, r, seed=0):
    return torch.linalg.svd(randn(d, r, seed=seed), full_matrices=False)[0]


def damped_inverse(sigma, damping):
    d = len(sigma)
    return torch.linalg.inv(sigma + damping * sigma.trace() / d * torch.eye(d).double())


def start(sigma, rank, seed=0):
    """The first basis and core, from a random orthonormal test matrix."""
    omega = orthonormal(len(sigma), rank, seed=seed)
    return reference.refresh_subspace(omega.T @ sigma @ omega, sigma @ omega)


def blend(basis, core, sigma, beta):
    """A commit: Sigma blends into U M U', and the basis moves."""
    blended = beta * basis @ core @ basis.T + (1 - beta) * sigma
    return reference.refresh_subspace(basis.T @ blended @ basis, blended @ basis)


def subspace_inverse(basis, core, trace, damping):
    core_inverse, shift = reference.invert_core(core, trace, len(basis), damping)
    return reference.SubspaceInverse(basis, core_inverse, shift)


def as_matrix(inverse):
    """P itself, [d, d]."""
    return reference.multiply_inverse(torch.eye(len(inverse[0]), dtype=inverse[0].dtype), inverse)


def exact_products(rows):
    """A'A, each sum rounded once."""
    columns = rows.double().T.tolist()
    products = [[math.fsum(map(float.__mul__, a, b)) for a in columns] for b in columns]
    return torch.tensor(products, dtype=torch.float64)


def some_inverse(d, r, dtype, seed):
    """A P of rank r, or a dense one where r is 0."""
    sigma = covariance(spread_rows(30, d, seed=seed))
    if r == 0:
        return reference.DenseInverse(reference.invert_gram(sigma, 1.0).to(dtype))
    basis, core = start(sigma, min(r, d), seed=seed + 1)
    found = subspace_inverse(basis, core, sigma.trace(), 1.0)
    return reference.SubspaceInverse(*(x.to(dtype) for x in found))
