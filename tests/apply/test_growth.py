"""Rates that grow with the directions of a layer."""

import copy

import pytest
import torch
from torch import nn

from gls_fused import GLS
from gls_fused.backends.dispatch import resolve_backend

# Of every step, so that they differ from 1.
OPTIONS = {"curvature_every": 1, "beta2": 0.5, "max_growth": 3.0, "rank": 3, "normalize": "row"}


def make_model():
    torch.manual_seed(0)
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


def measure(
    means, every=1, beta2=0.0, most=100.0, first=None, dtype=torch.float64, name="reference"
):
    """Growth and u after each of some means, one layer's, from the step after its first."""
    growth, slow = torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype)
    found = []
    for index, mean in enumerate(means):
        step = torch.tensor(1.0 + every * (index + 1) if first is None else first + index * every)
        resolve_backend(name, ["cpu"]).measure_growths_(
            [torch.tensor(mean, dtype=dtype)], [growth], [slow], [step],
            beta2=beta2, every=every, most=most,
        )  # fmt: skip
        found.append((growth.item(), slow.item()))
    return found


@pytest.mark.parametrize("every", [1, 10])
def test_growth_is_over_the_average_that_adam_has(backend, every):
    means = [2.0**index for index in range(12)]
    adam, weight = 0.0, 0.0
    for mean, (growth, slow) in zip(means, measure(means, every, name=backend), strict=True):
        kept = 0.999**every
        adam, weight = kept * adam + (1 - kept) * mean, kept * weight + (1 - kept)
        # The mean of the layer's first step is missing, so that the next one counts more.
        assert slow == pytest.approx(adam / weight, rel=0.05 if every > 1 else 0.3)
        assert growth == pytest.approx((mean / slow) ** 0.5, rel=1e-6)


def test_growth_is_that_of_a_corrected_mean_and_within_its_range(backend):
    # Averages of ones that began at zero.
    averages = [1 - 0.95**step for step in range(2, 30)]
    found = measure(averages, beta2=0.95, name=backend)
    assert found == [pytest.approx((1, 1), rel=1e-5)] * 28
    assert {growth for growth, _ in measure([4.0, 2.0, 1.0], name=backend)} == {1.0}
    assert measure([1.0, 100.0], most=1.25, name=backend)[-1][0] == 1.25


@pytest.mark.parametrize("mean", [0.0, 1e-320, 1e-40, float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_growth_of_means_beyond_the_dtype(backend, dtype, mean):
    for means in ([1.0, mean, mean], [mean, mean]):
        found = measure(means, dtype=dtype, name=backend)
        assert all(1 <= growth <= 100 for growth, _ in found)
    assert [growth for growth, _ in found] == [1.0, 1.0]


@pytest.mark.parametrize("step", [0.0, 1.0])
def test_first_step_of_a_layer_is_not_measured(backend, step):
    assert measure([3.0], first=step, name=backend) == [(1, 0)]


def test_growth_of_a_layer_that_has_grown_before_it_is_known(backend):
    """As of a state of an earlier version, or where max_growth is set later: u starts as a."""
    assert measure([1.0], every=10, first=5000.0, name=backend) == [(1, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_growth_of_layers_of_any_shape(backend, dtype):
    """As the reference's; none where `skip` is true."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.rand(shape, generator=generator, dtype=dtype)

    squares = [draw(70), draw(13, 40).T, draw(2, 3, 5, 5).to(memory_format=torch.channels_last)]
    squares += [draw(), draw(0, 4), draw(90)[::3]]
    steps = [torch.tensor(float(2 + 30 * i)) for i in range(len(squares))]
    found, sought, kept = (
        [[draw() * 0 + 1.5 for _ in squares], [torch.full((), 0.1, dtype=dtype) for _ in squares]]
        for _ in range(3)
    )
    options = {"beta2": 0.9, "every": 10, "most": 1.9}
    for name, results in ((backend, found), ("reference", sought)):
        resolve_backend(name, ["cpu"]).measure_growths_(squares, *results, steps, **options)
    resolve_backend(backend, ["cpu"]).measure_growths_(
        squares, *kept, steps, **options, skip=torch.tensor(True)
    )
    for numbers, expected in zip(found, sought, strict=True):
        torch.testing.assert_close(numbers, expected, rtol=1e-5, atol=1e-7)
    assert len({growth.item() for growth in found[0]}) > 3
    assert kept[0] == [1.5] * len(squares)


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


class Two(nn.Module):
    """Alike; a step has one of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(6, 5)
        self.second.load_state_dict(self.first.state_dict())

    def take_turns(self, optimizer, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step // 2)
            optimizer.zero_grad()
            layer = self.second if step % 2 else self.first
            outputs = layer(torch.randn(8, 6, generator=generator))
            ((outputs - 1).square().mean() * 1.5 ** (step // 2)).backward()
            optimizer.step()


def test_growth_of_a_layer_that_rests_when_it_is_due(backend):
    """It is measured after the next step that it takes, also where that follows a restart."""
    options = {**OPTIONS, "curvature_every": 4}
    model = Two()
    optimizer = GLS(model, backend=backend, **options)
    model.take_turns(optimizer, range(9))
    twin, copied = copy.deepcopy((model, optimizer))
    later = copy.deepcopy(model)
    resumed = GLS(later, backend=backend, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, mine in ((model, optimizer), (twin, copied), (later, resumed)):
        each.take_turns(mine, range(9, 20))
        first, second = growths(mine)
        assert first == second > 1
    for other in (twin, later):
        assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.parametrize("normalize", ["rms", "row", "factored", "adam"])
def test_a_smaller_max_growth_holds_at_once(backend, normalize):
    """And not from the next measurement on alone."""
    moved = []
    for kept in (2.5, 1.25):
        model = make_model()
        options = {**OPTIONS, "normalize": normalize, "curvature_every": 10}
        optimizer = GLS(model, backend=backend, **options)
        train(model, optimizer, range(3))
        for layer in (model[0], model[2]):
            optimizer.state[layer.weight]["growth"].fill_(kept)
        optimizer.param_groups[0]["max_growth"] = 1.25
        assert optimizer.diagnostics()["0/growth"] == 1.25
        train(model, optimizer, range(3, 5))
        moved.append([*model.parameters()])
    assert all(map(torch.equal, *moved))


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
