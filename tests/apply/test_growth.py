"""Rates that grow with the directions of a layer; the numbers are those of tests/optimizer."""

import copy

import pytest
import torch
from torch import nn

from gls_fused import GLS, reference

# Of every step, so that they differ from 1.
OPTIONS = {"curvature_every": 1, "beta2": 0.5, "max_growth": 3.0, "rank": 3, "normalize": "row"}


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def train(model, optimizer, steps, grows=1.5):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        loss = (model(torch.randn(8, 6, generator=generator)) - 1).square().mean()
        (loss * grows**step).backward()
        optimizer.step()


def growths(optimizer):
    found = [state["growth"] for state in optimizer.state.values() if "growth" in state]
    return torch.cat([each.reshape(-1) for each in found])


def measure(means, every=1, beta2=0.0, most=100.0):
    """Growth and u after each of some means, one layer's."""
    slow, found = torch.zeros(1, dtype=torch.float64), []
    for index, mean in enumerate(means):
        # Layers start in a step that gathers, and are measured from the next one on.
        step = torch.tensor([1.0 + every * (index + (every > 1))])
        mean = torch.tensor([mean], dtype=torch.float64)
        growth, slow = reference.measure_growth(
            mean, slow, step, beta2=beta2, every=every, most=most
        )
        found.append((growth.item(), slow.item()))
    return found


@pytest.mark.parametrize("every", [1, 10])
def test_growth_is_over_the_average_that_adam_has(every):
    means = [2.0**index for index in range(12)]
    adam, weight = 0.0, 0.0
    for mean, (growth, slow) in zip(means, measure(means, every), strict=True):
        kept = 0.999**every
        adam, weight = kept * adam + (1 - kept) * mean, kept * weight + (1 - kept)
        if every == 1:
            assert slow == pytest.approx(adam / weight, rel=1e-5)
        # The first mean is that of step 11, and counts a little more.
        assert slow == pytest.approx(adam / weight, rel=0.05)
        assert growth == pytest.approx((mean / slow) ** 0.5, rel=1e-6)


def test_growth_is_that_of_a_corrected_mean_and_within_its_range():
    # Averages of ones that began at zero.
    averages = [1 - 0.95 ** (step + 1) for step in range(30)]
    assert measure(averages, beta2=0.95) == [pytest.approx((1, 1), rel=1e-5)] * 30
    assert {growth for growth, _ in measure([4.0, 2.0, 1.0])} == {1.0}
    assert measure([1.0, 100.0], most=1.25)[-1][0] == 1.25


@pytest.mark.parametrize("mean", [0.0, 1e-320, float("inf")])
def test_growth_of_means_beyond_the_dtype(mean):
    means = [1.0, mean, mean]
    assert all(1 <= growth <= 100 for growth, _ in measure(means))
    assert [growth for growth, _ in measure([mean, mean])] == [1.0, 1.0]
    # A layer that has taken no step.
    growth, slow = reference.measure_growth(
        torch.zeros(1), torch.zeros(1), torch.zeros(1), beta2=0.9, every=10, most=2.0
    )
    assert (growth.item(), slow.item()) == (1, 0)


def test_growth_of_a_layer_that_has_grown_before_it_is_known():
    """As of a state of an earlier version, or where max_growth is set later: u starts at a."""
    growth, slow = reference.measure_growth(
        torch.ones(1), torch.zeros(1), torch.tensor([5000.0]), beta2=0.9, every=10, most=2.0
    )
    assert (growth.item(), slow.item()) == (1, 1)


def test_none_leaves_the_rate_alone(backend):
    models = [make_model() for _ in range(3)]
    for model, most in zip(models, (None, 1.0, 3.0), strict=True):
        optimizer = GLS(model, backend=backend, **{**OPTIONS, "max_growth": most})
        train(model, optimizer, range(6))
        assert any("growth" in state for state in optimizer.state.values()) == (most is not None)
    none, one, three = ([*model.parameters()] for model in models)
    assert all(map(torch.equal, none, one))
    assert not any(map(torch.equal, none, three))


def test_scale_of_the_loss_does_not_count(backend):
    """A factor of all gradients from the first on is none of growth."""
    found = []
    for scale in (1.0, 2.0**20):
        model = make_model()
        optimizer = GLS(model, backend=backend, eps=1e-30, **OPTIONS)
        for step in range(6):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            outputs = model(torch.randn(8, 6, generator=generator))
            (outputs.square().mean() * scale * (step + 1)).backward()
            optimizer.step()
        found.append(growths(optimizer))
    assert (found[0] > 1).all()
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)


@pytest.mark.parametrize("normalize", ["rms", "row", "factored", "adam"])
@pytest.mark.parametrize("step", [9, 10])
def test_a_saved_growth_goes_on(backend, normalize, step):
    options = {**OPTIONS, "normalize": normalize, "curvature_every": 4}
    model = make_model()
    optimizer = GLS(model, backend=backend, **options)
    train(model, optimizer, range(step))
    assert (growths(optimizer) > 1).all()
    later = copy.deepcopy(model)
    twin = GLS(later, backend=backend, **options)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, mine in ((model, optimizer), (later, twin)):
        train(each, mine, range(step, 14))
    assert all(map(torch.equal, model.parameters(), later.parameters()))


def test_a_state_of_before_goes_on_without(backend):
    model = make_model()
    optimizer = GLS(model, backend=backend, **{**OPTIONS, "max_growth": None})
    train(model, optimizer, range(4))
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["max_growth"]
        group["version"] = 5
    later = copy.deepcopy(model)
    twin = GLS(later, backend=backend, **OPTIONS)
    twin.load_state_dict(saved)
    assert twin.param_groups[0]["max_growth"] is None
    for each, mine in ((model, optimizer), (later, twin)):
        train(each, mine, range(4, 8))
    assert all(map(torch.equal, model.parameters(), later.parameters()))


def test_max_growth_may_change_in_training(backend):
    model = make_model()
    optimizer = GLS(model, backend=backend, **OPTIONS)
    train(model, optimizer, range(4))
    assert (growths(optimizer) > 1).all()
    optimizer.param_groups[0]["max_growth"] = None
    train(model, optimizer, range(4, 5))
    assert not any("growth" in state for state in optimizer.state.values())
    optimizer.param_groups[0]["max_growth"] = 1.5
    train(model, optimizer, range(5, 6))
    assert growths(optimizer).tolist() == [1, 1]
    train(model, optimizer, range(6, 9), grows=4.0)
    assert growths(optimizer).tolist() == [1.5, 1.5]


@pytest.mark.parametrize("flag", [True, False])
def test_a_step_that_is_not_taken_changes_no_growth(backend, flag):
    model = make_model()
    optimizer = GLS(model, backend=backend, **OPTIONS)
    train(model, optimizer, range(4))
    before = growths(optimizer).clone()
    # As torch.amp.GradScaler leaves it.
    optimizer.found_inf = torch.tensor(float(flag))
    train(model, optimizer, range(4, 5), grows=3.0)
    assert torch.equal(growths(optimizer), before) == flag


def test_shorter_steps_follow_once_gradients_no_longer_grow():
    model = make_model()
    optimizer = GLS(model, **OPTIONS)
    train(model, optimizer, range(5))
    grown = growths(optimizer).clone()
    for _ in range(30):
        train(model, optimizer, [4])
    assert (grown > 1.1).all()
    assert (growths(optimizer) < grown).all()
