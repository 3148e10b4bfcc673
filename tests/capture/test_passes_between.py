"""Gradients that were made before P was there, before a state was loaded, or are used twice."""

import copy

import pytest
import torch
from tolerances import SAME_STEPS, assert_near
from torch import nn
from torch.nn import functional as F

from gls_fused import GLS

OPTIONS = {"lr": 0.01, "rank": 4, "normalize": "factored"}
SITES = ("step", "auto", "backward")


def make(bias=True):
    """Wide enough for P to act on the rows at the site that "auto" chooses."""
    torch.manual_seed(0)
    layers = nn.Linear(40, 64, bias=bias), nn.ReLU(), nn.Linear(64, 10, bias=bias)
    return nn.Sequential(*layers).double()


def batches(count):
    torch.manual_seed(1)
    return [(torch.randn(8, 40, dtype=torch.float64), torch.arange(8) % 10) for _ in range(count)]


def assert_alike(models):
    """The weights are those of the first."""
    for model in models[1:]:
        for ours, theirs in zip(model.parameters(), models[0].parameters(), strict=True):
            assert_near(ours, theirs, SAME_STEPS)


def test_state_is_loaded_between_two_micro_batches(backend):
    """It is the optimizer's own, and nothing else happens."""
    models = []
    for site in SITES:
        for loads in (False, True):
            model = make()
            optimizer = GLS(model, site=site, backend=backend, curvature_every=100, **OPTIONS)
            for step, (inputs, labels) in enumerate(batches(8)):
                optimizer.zero_grad()
                F.cross_entropy(model(inputs[:4]), labels[:4]).backward()
                if loads and step == 4:
                    optimizer.load_state_dict(optimizer.state_dict())
                F.cross_entropy(model(inputs[4:]), labels[4:]).backward()
                optimizer.step()
            models.append(model)
            layer = optimizer._preconditioner.layers[0]
            assert layer.at_backward is (site != "step")
    assert_alike(models)


def assert_alike_at_every_site(backend, run):
    """Whatever `run` does with a model and its optimizer."""
    models = []
    for site in SITES:
        models.append(make())
        options = {"site": site, "backend": backend, "curvature_every": 100}
        run(models[-1], GLS(models[-1], **options, **OPTIONS))
    assert_alike(models)


def test_two_steps_on_the_first_gradient(backend):
    """P has come between them."""

    def run(model, optimizer):
        inputs, labels = batches(1)[0]
        F.cross_entropy(model(inputs), labels).backward()
        for _ in range(2):
            optimizer.step()

    assert_alike_at_every_site(backend, run)


def test_weight_is_replaced_by_hand_with_its_state(backend):
    """As it is done to points that are split: the gradient has been made without the layer."""

    def run(model, optimizer):
        for step, (inputs, labels) in enumerate(batches(7)):
            optimizer.zero_grad()
            if step == 5:
                old = model[2].weight
                model[2].weight = nn.Parameter(old.detach().clone())
                (group,) = optimizer.param_groups
                group["params"] = [model[2].weight if p is old else p for p in group["params"]]
                optimizer.state[model[2].weight] = optimizer.state.pop(old)
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()

    assert_alike_at_every_site(backend, run)


@pytest.mark.parametrize("every", [100, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_comes_before_the_step_of_the_batch_before(backend, bias, every):
    """Rows count where both forward and backward are of steps that gather."""
    found = []
    for site in SITES:
        torch.manual_seed(0)
        model = nn.Linear(40, 64, bias=bias).double()
        optimizer = GLS(model, site=site, backend=backend, curvature_every=every, **OPTIONS)
        data = batches(9)
        losses = [model(data[0][0]).square().sum()]
        for inputs, _ in data[1:]:
            losses.append(model(inputs).square().sum())
            optimizer.zero_grad()
            losses.pop(0).backward()
            optimizer.step()
        found.append((model, optimizer.state[model.weight]["samples"].clone()))
    assert_alike([model for model, _ in found])
    assert all(torch.equal(samples, found[0][1]) for _, samples in found)


@pytest.mark.parametrize("site", SITES)
def test_rows_of_few_inputs_whose_gradient_is_set_to_zero(backend, site):
    """No entry by which D is known again may be other than zero."""
    found = []
    for drops in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(3000, 64).double()
        optimizer = GLS(model, site=site, backend=backend, curvature_every=1, **OPTIONS)
        for step in range(6):
            dropped, kept = (torch.zeros(8, 3000, dtype=torch.float64) for _ in range(2))
            torch.manual_seed(step)
            dropped[torch.arange(8), torch.randint(0, 3000, (8,))] = 50.0
            kept[torch.arange(8), torch.randint(0, 3000, (8,))] = 1.0
            if drops:
                model(dropped).square().sum().backward()
            model.zero_grad(set_to_none=False)
            model(kept).square().sum().backward()
            optimizer.step()
            model.zero_grad(set_to_none=False)
        found.append((model, optimizer.state[model.weight]["trace"].clone()))
    assert_alike([model for model, _ in found])
    assert_near(found[1][1], found[0][1], SAME_STEPS)
    assert found[0][1] < 3


def test_sites_differ_in_what_the_gradients_hold():
    """So that the steps above being alike says something."""
    gradients = []
    for site in ("step", "backward"):
        model = make()
        optimizer = GLS(model, site=site, curvature_every=100, **OPTIONS)
        for inputs, labels in batches(2):
            optimizer.zero_grad()
            plain = copy.deepcopy(model)
            F.cross_entropy(model(inputs), labels).backward()
            F.cross_entropy(plain(inputs), labels).backward()
            optimizer.step()
        gradients.append((model[0].weight.grad - plain[0].weight.grad).norm())
    assert gradients[0] < SAME_STEPS < gradients[1]
