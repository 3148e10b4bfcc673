"""A weight [k, m] takes the steps that it would take as nn.Linear's [m, k], in its own shape."""

import pytest
import torch
from nets import NORMALIZATIONS, WIDTH, Conv1D, loss_of, make_batch, make_net, snapshot
from tolerances import PRODUCT, SAME_STEPS, assert_near, relative_error
from torch import nn

from gls_fused import GLS, attach

STEPS = 6
OPTIONS = {"rank": 4, "curvature_every": 2, "lr": 0.02}
SITES = ("step", "backward")
VARIANTS = {
    "dense": {"curvature": "dense", "normalize": "factored"},
    "momentum 0": {"momentum": 0.0, "normalize": "spectral"},
    "split": {"split": 2, "normalize": "spectral"},
    "weight decay": {"weight_decay": 0.3, "max_change": 0.05},
    "plain step, bounded": {"normalize": "none", "max_change": 0.05, "lr": 5.0},
    "auto": {"site": "auto"},
}


def upright(tensors):
    """Of the parameters of a net of Conv1D those of nn.Linear."""
    return [tensor.T if tensor.ndim == 2 else tensor for tensor in tensors]


def assert_trains_as_linear(dtype=torch.float64, tolerance=SAME_STEPS, bias=True, **options):
    models = [make_net(kind, bias=bias).to(dtype) for kind in ("mlp", "turned")]
    start = snapshot(models[0])
    for model in models:
        optimizer = GLS(model, **{**OPTIONS, **options})
        for step in range(STEPS):
            for part in range(2):
                inputs, targets = make_batch("mlp", 5 + part, 10 * part + step)
                loss_of(model, (inputs.to(dtype), targets.to(dtype))).backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q, before in zip(
        upright(models[1].parameters()), snapshot(models[0]), start, strict=True
    ):
        assert_near(p, q, tolerance)
        assert relative_error(p, before) > 1e-3
    for p in optimizer.state:
        for key in ("exp_avg", "exp_avg_sq"):
            average = optimizer.state[p].get(key)
            if average is not None and average.ndim == 2:
                assert average.shape == p.shape
    return optimizer


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_every_normalization(backend, normalize):
    assert_trains_as_linear(backend=backend, normalize=normalize, **NORMALIZATIONS[normalize])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_option(backend, variant):
    report = assert_trains_as_linear(backend=backend, **VARIANTS[variant]).report()
    assert "GLS (turned Linear 7 -> 8" in report
    assert "share covered: 100.0%" in report


@pytest.mark.parametrize("low_precision", ["nearest", "master"])
def test_low_precision(backend, low_precision):
    options = {"normalize": "factored", "low_precision": low_precision, "site": "step"}
    tolerance = PRODUCT[torch.bfloat16]
    assert_trains_as_linear(torch.bfloat16, tolerance, backend=backend, **options)


def test_without_bias(backend):
    assert_trains_as_linear(backend=backend, bias=False, site="backward")


@pytest.mark.parametrize("steps", [0, 3, 4])
def test_computes_what_the_module_computes(backend, steps):
    """Outputs and their strides, gradients of inputs and parameters, bit for bit."""
    model = Conv1D(6, WIDTH)
    optimizer = GLS(model, backend=backend, rank=4, curvature_every=2, site="step")
    for _ in range(steps):
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    inputs, found = torch.randn(3, 5, 6), []
    for _ in range(2):
        given = inputs.clone().requires_grad_()
        outputs = model(x=given)
        outputs.square().sum().backward()
        found.append([outputs, given.grad, *(p.grad for p in model.parameters())])
        model.zero_grad()
        optimizer.detach()
    for ours, plain in zip(*found, strict=True):
        assert torch.equal(ours, plain)
        assert ours.stride() == plain.stride()


def test_second_derivative_passes_through_p():
    """As nn.Linear's does: a penalty on the gradient of the inputs."""
    found = []
    for kind in ("mlp", "turned"):
        model = make_net(kind)
        optimizer = GLS(model, site="backward", **OPTIONS)
        loss_of(model, make_batch("mlp", 5, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        inputs = make_batch("mlp", 5, 1)[0].requires_grad_()
        (gradient,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
        gradient.square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for p, q in zip(upright(found[1]), found[0], strict=True):
        assert_near(p, q, SAME_STEPS)


def test_attached():
    found = []
    for kind in ("mlp", "turned"):
        model = make_net(kind)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        attach(model, optimizer, rank=4, curvature_every=2)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, make_batch("mlp", 5, step)).backward()
            optimizer.step()
        found.append(snapshot(model))
    for p, q in zip(upright(found[1]), found[0], strict=True):
        assert_near(p, q, SAME_STEPS)


def test_gradient_that_a_hook_sees_is_the_gradient():
    """The backward site is left, and what was D becomes the gradient again."""
    model = make_net("turned")
    optimizer = GLS(model, rank=4, curvature_every=2, normalize="rms")
    for step in range(3):
        loss_of(model, make_batch("mlp", 5, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert "site backward" in optimizer.report()
    batch = make_batch("mlp", 5, 9)
    loss_of(model, batch).backward()
    optimizer.detach()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    loss_of(model, batch).backward()
    for p, gradient in zip(model.parameters(), found, strict=True):
        assert_near(gradient, p.grad, 1e-9)


def test_another_number_of_outputs_is_refused():
    saved = GLS(model := Conv1D(6, 5))
    model(torch.randn(3, 6)).sum().backward()
    saved.step()
    other = GLS(Conv1D(6, 4))
    with pytest.raises(
        ValueError, match=r"expected a state of a weight \[6, 4\], got one of \[6, 5\]"
    ):
        other.load_state_dict(saved.state_dict())


def test_subclass_with_a_forward_of_its_own_is_not_covered():
    class Scaled(Conv1D):
        def forward(self, x):
            return 2 * super().forward(x)

    optimizer = GLS(nn.Sequential(Scaled(6, 5), nn.Linear(5, 2)))
    assert "Scaled overrides forward" in optimizer.report()
