"""What users do to gradients: p.grad is the gradient wherever somebody could tell."""

import warnings

import pytest
import torch
from test_users_modules import OPTIONS, fit, loss_of, make_fitted, make_mlp
from tolerances import SAME_STEPS, assert_near
from torch import nn
from torch.func import functional_call

from gls_fused import GLS, attach
from gls_fused.capture import conv
from gls_fused.capture.rows import SKETCH_ROWS, take_sample


def params_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def scale(params):
    torch._foreach_mul_([p.grad for p in params], 0.37)


def replace(params):
    for p in params:
        p.grad = p.grad / 3


FACTORS = {
    "clipped": lambda params: nn.utils.clip_grad_norm_(params, 1e-3),
    "scaled": scale,
    "replaced": replace,
    "negated": lambda params: torch._foreach_neg_([p.grad for p in params]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("factor", FACTORS)
def test_common_factor_is_no_use_of_the_gradient(backend, factor, dtype):
    model = make_mlp(dtype)
    optimizer = GLS(model, backend=backend, **OPTIONS)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*p.grad.*")
        for seed in range(4):
            fit(model, optimizer, [seed])
            optimizer.zero_grad()
            loss_of(model, seed).backward()
            FACTORS[factor](list(model.parameters()))
            optimizer.step()
    assert optimizer.report().count("site backward") == 2


def add_decay(params):
    for p in params:
        p.grad.add_(p.detach(), alpha=1e-4)


def add_noise(params):
    for p in params:
        p.grad.add_(torch.randn_like(p), alpha=1e-5)


def write_by_hand(params):
    for p in params:
        p.grad = torch.randn_like(p)


USES = {
    "weight decay": add_decay,
    "noise": add_noise,
    "by hand": write_by_hand,
    "clipped by value": lambda params: nn.utils.clip_grad_value_(params, 1e-4),
    "sign": lambda params: torch._foreach_sign_([p.grad for p in params]),
}


@pytest.mark.parametrize("use", USES)
def test_use_is_noticed_once_per_layer(backend, use):
    model, optimizer = make_fitted(3, backend=backend)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for seed in range(3, 7):
            optimizer.zero_grad()
            loss_of(model, seed).backward()
            USES[use](list(model.parameters()))
            optimizer.step()
    assert len([each for each in found if "p.grad" in str(each.message)]) == 2
    assert "site backward" not in optimizer.report()


def drop_weight(weight, bias):
    weight.grad = None


def drop_bias(weight, bias):
    bias.grad = None


# What P has taken from one gradient into the other.
PARTS = {
    "weight dropped": drop_weight,
    "bias dropped": drop_bias,
    "bias zeroed": lambda weight, bias: bias.grad.zero_(),
    "weight scaled": lambda weight, bias: weight.grad.mul_(0.5),
    "bias scaled": lambda weight, bias: bias.grad.mul_(0.5),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("part", PARTS)
def test_use_of_one_of_two_gradients_is_noticed(backend, part, dtype):
    model = make_mlp(dtype)
    optimizer = GLS(model, backend=backend, **OPTIONS)
    fit(model, optimizer, range(3))
    optimizer.zero_grad()
    loss_of(model, 3).backward()
    PARTS[part](model[2].weight, model[2].bias)
    with pytest.warns(UserWarning, match="layer '2': its p.grad is not what"):
        optimizer.step()
    fit(model, optimizer, [4])
    assert optimizer.report().count("site backward") == 1


def test_load_after_a_batch_that_was_dropped(backend):
    """What the load has made the gradient again is not taken for D that somebody has put back."""
    found = []
    for site in ("step", "auto"):
        model, optimizer = make_fitted(6, backend=backend, site=site)
        loss_of(model, 10).backward()
        optimizer.zero_grad()
        loss_of(model, 11).backward()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        found.append(params_of(model))
    assert_near(found[1], found[0], SAME_STEPS)


def combine(model, optimizer, seed):
    """One gradient of two tasks', as PCGrad and its like do."""
    found = []
    for task in range(2):
        optimizer.zero_grad()
        loss_of(model, 2 * seed + task).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    optimizer.zero_grad()
    for p, *parts in zip(model.parameters(), *found, strict=True):
        p.grad = sum(parts)
    optimizer.step()


def test_gradients_of_several_tasks(backend):
    """Made of D that was cleared since: P is not applied to it again, and a warning says so."""
    model, optimizer = make_fitted(3, backend=backend)
    with pytest.warns(UserWarning, match="written by hand"):
        combine(model, optimizer, 3)
    assert "site backward" not in optimizer.report()


def test_report_of_gradients_that_are_always_written_by_hand(backend):
    """The layer is called, but no row counts."""
    model = make_mlp()
    optimizer = GLS(model, backend=backend, **OPTIONS)
    for seed in range(4):
        combine(model, optimizer, seed)
    assert optimizer.report().count("its gradient is cleared and written anew") == 3


def make_inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 8, generator=generator, dtype=torch.float64)


def equation(model, inputs):
    """First and second derivatives by the inputs, as physics-informed nets have them."""
    inputs = inputs.clone().requires_grad_()
    outputs = model(inputs)
    (first,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), inputs, create_graph=True)
    return first.square().mean() + second.square().mean() + outputs.square().mean()


def penalty(model, inputs):
    loss = model(inputs).square().mean()
    params = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, params, create_graph=True)
    return loss + sum(gradient.square().sum() for gradient in found)


def inner_step(model, inputs):
    """As MAML takes it."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = model(inputs).square().mean()
    found = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    fast = {
        name: p - 0.1 * gradient for (name, p), gradient in zip(params.items(), found, strict=True)
    }
    return functional_call(model, fast, (inputs,)).sub(1).square().mean()


def after_a_backward(model, inputs):
    model(inputs).mean().backward()
    return equation(model, inputs)


class Rowwise(nn.Sequential):
    """Of inputs [n, k], each an image of one channel."""

    def forward(self, inputs):
        return super().forward(inputs[:, None])


def make_convolutions():
    """Of images of one pixel, whose patches are fewer than their outputs."""
    torch.manual_seed(0)
    first, second = nn.Conv1d(1, 40, 8), nn.Conv1d(40, 24, 3, padding=1)
    head = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(24, 3))
    return Rowwise(first, nn.Tanh(), second, head).double()


@pytest.mark.parametrize("bias", ["trained", "frozen", "none"])
@pytest.mark.parametrize("loss", [equation, penalty, inner_step, after_a_backward])
@pytest.mark.parametrize("make", [make_mlp, make_convolutions])
def test_second_derivatives_take_the_steps_of_the_step_site(backend, make, loss, bias, monkeypatch):
    monkeypatch.setattr(conv, "LEAST_SAVED", 0)
    found = []
    for site in ("auto", "step"):
        model = make()
        if bias == "frozen":
            model[0].bias.requires_grad_(False)
        elif bias == "none":
            model[0].bias = None
        optimizer = GLS(model, site=site, backend=backend, rank=4, curvature_every=3)
        fit(model, optimizer, range(2))
        for seed in range(6):
            optimizer.zero_grad()
            loss(model, make_inputs(seed)).backward()
            optimizer.step()
        found.append(params_of(model))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 4, 3)
        self.second = nn.Linear(144, 200)
        self.last = nn.Linear(200, 3)

    def forward(self, images):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(images)).flatten(1))))


def make_images(seed, size=1.0):
    return size * torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def make_optimizer(model, backend, site):
    options = {"rank": 4, "curvature_every": 1, "backend": backend}
    if site != "attach":
        return GLS(model, site=site, **options)
    optimizer = torch.optim.Adam(model.parameters())
    attach(model, optimizer, **options)
    return optimizer


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("site", ["step", "attach"])
def test_dropped_rows_of_a_layer_that_the_step_does_not_use(backend, site, set_to_none):
    found = []
    for drops in (False, True):
        model = Net()
        optimizer = make_optimizer(model, backend, site)
        for seed in range(5):
            model(make_images(seed)).square().mean().backward()
            optimizer.step()
            model.zero_grad(set_to_none)
            if drops:
                model(make_images(99, 50.0)).sum().backward()
                model.zero_grad(set_to_none)
            model.last(torch.ones(2, 200)).sum().backward()
            optimizer.step()
            model.zero_grad(set_to_none)
        found.append(params_of(model))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def ask_for_inputs(model):
    images = make_images(99, 50.0).requires_grad_()
    model(images).sum().backward(inputs=[images])


def ask_for_another_parameter(model):
    model(make_images(99, 50.0)).sum().backward(inputs=[model.last.bias])
    model.last.bias.grad = None


def clear_twice(model):
    for _ in range(2):
        model(make_images(99, 50.0)).sum().backward()
        for p in model.parameters():
            p.grad = None


def fail(model):
    outputs = model(make_images(99, 50.0))
    outputs.register_hook(lambda gradient: gradient[99])
    with pytest.raises(IndexError):
        outputs.sum().backward()


@pytest.mark.parametrize("asks", [ask_for_inputs, ask_for_another_parameter, clear_twice, fail])
@pytest.mark.parametrize("site", ["step", "auto", "backward", "attach"])
def test_rows_whose_gradient_does_not_count(backend, site, asks):
    found = []
    for interferes in (False, True):
        model = Net()
        optimizer = make_optimizer(model, backend, site)
        for seed in range(5):
            if interferes:
                asks(model)
            model(make_images(seed)).square().mean().backward()
            optimizer.step()
            model.zero_grad()
        found.append(params_of(model))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("period", [2, 3, 4, 7])
@pytest.mark.parametrize(
    ("n", "most", "draws"),
    [
        *((n, SKETCH_ROWS, 50) for n in (1025, 1536, 2047, 3000)),
        *((n, 16, 600) for n in (17, 20, 24, 50)),
    ],
)
def test_sample_of_a_periodic_layout_is_fair(n, most, draws, period):
    """Every kind gets its share, where n is no multiple of the sample too."""
    kinds = torch.arange(n) % period
    counts = torch.zeros(period)
    for draw in range(draws):
        sample, weight = take_sample(kinds, most, torch.tensor(draw))
        counts += weight * torch.bincount(sample, minlength=period) / draws
    torch.testing.assert_close(counts, torch.bincount(kinds).float(), rtol=0.1, atol=0.0)


def release_by_detaching(model, optimizer):
    optimizer.detach()


def release_by_another(model, optimizer):
    GLS(model).detach()


def hook_and_call(model, optimizer):
    model[0].weight.register_hook(lambda gradient: gradient)
    loss_of(model, 9)


def ask_to_differentiate_again(model, optimizer):
    torch.autograd.grad(loss_of(model, 9), list(model.parameters()), create_graph=True)


LEAVES = [release_by_detaching, release_by_another, hook_and_call, ask_to_differentiate_again]


@pytest.mark.parametrize("leave", LEAVES)
def test_layers_leave_the_backward_site_after_their_gradient_was_cleared(backend, leave):
    model = make_mlp()
    optimizer = GLS(model, backend=backend, **OPTIONS)
    fit(model, optimizer, range(3))
    assert optimizer.report().count("site backward") == 2
    loss_of(model, 5).backward()
    model.zero_grad()
    leave(model, optimizer)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("leave", LEAVES)
def test_gradient_that_was_written_instead_stays(backend, leave):
    model = make_mlp()
    optimizer = GLS(model, backend=backend, **OPTIONS)
    fit(model, optimizer, range(3))
    loss_of(model, 5).backward()
    written = [torch.randn_like(p) for p in model.parameters()]
    for p, gradient in zip(model.parameters(), written, strict=True):
        p.grad = gradient.clone()
    leave(model, optimizer)
    for p, gradient in zip(model.parameters(), written, strict=True):
        assert torch.equal(p.grad, gradient)


def test_two_steps_on_the_same_gradients(backend):
    """Between two steps that gather, so that P is the same for both."""
    models = [make_mlp(torch.float64) for _ in range(2)]
    for model, site in zip(models, ("auto", "step"), strict=True):
        optimizer = GLS(model, backend=backend, site=site, curvature_every=4, max_change=None)
        fit(model, optimizer, range(5))
        before = params_of(model)
        optimizer.zero_grad()
        loss_of(model, 7).backward()
        optimizer.step()
        optimizer.step()
        assert optimizer.report().count("site backward") == 2 * (site == "auto")
    moved = params_of(models[1]) - before
    error = (params_of(models[0]) - params_of(models[1])).norm() / moved.norm()
    assert error < 1e-9


def test_scale_of_the_gradient_chosen_after_the_backward(backend):
    """It needs the gradient's norm, where p.grad holds the direction."""
    models = [make_mlp(torch.float64) for _ in range(2)]
    for model, site in zip(models, ("auto", "step"), strict=True):
        optimizer = GLS(model, backend=backend, site=site, normalize="none", lr=0.1, **OPTIONS)
        fit(model, optimizer, range(3))
        optimizer.zero_grad()
        loss_of(model, 7).backward()
        optimizer.param_groups[0]["normalize"] = "sgd"
        optimizer.step()
    torch.testing.assert_close(params_of(models[0]), params_of(models[1]))


@pytest.mark.parametrize("changes", ["weight", "bias"])
def test_what_no_gradient_needs_may_change_before_the_backward(backend, changes):
    """As with torch's own op: the weight where the inputs need no gradient, the bias always."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64))
    optimizer = GLS(model, backend=backend)
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(torch.randn(6, 8)).square().mean()
        with torch.no_grad():
            if changes == "weight":
                model[0].weight.mul_(0.99)
            else:
                model[2].bias.mul_(0.99)
        loss.backward()
        optimizer.step()
    assert optimizer.report().count("site backward") == 2
    loss = model(torch.randn(6, 8)).square().mean()
    with torch.no_grad():
        model[2].weight.mul_(0.99)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
