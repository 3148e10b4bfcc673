"""Layers whose gradient becomes zero, or nearly so: they come to rest, and nothing is NaN."""

import pytest
import torch
from nets import assert_equal
from tolerances import SAME_STEPS, assert_near
from torch import nn

import gls_fused
from gls_fused import GLS

OPTIONS = {"normalize": "spectral", "curvature_every": 5}


class Branches(nn.Module):
    """A branch whose loss is switched off, beside one that goes on."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Conv2d(3, 16, 3, padding=1)
        self.branch = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 4, 1)

    def loss(self, images, share):
        hidden = torch.relu(self.trunk(images))
        return self.head(hidden).square().mean() + share * self.branch(hidden).square().mean()


def step_of(model, optimizer, share):
    images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    optimizer.zero_grad()
    model.loss(images, share).backward()
    optimizer.step()


@pytest.mark.parametrize("max_change", [0.1, None])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_orthogonal_step_of_a_gradient_of_zeros_is_none(backend, max_change):
    torch.manual_seed(0)
    model = Branches()
    optimizer = GLS(model, backend=backend, max_change=max_change, **OPTIONS)
    for _ in range(6):
        step_of(model, optimizer, 1.0)
    branch = [p.detach().clone() for p in model.branch.parameters()]
    others = [p.detach().clone() for p in model.trunk.parameters()]
    for _ in range(6):
        step_of(model, optimizer, 0.0)
    assert_equal(model.branch.parameters(), branch)
    assert not torch.equal(model.trunk.weight, others[0])
    step_of(model, optimizer, 1.0)
    assert not torch.equal(model.branch.weight, branch[0])


@pytest.mark.parametrize("max_change", [0.1, None])
def test_sites_agree_where_the_bias_alone_has_a_gradient(max_change):
    """D of the weight is not zero then, as P couples the two."""
    found = []
    for site in ("step", "backward"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 18), nn.LayerNorm(18), nn.Linear(18, 3)).double()
        optimizer = GLS(model, site=site, max_change=max_change, curvature="dense", **OPTIONS)
        for seed in range(6):
            inputs = torch.randn(8, 20, dtype=torch.float64).abs() * (seed < 5)
            before = [p.detach().clone() for p in model[0].parameters()]
            optimizer.zero_grad()
            model(inputs).sub(torch.arange(3)).square().mean().backward()
            optimizer.step()
        found.append([p.detach() - q for p, q in zip(model[0].parameters(), before, strict=True)])
    for p, q in zip(*found, strict=True):
        assert q.abs().max() > 1e-5
        assert_near(p, q, SAME_STEPS)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_expert_without_rows_takes_no_orthogonal_step(monkeypatch, backend):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 16, 16) / 4)

        def forward(self, parts):
            return torch.cat([x @ self.up[i].T for i, x in parts.items()])

    monkeypatch.setattr(gls_fused.capture.experts, "_REGISTERED", {})
    gls_fused.register(Experts, "experts")
    torch.manual_seed(0)
    model, rows = nn.Sequential(Experts()), torch.randn(40, 16)
    optimizer = GLS(model, backend=backend, spectral_head=True, **OPTIONS)

    def step(chosen):
        optimizer.zero_grad()
        model({i: rows + i for i in chosen}).square().mean().backward()
        optimizer.step()

    for _ in range(3):
        step([0, 1, 2])
    before = model[0].up.detach().clone()
    for _ in range(3):
        step([0, 1])
    assert torch.equal(model[0].up[2], before[2])
    assert not torch.equal(model[0].up[1], before[1])


@pytest.mark.parametrize("scale", [1e-18, 1e-30])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_gradients_whose_squares_underflow(backend, scale):
    torch.manual_seed(0)
    model = Branches()
    optimizer = GLS(model, backend=backend, **OPTIONS)
    for _ in range(4):
        step_of(model, optimizer, 1.0)
    before = model.branch.weight.detach().clone()
    for _ in range(400):
        step_of(model, optimizer, scale)
    change = (model.branch.weight - before).square().mean().sqrt()
    # At first by the momentum, at most so long until there is next to none.
    assert change < 400 * 1e-3 * 0.6
    last = model.branch.weight.detach().clone()
    step_of(model, optimizer, scale)
    assert (model.branch.weight - last).abs().max() < 1e-6
