"""Parameters of 16 bits: rounding, the float32 copy, and an epoch against float32."""

import functools

import pytest
import torch
from nets import loss_of, make_batch, make_net, snapshot
from tolerances import assert_near
from torch import nn
from torch.nn import functional as F

from benchmarks.workloads.data import load_dataset
from gls_fused import GLS, reference
from gls_fused.apply.low_precision import POLICIES, make_seeds
from gls_fused.backends.dispatch import resolve_backend
from gls_fused.groups import NORMALIZATIONS

DTYPES = [torch.bfloat16, torch.float16]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def neighbours(values, dtype):
    """The numbers of `dtype` on both sides of each value, by exhaustion; float64."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).double()
    every = every[every.isfinite()].unique()
    above = torch.searchsorted(every, values.double())
    below = torch.searchsorted(every, values.double(), right=True) - 1
    return every[below], every[above]


def round_stochastically(values, dtype, seed=1, step=0, backend=reference):
    param = torch.empty_like(values, dtype=dtype)
    backend.round_params_([param], [values], [seed], [torch.tensor(float(step))])
    return param


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-7, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_to_one_of_the_neighbours_and_right_in_the_mean(dtype, scale):
    """Mean of 4000 draws: within 5 standard errors, each a spacing over 2 sqrt(4000) at most."""
    values = torch.randn(50, generator=seeded()) * scale
    low, high = neighbours(values, dtype)
    draws = values.expand(4000, -1).contiguous()
    rounded = round_stochastically(draws, dtype).double()
    assert ((rounded == low) | (rounded == high)).all()
    error = (rounded.mean(0) - values.double()).abs()
    assert (error <= 5 * (high - low) / (2 * 4000**0.5)).all()
    # To the nearest the mean errs by more, so that the bound can tell.
    assert not ((values.to(dtype).double() - values.double()).abs() <= error.max()).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_dtype_holds_stays(dtype):
    held = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    held = held[~held.isnan()]
    assert torch.equal(round_stochastically(held.float(), dtype), held)
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.4e38, -3.4e38])
    found = round_stochastically(odd, dtype)
    assert torch.equal(found.nan_to_num(7), odd.to(dtype).nan_to_num(7))


def test_draws_are_uniform_and_have_nothing_to_do_with_one_another():
    """Within 5 standard errors, beside their neighbours, those of other seeds and other steps."""
    count, step = 100_000, torch.tensor(3.0)
    draws = reference.draw_uniform(count, 7, step).double()
    shares = torch.histc(draws, bins=16, min=0, max=1) / count
    assert (shares - 1 / 16).abs().max() < 5 * (1 / 16 / count) ** 0.5
    others = [reference.draw_uniform(count, seed, step) for seed in (0, 6, 8, 7 + 2**31)]
    others += [reference.draw_uniform(count, 7, step + more) for more in (-3, 1, 2**20)]
    others += [draws.roll(shift) for shift in (1, 2, 3, 64, 2**15)]
    for other in others:
        both = torch.corrcoef(torch.stack([draws, other.double()]))
        assert both[0, 1].abs() < 5 / count**0.5


def train(dtype, steps=5, kind="mlp", **options):
    model = make_net(kind).to(dtype)
    optimizer = GLS(model, lr=1e-3, rank=4, **options)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, [x.to(dtype) for x in make_batch(kind, 9, step)]).backward()
        optimizer.step()
    return snapshot(model), optimizer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", ["rms", "adam", "sgd", "none"])
def test_bits_are_those_of_the_seed(dtype, normalize):
    options = {"low_precision": "stochastic", "normalize": normalize}
    torch.manual_seed(1)
    first, _ = train(dtype, seed=3, **options)
    torch.manual_seed(2)
    again, _ = train(dtype, seed=3, **options)
    other, _ = train(dtype, seed=4, **options)
    assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(first, other, strict=True))


def test_every_step_of_every_seed_has_draws_of_its_own():
    drawn, params = set(), [torch.ones(1), torch.ones(1)]
    for seed in range(20):
        seeds = make_seeds({"seed": seed, "params": params})
        for step in range(10):
            count = torch.tensor(float(step))
            drawn.update(reference.draw_uniform(1, seeds(param), count).item() for param in params)
    # Of 400 draws of 24 bits two are alike with a probability of 1 in 200.
    assert len(drawn) == 400


def test_layers_step_together_up_to_so_many_elements(monkeypatch, backend):
    """Copies and roundings are of all of a run at once, and a run is of so many elements."""
    monkeypatch.setattr("gls_fused.apply.kept.MOST_COPIED", 150)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5))).to(torch.bfloat16)
    optimizer = GLS(model, backend=backend, normalize="row")
    module = resolve_backend(backend, ["cpu"])
    sizes, plain = [], module.round_params_
    monkeypatch.setattr(
        module,
        "round_params_",
        lambda params, *rest: sizes.append(len(params)) or plain(params, *rest),
    )
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(9, 8, dtype=torch.bfloat16)).float().square().mean().backward()
        optimizer.step()
    # Weights and biases of three, and of two.
    assert sizes == [6, 4] * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("low_precision", POLICIES)
def test_averages_are_float32(dtype, low_precision):
    _, optimizer = train(dtype, low_precision=low_precision, normalize="adam")
    for state in optimizer.state.values():
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
        assert ("master" in state) == (low_precision == "master")
        if "master" in state:
            assert state["master"].dtype == torch.float32


@pytest.mark.parametrize("covered", [True, False])
def test_parameter_is_the_rounded_copy_which_follows_it(covered):
    """A weight that is set from outside is what the next step starts from."""
    torch.manual_seed(0)
    module = nn.Linear(4, 3) if covered else nn.LayerNorm(4)
    module.to(torch.bfloat16)
    optimizer = GLS(module, lr=1e-4, low_precision="master")

    def step():
        optimizer.zero_grad()
        (module(torch.eye(4, dtype=torch.bfloat16)) - 2).float().square().sum().backward()
        optimizer.step()

    for _ in range(3):
        step()
    master = optimizer.state[module.weight]["master"]
    assert torch.equal(master.to(torch.bfloat16), module.weight)
    assert not torch.equal(master, module.weight.float())
    kept = master.clone()
    with torch.no_grad():
        module.weight.view(-1)[0] = 5
    step()
    moved = (optimizer.state[module.weight]["master"] - kept).view(-1)
    assert abs(moved[0] + kept.view(-1)[0] - 5) < 1e-3
    assert moved[1:].abs().max() < 1e-3
    assert optimizer.state[module.weight]["master"] is master


@functools.cache
def digits():
    return load_dataset("digits")


@functools.cache
def loss_after_an_epoch(dtype, low_precision, seed):
    """Over all training images, after 90 steps of 16."""
    data = digits()
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 10)
    ).to(dtype)
    optimizer = GLS(model, lr=1e-3, low_precision=low_precision)
    for batch in torch.randperm(len(data.images), generator=seeded(seed)).split(16):
        optimizer.zero_grad()
        outputs = model(data.images[batch].to(dtype))
        F.cross_entropy(outputs.float(), data.labels[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        outputs = model(data.images.to(dtype)).float()
        return F.cross_entropy(outputs, data.labels).item()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("low_precision", "bound"), [("stochastic", 0.02), ("master", 0.006)])
def test_an_epoch_in_bfloat16_is_one_in_float32(low_precision, bound, seed):
    """Relative to float32's loss; rounding to the nearest, which stalls, is farther off."""
    exact = loss_after_an_epoch(torch.float32, "nearest", seed)
    assert exact < 1.2
    near = loss_after_an_epoch(torch.bfloat16, low_precision, seed)
    assert abs(near / exact - 1) < bound
    stalled = loss_after_an_epoch(torch.bfloat16, "nearest", seed)
    assert stalled / exact - 1 > 2 * bound


@pytest.mark.parametrize("size", [1e-5, 300.0])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("normalize", [*NORMALIZATIONS])
def test_squares_of_float16_gradients_are_taken_in_float32(normalize, momentum, size, backend):
    """In float16 those below 2e-4 are zero and those above 256 infinite."""
    moved = {}
    # Of those whose step is as long as the gradient, `max_change` decides.
    lr = 1e5 if normalize in ("sgd", "none") else 0.03
    for dtype in (torch.float16, torch.float32):
        torch.manual_seed(0)
        layer = nn.Linear(16, 32).to(dtype)
        optimizer = GLS(
            *(layer, lr), site="step", normalize=normalize, momentum=momentum, eps=1e-12,
            low_precision="nearest", backend=backend, spectral_head=True,
        )  # fmt: skip
        for _ in range(3):
            optimizer.zero_grad()
            outputs = layer(torch.randn(64, 16).to(dtype))
            (outputs.float() * torch.randn(64, 32)).sum().mul(size).backward()
            before = layer.weight.detach().double().clone()
            optimizer.step()
            moved.setdefault(dtype, []).append(layer.weight.detach().double() - before)
    for near, exact in zip(moved[torch.float16], moved[torch.float32], strict=True):
        assert exact.norm() > 0
        assert_near(near, exact, 0.05)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_apart_has_rate_and_decay_of_more_digits_than_it_has(backend, dtype):
    """In the mean over entries, of which each is rounded: by 1 - .3 * .1, and .3 of the update."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4096, dtype=dtype)
    start = torch.linspace(1, 2, 4096).to(dtype)
    groups = [{"params": [layer.weight], "lr": 1.0}, {"params": [layer.bias], "lr": 0.3}]
    options = {"normalize": "none", "momentum": 0.0, "max_change": None, "backend": backend}
    optimizer = GLS(
        groups, model=layer, low_precision="nearest", weight_decay=0.1, site="step", **options
    )

    def step(slope):
        """What a step makes of the bias, and the update at rate 1."""
        with torch.no_grad():
            layer.bias.copy_(start)
        optimizer.zero_grad()
        (layer(torch.ones(3, 4, dtype=dtype)) * slope).sum().backward()
        optimizer.step()
        return layer.bias.detach().double()

    # The layer has a P from here on.
    step(torch.ones(4096, dtype=dtype))
    decayed = step(torch.zeros(4096, dtype=dtype))
    assert abs((decayed / start.double()).mean() - 0.97) < 5e-4
    optimizer.param_groups[1]["weight_decay"] = 0.0
    layer.weight.data.zero_()
    slope = torch.linspace(-1, -0.5, 4096).to(dtype)
    optimizer.param_groups[1]["lr"] = 1.0
    whole = step(slope) - start.double()
    optimizer.param_groups[1]["lr"] = 0.3
    assert abs(((step(slope) - start.double()) / whole).mean() - 0.3) < 3e-3 * 0.3
