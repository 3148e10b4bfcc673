"""Layers that have a part in some steps only, or are frozen for them: they gather when they do."""

import copy

import pytest
import torch
from nets import assert_equal, snapshot
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from gls_fused import GLS, attach

OPTIONS = {"rank": 4, "curvature_every": 2}


class Heads(nn.Module):
    """Two, of which a step uses one."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 9)
        self.heads = nn.ModuleList(nn.Linear(9, 4) for _ in range(2))

    def forward(self, inputs, which):
        return self.heads[which](torch.tanh(self.body(inputs)))


def make_heads():
    torch.manual_seed(0)
    model = Heads().double()
    nn.init.zeros_(model.heads[0].weight)
    nn.init.zeros_(model.heads[1].weight)
    return model


def take_turns(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(20, 6, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        F.mse_loss(model(inputs, step % 2), inputs[:, :4]).backward()
        optimizer.step()
    return snapshot(model)


@pytest.mark.parametrize("site", ["step", "backward", "auto"])
def test_the_one_whose_steps_never_gather_learns_as_much(backend, site):
    """By the number of a step, the second head would gather once in its life."""
    model = make_heads()
    optimizer = GLS(model, lr=0.01, site=site, backend=backend, **OPTIONS)
    take_turns(model, optimizer, range(40))
    found = optimizer.diagnostics()
    assert found["heads.1/samples"] == pytest.approx(found["heads.0/samples"], rel=1e-6)
    for head in model.heads:
        kept = float(optimizer.state[head.weight]["weight_rms"])
        now = float(head.weight.detach().square().mean().sqrt())
        assert kept == pytest.approx(max(now, 30**-0.5), rel=0.05)


def test_what_is_due_outlasts_a_step_that_is_not_taken(backend):
    """As torch.amp.GradScaler leaves one, of a gradient that is not finite."""
    found = []
    for flags in ([0.0], [1.0, 0.0]):
        model = make_heads()
        optimizer = GLS(model, lr=0.01, backend=backend, **OPTIONS)
        take_turns(model, optimizer, range(9))
        for flag in flags:
            optimizer.found_inf = torch.tensor(flag)
            take_turns(model, optimizer, [9])
        take_turns(model, optimizer, range(10, 14))
        found.append((snapshot(model), optimizer.diagnostics()))
    assert_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("how", ["state", "deepcopy", "attach"])
def test_what_is_due_outlasts_a_restart(how):
    """Saved before the head that is due has its turn."""
    model = make_heads()
    if how == "attach":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        handle = attach(model, optimizer, **OPTIONS)
    else:
        optimizer = GLS(model, lr=0.01, **OPTIONS)
    take_turns(model, optimizer, range(9))
    if how == "deepcopy":
        twin, resumed = copy.deepcopy((model, optimizer))
    elif how == "state":
        twin = copy.deepcopy(model)
        resumed = GLS(twin, lr=0.01, **OPTIONS)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        twin = copy.deepcopy(model)
        resumed = torch.optim.SGD(twin.parameters(), lr=0.01)
        kept = attach(twin, resumed, **OPTIONS)
        kept.load_state_dict(copy.deepcopy(handle.state_dict()))
    assert_equal(
        take_turns(twin, resumed, range(9, 14)), take_turns(model, optimizer, range(9, 14))
    )


def test_report_says_since_when_rows_are_missing():
    """Of a weight that torch prunes, whose module computes with something else from then on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    optimizer = GLS(model, **OPTIONS)

    def fit(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(12, 6)).square().mean().backward()
            optimizer.step()

    fit(2)
    assert "none for" not in optimizer.report()
    prune.l1_unstructured(model[2], "weight", 0.3)
    fit(8)
    first, second = optimizer.report().splitlines()[:2]
    assert "none for" not in first
    assert "12 rows, rank 4, none for 8 steps" in second
    prune.remove(model[2], "weight")
    optimizer = GLS(model, **OPTIONS)
    fit(4)
    assert "none for" not in optimizer.report()


@pytest.mark.parametrize("site", ["step", "backward", "auto"])
def test_frozen_between_backward_and_step(backend, site):
    """As of a discriminator that is thawed for its own backward alone."""
    found = []
    for freezes in (True, False):
        model = make_heads()
        optimizer = GLS(model, lr=0.01, site=site, backend=backend, **OPTIONS)
        for step in range(7):
            inputs = torch.randn(20, 6, generator=torch.Generator().manual_seed(step)).double()
            model.requires_grad_(True)
            optimizer.zero_grad()
            (model(inputs, 0) + model(inputs, 1)).square().mean().backward()
            model.requires_grad_(not freezes)
            optimizer.step()
        found.append(snapshot(model))
    assert_equal(*found)


@pytest.mark.parametrize("site", ["step", "backward", "auto"])
@pytest.mark.parametrize("role", ["weight", "bias"])
def test_frozen_alone_it_rests(backend, site, role):
    """P takes no share of its partner's gradient to it, whether its own is None or zeros."""
    found = []
    for to_none in (True, False):
        torch.manual_seed(0)
        model = Heads().double()
        frozen = getattr(model.body, role)
        optimizer = GLS(model, lr=0.01, site=site, backend=backend, **OPTIONS)
        for step in range(9):
            frozen.requires_grad_(step < 4)
            before = frozen.detach().clone()
            inputs = torch.randn(20, 6, generator=torch.Generator().manual_seed(step)).double()
            optimizer.zero_grad(set_to_none=to_none)
            (model(inputs, 0) + model(inputs, 1)).square().mean().backward()
            optimizer.step()
            assert torch.equal(frozen, before) == (step >= 4)
            assert to_none or frozen.grad is not None
        found.append(snapshot(model))
    assert_equal(*found)


@pytest.mark.parametrize("role", ["weight", "bias"])
def test_what_rests_rests_with_another_optimizer_too(role):
    """Its gradient stays zero, where the statistics start in that step as well."""
    model = Heads().double()
    frozen = getattr(model.body, role)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    attach(model, optimizer, **OPTIONS)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    frozen.requires_grad_(False)
    before = frozen.detach().clone()
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        inputs = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)).double()
        (model(inputs, 0) + model(inputs, 1)).square().mean().backward()
        optimizer.step()
    assert torch.equal(frozen, before)
