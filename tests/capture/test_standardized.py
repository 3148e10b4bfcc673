"""Convolutions that standardize or pad before their op: P on the parameter, of the op's rows."""

import copy

import pytest
import torch
from nets import assert_equal, assert_same_state, gradients, snapshot
from tolerances import SAME_STEPS, SOLVE, assert_near
from torch import nn
from torch.nn import functional as F

from gls_fused import GLS

std_conv = pytest.importorskip("timm.layers.std_conv")
OPTIONS = {"rank": 4, "curvature_every": 2, "lr": 0.01}
BIT, SAME = "WeightStandardizedConv2d", "Conv2dSame"
CLASSES = ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame", BIT, SAME)
GROUPED = (("StdConv2d", 2), (SAME, 2))


def make_model(name, groups=1):
    torch.manual_seed(0)
    holder = std_conv
    if name == BIT:
        holder = pytest.importorskip("transformers.models.bit.modeling_bit")
    if name == SAME:
        holder = pytest.importorskip("timm.layers.conv2d_same")
    layer = getattr(holder, name)(2, 4, 3, stride=2, bias=True, groups=groups)
    return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)).double()


def inputs_of(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 2, 6, 6, generator=generator, dtype=torch.float64)


def train(model, optimizer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        (model(inputs_of(seed)) - 1).square().mean().backward()
        optimizer.step()
    return snapshot(model)


@pytest.mark.parametrize(("name", "groups"), [*((name, 1) for name in CLASSES), *GROUPED])
def test_direction_is_that_of_the_rows(name, groups, monkeypatch):
    model = make_model(name, groups)
    optimizer = GLS(
        model, normalize="none", momentum=0.5, curvature="dense", power=1, max_change=None
    )
    images, convolve = [], F.conv2d
    with monkeypatch.context() as patch:
        record = lambda x, *args: images.append((x, args[2:4])) or convolve(x, *args)  # noqa: E731
        patch.setattr(F, "conv2d", record)
        copy.deepcopy(model)(inputs_of(0))
    ((x, (stride, padding)),) = images
    a = F.unfold(x, 3, stride=stride, padding=padding)
    a = a.unflatten(1, (groups, -1)).permute(0, 1, 3, 2).flatten(0, 2)
    a = torch.cat([a, a.new_ones(len(a), 1)], 1)
    (model(inputs_of(0)) - 1).square().mean().backward()
    weight, bias = model[0].weight, model[0].bias
    d0 = torch.cat([weight.grad.flatten(1), bias.grad[:, None]], 1)
    optimizer.step()
    sigma = a.T @ a / len(a)
    damping = 0.3 * sigma.trace() / min(a.shape[::-1])
    d = d0 @ torch.linalg.inv(sigma + damping * torch.eye(len(sigma), dtype=a.dtype))
    assert_near(optimizer.state[weight]["gram"], sigma, SOLVE[a.dtype])
    found = [optimizer.state[param]["exp_avg"] for param in (weight, bias)]
    assert_near(found[0], 0.5 * d[:, :-1].reshape(weight.shape), SOLVE[a.dtype])
    assert_near(found[1], 0.5 * d[:, -1], SOLVE[a.dtype])
    kind = SAME if name == SAME else "standardized Conv2d"
    assert f"0: GLS ({kind} {18 // groups + 1} -> 4" in optimizer.report()


@pytest.mark.parametrize("name", CLASSES)
def test_trains_and_resumes_beside_the_plain_model(name):
    """Losses and gradients are the plain model's, and a resumed run's, bit for bit."""
    model, plain = make_model(name), make_model(name)
    optimizer = GLS(model, **OPTIONS)
    for seed in range(4):
        plain.load_state_dict(model.state_dict())
        found = []
        for net in (model, plain):
            net.zero_grad()
            loss = (net(inputs_of(seed)) - 1).square().mean()
            loss.backward()
            found.append([loss, *gradients(net)])
        assert_equal(*found)
        optimizer.step()
    other = make_model(name)
    other.load_state_dict(model.state_dict())
    resumed = GLS(other, **OPTIONS)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_equal(train(other, resumed, range(4, 7)), train(model, optimizer, range(4, 7)))
    assert_same_state(resumed.state_dict(), optimizer.state_dict())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_in_whole_graphs():
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        model = make_model("ScaledStdConv2d")
        optimizer = GLS(model, **OPTIONS)
        if compiled:
            model.compile(fullgraph=True, backend="aot_eager")
        found += [train(model, optimizer, range(3)), optimizer.report()]
    for p, q in zip(found[2], found[0], strict=True):
        assert_near(p, q, SAME_STEPS)
    assert found[1] == found[3]
    torch._dynamo.reset()
