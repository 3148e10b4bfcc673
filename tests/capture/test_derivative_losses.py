"""Losses of derivatives: penalties, forces, forward mode, checkpoints; the sites agree."""

import copy
import warnings

import pytest
import torch
from tolerances import SAME_STEPS, assert_near
from torch import nn
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from gls_fused import GLS, attach


def make_net(width=64, dtype=torch.float64):
    torch.manual_seed(0)
    layers = nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 4)
    return nn.Sequential(*layers).to(dtype)


def rows(seed, dtype=torch.float64, n=16):
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain(model, x):
    model(x).square().mean().backward()


def gradient_norms(model, x):
    outputs = checkpoint(model, x, use_reentrant=False)
    losses = outputs[:, :2].square().mean(), (outputs[:, 2:] - 1).square().mean()
    weight = model[2].weight
    first, second = (
        torch.autograd.grad(loss, weight, create_graph=True)[0].norm() for loss in losses
    )
    ((first - second).square() + sum(losses)).backward()


def unrolled(model, x):
    """A layer in several checkpointed calls, and a backward that could be differentiated."""
    hidden = torch.tanh(model[0](x))
    for _ in range(3):
        hidden = checkpoint(lambda h: torch.tanh(model[2](h)), hidden, use_reentrant=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using backward.* with create_graph=True")
        model[4](hidden).square().mean().backward(create_graph=True)


def hooked(model, x):
    loss = checkpoint(model, x, use_reentrant=False).square().mean()
    hooks = [param.register_hook(lambda _: None) for param in model.parameters()]
    loss.backward()
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    ("run", "width"),
    [(gradient_norms, 64), (gradient_norms, 96), (unrolled, 64), (hooked, 64), (hooked, 96)],
)
def test_checkpoint_computes_again_as_it_did(backend, run, width):
    """Though layers leave the backward site in between."""
    model = make_net(width)
    optimizer = GLS(model, backend=backend, curvature_every=3)
    for seed in range(2):
        optimizer.zero_grad()
        plain(model, rows(seed))
        optimizer.step()
    assert "site backward" in optimizer.report()
    optimizer.zero_grad()
    twin = copy.deepcopy(model)
    run(model, rows(2))
    run(twin, rows(2))
    # In the others p.grad still holds D.
    lines = optimizer.report().splitlines()
    left = [i for i in (0, 2, 4) if "site step" in "".join(x for x in lines if x[0] == str(i))]
    assert 2 in left
    for i in left:
        for p, q in zip(model[i].parameters(), twin[i].parameters(), strict=True):
            assert_near(p.grad, q.grad, SAME_STEPS)


def forces(model, x):
    x.requires_grad_()
    (force,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (force - 1).square().mean().backward()


def forward_mode(model, x):
    with forward_ad.dual_level():
        outputs, tangent = forward_ad.unpack_dual(
            model(forward_ad.make_dual(x, torch.ones_like(x)))
        )
        (outputs.square().mean() + tangent.square().mean()).backward()


def monitored(model, x):
    plain(model, x)
    torch.autograd.grad(model(50 * x).square().mean(), list(model.parameters()))


def trained_statistics(site, backend, run):
    """Of every layer, after steps whose rows grow."""
    model = make_net(dtype=torch.float64)
    if site == "attach":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        handle = attach(model, optimizer, curvature_every=2, backend=backend)
    else:
        handle = optimizer = GLS(model, site=site, backend=backend, curvature_every=2, lr=0.0)
    for seed in range(6):
        optimizer.zero_grad()
        run(model, rows(seed) * (1 + seed))
        optimizer.step()
    found = handle.diagnostics()
    return {key: found[key] for key in found if key.endswith(("/trace", "/samples"))}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("site", ["step", "auto", "backward", "attach"])
@pytest.mark.parametrize("run", [forces, forward_mode, monitored])
def test_statistics_are_of_the_rows_that_led_to_the_gradients(backend, site, run):
    found = trained_statistics(site, backend, run)
    expected = trained_statistics("step", "reference", plain)
    assert len(found) == 6
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_penalty_under_autocast_is_no_use_of_the_gradient(backend, dtype):
    model = make_net(256, torch.float32)
    optimizer = GLS(model, backend=backend)
    for seed in range(4):
        optimizer.zero_grad()
        x = rows(seed, torch.float32).requires_grad_()
        with torch.autocast("cpu", dtype):
            outputs = model(x)
            (force,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
            loss = (force.float().norm(dim=1) - 1).square().mean() + outputs.float().square().mean()
        loss.backward()
        optimizer.step()
    assert "site backward" in optimizer.report()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_autograd(backend):
    """Of a model that runs eagerly; the gradients are what they are without."""
    torch._dynamo.reset()
    model, twin = make_net(), make_net()
    optimizers = [GLS(net, site="step", backend=backend) for net in (model, twin)]
    for seed in range(3):
        for net, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            loss = net(rows(seed)).square().mean()
            if net is model:
                with compiled_autograd._enable(torch.compile(backend="eager")):
                    loss.backward()
            else:
                loss.backward()
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_near(p, q, SAME_STEPS)
    torch._dynamo.reset()


def test_gradients_of_inputs_cost_what_they_do_without(backend):
    """As of forces and attacks: nothing of the weights is computed."""

    def flops(net):
        x = rows(0).requires_grad_()
        loss = net(x).sum()
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(loss, x)
        return counter.get_total_flops()

    model = make_net()
    optimizer = GLS(model, site="step", backend=backend, curvature_every=2)
    for seed in range(3):
        assert flops(model) == flops(make_net()) > 0
        optimizer.zero_grad()
        plain(model, rows(seed))
        optimizer.step()
