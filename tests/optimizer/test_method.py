"""GLS against an independent implementation of the method, over whole trainings."""

import copy

import pytest
import torch
from independent import IndependentGLS
from tolerances import TRAJECTORY, assert_near, relative_error
from torch import nn

from gls_fused import GLS, attach, reference
from gls_fused.curvature.estimate import Subspace

DEFAULTS = {
    "lr": 0.02,
    "damping": 0.5,
    "momentum": 0.9,
    "beta": 0.7,
    "beta2": 0.8,
    "eps": 1e-6,
    "weight_decay": 0.0,
    "normalize": "rms",
    "power": 1,
    "max_change": None,
    "max_growth": None,
    "curvature_every": 1,
}
SITES = {
    "rms": "auto",
    "row": "step",
    "factored": "auto",
    "spectral": "auto",
    "adam": "backward",
    "none": "step",
    "sgd": "auto",
}
STEPS = 8


def make_model(bias=True):
    torch.manual_seed(0)
    first, second, third = nn.Linear(7, 6, bias=bias), nn.Linear(6, 5), nn.Linear(5, 3, bias=bias)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), third).double()


def batches(step, micro_batches, rows):
    """Inputs [n, 2, 7] (two rows each) and targets, for every micro-batch."""
    generator = torch.Generator().manual_seed(step)
    for part in range(micro_batches):
        inputs = torch.randn(rows + part, 2, 7, generator=generator, dtype=torch.float64)
        # The inputs' covariance is not the identity, and changes from step to step.
        inputs = inputs * torch.linspace(0.2, 2, 7, dtype=torch.float64) + 0.1 * step
        yield inputs, torch.randn(rows + part, 2, 3, generator=generator, dtype=torch.float64)


def train(model, optimizer, micro_batches, rows, grows=1.0):
    for step in range(STEPS):
        model.zero_grad()
        for inputs, targets in batches(step, micro_batches, rows):
            loss = (model(inputs) - targets).square().mean()
            (loss * grows**step).backward()
        optimizer.step()


def check(
    options, backend, *, micro_batches=1, rows=6, bias=True, test_matrix=None, grows=1.0, **chosen
):
    options = {**DEFAULTS, **options}
    ours = make_model(bias)
    theirs = copy.deepcopy(ours)
    start = copy.deepcopy(ours)
    how = {"micro_batches": micro_batches, "rows": rows, "grows": grows}
    train(theirs, IndependentGLS(theirs, test_matrix=test_matrix, **options), **how)
    optimizer = GLS(ours, backend=backend, **options, **chosen)
    train(ours, optimizer, **how)
    for p, q, before in zip(
        ours.parameters(), theirs.parameters(), start.parameters(), strict=True
    ):
        assert_near(p, q, TRAJECTORY)
        assert relative_error(p, before) > 1e-3
    return optimizer


CURVATURES = {"dense": {"curvature": "dense"}, "whole subspace": {"rank": 100}}


@pytest.mark.parametrize("normalize", SITES)
@pytest.mark.parametrize("curvature", CURVATURES)
def test_every_normalization(backend, curvature, normalize):
    check({"normalize": normalize}, backend, site=SITES[normalize], **CURVATURES[curvature])


VARIANTS = {
    "no momentum": {"momentum": 0.0},
    "weight decay": {"weight_decay": 0.5},
    "every second step": {"curvature_every": 2},
    "every third step": {"curvature_every": 3},
    "constant curvature": {"curvature_every": 100},
    "no memory": {"beta": 0.0, "beta2": 0.0},
    "small damping": {"damping": 0.01},
    "large damping": {"damping": 100.0},
    "power 3/4": {"power": 0.75},
    "power 1/2": {"power": 0.5, "normalize": "factored"},
    "power 1/4": {"power": 0.25, "normalize": "row"},
    # Of the weights' root mean squares, of .2 to .25, and of 1 / sqrt(3 d).
    "a bound that holds": {"max_change": 0.05, "weight_decay": 0.5, "curvature_every": 2},
    "a bound that does not": {"max_change": 1.0, "normalize": "factored"},
    "spectral, of the head too": {"normalize": "spectral", "spectral_head": True},
    "spectral, with a bound": {"normalize": "spectral", "max_change": 0.01, "momentum": 0.0},
    "a bound on plain steps": {"max_change": 0.05, "normalize": "none", "lr": 5.0},
    "a bound on SGD's steps": {"max_change": 0.01, "normalize": "sgd", "lr": 5.0},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("curvature", CURVATURES)
def test_every_option(backend, curvature, variant):
    check(VARIANTS[variant], backend, **CURVATURES[curvature])


GROWTHS = {
    "below its bound": {"max_growth": 5.0},
    "at its bound": {"max_growth": 1.2, "curvature_every": 2},
    "below the layers' bound": {"max_growth": 2.0, "max_change": 0.04},
}


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("normalize", ["rms", "row", "factored", "adam", "spectral"])
def test_gradients_that_grow(backend, normalize, growth):
    options = {"normalize": normalize, **GROWTHS[growth]}
    optimizer = check(options, backend, grows=1.3, curvature="dense")
    values = optimizer.diagnostics()
    found = [value for name, value in values.items() if name.endswith("/growth")]
    # All but those of orthogonal steps, the head's among them.
    assert len(found) == (1 if normalize == "spectral" else 3)
    assert all(1.05 < each <= options["max_growth"] for each in found)


@pytest.mark.parametrize("site", ["step", "backward"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_accumulation_at_each_site(backend, curvature, bias, site):
    check({}, backend, micro_batches=3, bias=bias, site=site, **CURVATURES[curvature])


@pytest.mark.parametrize("curvature", CURVATURES)
def test_fewer_rows_than_columns(backend, curvature):
    check({}, backend, rows=2, **CURVATURES[curvature])


def first_test_matrix(rank):
    return lambda d: Subspace(d, rank, reference).test_matrix(torch.float64, torch.device("cpu"))


@pytest.mark.parametrize("normalize", SITES)
@pytest.mark.parametrize("curvature_every", [1, 2])
@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank(backend, rank, curvature_every, normalize):
    power = 0.75 if normalize == "factored" else 1
    options = {"normalize": normalize, "curvature_every": curvature_every, "power": power}
    check(options, backend, rank=rank, site=SITES[normalize], test_matrix=first_test_matrix(rank))


@pytest.mark.parametrize("curvature_every", [1, 3])
@pytest.mark.parametrize("normalize", ["rms", "factored"])
def test_fewer_rows_than_the_rank(backend, normalize, curvature_every):
    """Directions that no row has shown stay those of the basis before, on every backend."""
    options = {"normalize": normalize, "curvature_every": curvature_every}
    check(options, backend, rows=1, rank=5, test_matrix=first_test_matrix(5))


def test_low_rank_differs_from_dense():
    options = {**DEFAULTS, "normalize": "none"}
    found = []
    for rank in (2, 100):
        model = make_model()
        train(model, GLS(model, rank=rank, **options), 1, 6)
        found.append(model[0].weight)
    assert relative_error(*found) > 1e-4


def test_test_matrix_is_the_same_in_every_process():
    matrix = first_test_matrix(3)(5)
    torch.manual_seed(1)
    assert torch.equal(matrix, first_test_matrix(3)(5))
    assert_near(matrix.T @ matrix, torch.eye(3).double(), TRAJECTORY)


@pytest.mark.parametrize(("normalize", "power"), [("none", 1), ("adam", 0.5)])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_attached_optimizer(backend, curvature, normalize, power):
    """SGD and Adam on attached gradients are GLS with the normalizations "none" and "adam"."""
    options = {**DEFAULTS, "normalize": normalize, "power": power, "curvature_every": 2}
    if normalize == "none":
        options["momentum"] = 0.0
    ours, theirs = make_model(), make_model()
    train(theirs, IndependentGLS(theirs, **options), 2, 6)
    if normalize == "none":
        optimizer = torch.optim.SGD(ours.parameters(), lr=options["lr"])
    else:
        betas = (options["momentum"], options["beta2"])
        optimizer = torch.optim.Adam(ours.parameters(), options["lr"], betas, options["eps"])
    names = ("damping", "power", "beta", "curvature_every")
    statistics = {name: options[name] for name in names}
    attach(ours, optimizer, backend=backend, **statistics, **CURVATURES[curvature])
    train(ours, optimizer, 2, 6)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_near(p, q, TRAJECTORY)


def test_auto_rank_is_at_most_the_outputs(backend):
    model = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 6), nn.Linear(6, 5))
    optimizer = GLS(model, backend=backend)
    model(torch.ones(3, 50)).sum().backward()
    optimizer.step()
    found = [optimizer.state[layer.weight]["basis"].shape for layer in model]
    assert found == [(51, 32), (41, 6), (7, 5)]


def test_zero_weights_move_under_a_bound(backend):
    model = nn.Linear(4, 3)
    nn.init.zeros_(model.weight)
    optimizer = GLS(model, lr=10.0, max_change=0.1, normalize="row", backend=backend)
    (model(torch.randn(6, 4)) - 1).square().sum().backward()
    optimizer.step()
    moved = model.weight.detach().square().mean().sqrt()
    assert 0 < moved <= 0.1 * (3 * 5) ** -0.5 * 1.5
