"""Other packages' optimizers: that they step as their papers say, and what a missing one says."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.workloads import optimizers, peers
from benchmarks.workloads.optimizers import OPTIMIZERS, Together

pytest.importorskip("pytorch_optimizer")


def gradient(step: int, shape: tuple[int, int] = (4, 3)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def steps_of(name: str, count: int, shape: tuple[int, int] = (4, 3)) -> list[Tensor]:
    """The steps of a weight under these gradients, as shares of the learning rate."""
    lr = 0.5
    layer = nn.Linear(shape[1], shape[0], bias=False).double()
    optimizer = OPTIMIZERS[name].build(layer, lr, {}, 0.0)
    taken = []
    for step in range(count):
        before = layer.weight.detach().clone()
        layer.weight.grad = gradient(step, shape)
        optimizer.step()
        taken.append((layer.weight.detach() - before) / -lr)
    return taken


def test_soap_is_adam_in_the_basis_of_shampoo():
    first, second, third = steps_of("soap", 3)
    assert not first.any()
    left, right, average, square = None, None, torch.zeros(4, 3), torch.zeros(4, 3)
    for step, found in ((1, second), (2, third)):
        if left is None:
            g = gradient(0)
            factors = g @ g.T, g.T @ g
            # Bases start at the first gradient's and move every 10 steps.
            left, right = (torch.linalg.eigh(factor)[1] for factor in factors)
        g = gradient(step)
        average = 0.95 * average + 0.05 * g
        square = 0.95 * square + 0.05 * (left.T @ g @ right) ** 2
        rotated = (left.T @ average @ right) / (1 - 0.95**step)
        scaled = rotated / ((square / (1 - 0.95**step)).sqrt() + 1e-8)
        torch.testing.assert_close(found, left @ scaled @ right.T, rtol=1e-4, atol=1e-6)


def test_shampoo_takes_fourth_roots_and_rmsprops_length(monkeypatch):
    monkeypatch.setattr(peers, "ROOTS_EVERY", 1)
    # Large enough that its dimensions are not merged into one.
    count, shape = 30, (40, 30)
    taken = steps_of("shampoo", count, shape)
    beta1, beta2 = peers.SHAMPOO_BETAS
    # The package's statistics start at a small multiple of the identity.
    left, right = (1e-6 * torch.eye(size).double() for size in shape)
    square, momentum = torch.zeros(shape).double(), torch.zeros(shape).double()
    for step in range(count):
        g = gradient(step, shape)
        left = beta2 * left + (1 - beta2) * g @ g.T
        right = beta2 * right + (1 - beta2) * g.T @ g
        square = beta2 * square + (1 - beta2) * g**2
        length = (g / (square.sqrt() + 1e-10)).norm()
        direction = root(left) @ g @ root(right)
        update = direction * length / direction.norm()
        momentum = beta1 * momentum + (1 - beta1) * update
    expected = beta1 * momentum + (1 - beta1) * update
    torch.testing.assert_close(taken[-1], expected, rtol=0.02, atol=0.01)


def root(matrix: Tensor) -> Tensor:
    """Inverse fourth root."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**-0.25) @ vectors.T


def test_psgd_whitens_its_momentum():
    """Its factors even out gradients whose columns' scales are 100 apart."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  (the generator that the package draws from)
    layer = nn.Linear(3, 4, bias=False)
    optimizer = OPTIMIZERS["psgd-kron"].build(layer, 1e-9, {}, 0.0)
    scale = torch.tensor([10.0, 1.0, 0.1])
    for _ in range(600):
        layer.weight.grad = torch.randn(4, 3) * scale
        optimizer.step()
    state = optimizer.state[layer.weight]
    left, right = (q.T @ q for q in state["Q"])
    white = torch.stack([left @ (torch.randn(4, 3) * scale) @ right for _ in range(500)])
    spread = white.square().mean((0, 1)).sqrt()
    assert spread.max() / spread.min() < 5 < 100 == scale.max() / scale.min()


def test_muon_leaves_embeddings_the_last_layer_and_vectors_to_adamw():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 5))
    both = OPTIMIZERS["muon"].build(model, 1e-3, {}, 0.1)
    assert isinstance(both, Together)
    muon, adamw = both.optimizers
    assert [p.shape for p in muon.param_groups[0]["params"]] == [(4, 4)]
    assert muon.param_groups[0]["params"][0] is model[1].weight
    assert len(adamw.param_groups[0]["params"]) == len(list(model.parameters())) - 1
    assert {group["weight_decay"] for group in both.param_groups} == {0.1}
    # The fewer the hidden linear layers, the more is AdamW's.
    assert isinstance(OPTIMIZERS["muon"].build(nn.Linear(2, 2), 1e-3, {}), torch.optim.AdamW)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_reaches_every_optimizer(name):
    """Under a gradient of nearly zero a weight shrinks by its decay, or gets L2's gradient."""
    lasts = []
    for decay in (0.0, 0.1):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        optimizer = OPTIMIZERS[name].build(model, 0.01, {}, decay)
        inputs = torch.randn(8, 3)
        for _ in range(3):
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
            optimizer.step()
        lasts.append(model[0].weight.detach().clone())
    assert not torch.equal(*lasts)


def test_a_missing_package_names_what_installs_it(monkeypatch):
    assert OPTIMIZERS["soap"].missing() is None
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda name: None)
    assert OPTIMIZERS["soap"].missing() == (
        "pytorch_optimizer is not installed: pip install 'gls_fused[peers]'"
    )
    assert OPTIMIZERS["gls"].missing() is OPTIMIZERS["adamw"].missing() is None
