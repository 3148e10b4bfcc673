"""Modules that wrap, compute, share or make their weights later."""

import gc
import weakref

import pytest
import torch
from nets import KINDS, loss_of, make_batch, make_net, snapshot
from tolerances import SAME_STEPS, assert_near
from torch import nn
from torch.nn import functional as F

from gls_fused import GLS

OPTIONS = {"rank": 4, "curvature_every": 1}


def lines_of(optimizer):
    return dict(line.split(": ", 1) for line in optimizer.report().splitlines())


def train(model, optimizer, batch, steps=4):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(loss_of(model, batch))
        losses[-1].backward()
        optimizer.step()
    return [loss.item() for loss in losses]


# ---- wrapped layers ------------------------------------------------------------------------------


class LowRank(nn.Module):
    """A frozen nn.Linear, and a correction of low rank that is trained."""

    def __init__(self, base, rank):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, inputs):
        return self.base(inputs) + self.up(self.down(inputs))


@pytest.mark.parametrize("site", ["step", "backward"])
def test_low_rank_correction_of_a_frozen_layer(backend, site):
    torch.manual_seed(0)
    model = nn.Sequential(LowRank(nn.Linear(6, 8), 2), nn.Tanh(), nn.Linear(8, 3)).double()
    frozen = snapshot(model[0].base)
    optimizer = GLS(model, lr=0.01, site=site, backend=backend, **OPTIONS)
    losses = train(model, optimizer, make_batch("mlp", 12, 0), 20)
    assert losses[-1] < 0.7 * losses[0]
    lines = lines_of(optimizer)
    for name, shape in (("down", "6 -> 2, 12 rows"), ("up", "2 -> 8, 12 rows")):
        assert lines[f"0.{name}"].startswith(f"GLS (Linear {shape}")
    assert lines["1 frozen layers"] == "not trained"
    assert "0.base" not in lines
    assert lines["share covered"] == f"100.0% of {6 * 2 + 2 * 8 + 8 * 3 + 3} parameters"
    assert not optimizer.state[model[0].base.weight]
    for p, q in zip(snapshot(model[0].base), frozen, strict=True):
        assert torch.equal(p, q)


# ---- lazy modules --------------------------------------------------------------------------------


# torch's own remark on a feature of its.
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("initialised", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_lazy_modules(kind, initialised):
    torch.manual_seed(0)
    first = nn.LazyLinear(4) if kind == "mlp" else nn.LazyConv2d(4, 6)
    model = nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)).double()
    batch = make_batch(kind, 12, 0)
    if initialised:
        model(batch[0])
    optimizer = GLS(model, lr=0.01, **OPTIONS)
    lines = lines_of(optimizer)
    if initialised:
        assert lines["0"].startswith("GLS")
    else:
        expected = "Adam (not initialised yet: run the model once before building the optimizer)"
        assert lines["0.weight"] == lines["0.bias"] == expected
    assert lines["3"].startswith("GLS")
    model(batch[0])
    before = snapshot(model)
    losses = train(model, optimizer, batch, 20)
    assert losses[-1] < losses[0]
    assert not any(torch.equal(p, q) for p, q in zip(snapshot(model), before, strict=True))
    assert ("core" in optimizer.state[model[0].weight]) == initialised


# ---- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"normalize": "adam"}, {"curvature": "dense"}])
@pytest.mark.parametrize("site", ["step", "backward"])
def test_channels_last_trains_as_contiguous(backend, site, options):
    """Images and weights; the momentum has the layout of its weight."""
    models = [make_net("cnn") for _ in range(2)]
    models[1].to(memory_format=torch.channels_last)
    inputs, targets = make_batch("cnn", 12, 0)
    layouts = (torch.contiguous_format, torch.channels_last)
    for model, layout in zip(models, layouts, strict=True):
        optimizer = GLS(model, site=site, backend=backend, **OPTIONS, **options)
        train(model, optimizer, (inputs.to(memory_format=layout), targets), 8)
        weight = model.first.weight
        assert weight.is_contiguous(memory_format=layout)
        assert optimizer.state[weight]["exp_avg"].stride() == weight.stride()
    for p, q in zip(*map(snapshot, models), strict=True):
        assert_near(q, p, SAME_STEPS)


class Doubled(nn.Linear):
    """With a forward of its own."""

    def forward(self, inputs):
        return 2 * super().forward(inputs)


class Named(nn.Linear):
    """Without one."""


def test_subclasses():
    lines = lines_of(GLS(nn.Sequential(Doubled(3, 3), Named(3, 3))))
    assert lines["0.weight"] == (
        "Adam (test_modules.Doubled overrides forward, which may change the weight or the product:"
        " see gls_fused.register)"
    )
    assert lines["1"].startswith("GLS")


def test_forward_replaced_on_the_instance():
    model = nn.Linear(3, 3)
    model.forward = lambda inputs: inputs
    optimizer = GLS(model)
    assert "replaced on the instance" in optimizer.report()


def test_weight_used_in_two_roles():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].register_parameter("extra", model[1].weight)
    lines = lines_of(GLS(model))
    assert lines["0"].startswith("GLS")
    assert lines["0.extra"] == "Adam (shared by 0, 1: its weight is used in two roles)"
    assert "0.weight" not in lines


def test_convolutions_that_share_a_weight_but_not_their_geometry():
    torch.manual_seed(0)
    plain, dilated = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=2, dilation=2)
    dilated.weight, dilated.bias = plain.weight, plain.bias
    model = nn.Sequential(plain, dilated)
    images = torch.randn(2, 2, 6, 6)
    expected = model(images)
    optimizer = GLS(model)
    assert torch.equal(model(images), expected)
    assert "differ in stride, padding, dilation or groups" in optimizer.report()


def test_classes_are_not_kept_alive():
    """As of a trial that defines its model, with what its methods close over."""

    def trial():
        class Own(nn.Linear):
            pass

        class Holder(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner, self.other = nn.Linear(3, 3), Own(3, 3)

            def forward(self, inputs):
                return F.linear(self.other(inputs), self.inner.weight)

        model = Holder()
        optimizer = GLS(model)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(4, 3)).sum().backward()
            optimizer.step()
        assert optimizer.report().count("GLS (Linear") == 2
        return weakref.ref(Holder), weakref.ref(Own)

    classes = trial()
    gc.collect()
    assert [each() for each in classes] == [None, None]
