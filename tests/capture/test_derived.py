"""Weights under weight_norm and spectral_norm: P on the parameter that they are computed from."""

import copy

import pytest
import torch
from nets import Conv1D, assert_equal, assert_same_state, gradients, snapshot
from tolerances import PRODUCT, SAME_STEPS, SOLVE, assert_near
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations
from torch.utils.checkpoint import checkpoint

from gls_fused import GLS, attach

OPTIONS = {"rank": 4, "curvature_every": 2, "lr": 0.01}
# Dense and of power 1, so that P can be written down; D itself is averaged.
BARE = {
    "lr": 1e-3,
    "normalize": "none",
    "momentum": 0.5,
    "max_change": None,
    "curvature": "dense",
    "curvature_every": 1,
    "damping": 0.3,
    "power": 1,
}


def old_weight_norm(module):
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(module)


# The norm, the name of what P acts on and of what takes Adam's update.
NORMS = {
    "weight_norm": (
        parametrizations.weight_norm, "parametrizations.weight.original1",
        "parametrizations.weight.original0",
    ),
    "spectral_norm": (parametrizations.spectral_norm, "parametrizations.weight.original", None),
    "old weight_norm": (old_weight_norm, "weight_v", "weight_g"),
    "old spectral_norm": (nn.utils.spectral_norm, "weight_orig", None),
}  # fmt: skip
LAYERS = {
    "linear": lambda: nn.Linear(6, 5),
    "convolution": lambda: nn.Conv2d(2, 5, 3, stride=2, padding=1, bias=False),
}
of_each_norm = pytest.mark.parametrize("norm", NORMS)
of_each = pytest.mark.parametrize("layer", LAYERS)


class Net(nn.Module):
    def __init__(self, norm, layer, how=None):
        super().__init__()
        self.inner, self.how = NORMS[norm][0](LAYERS[layer]()), how
        self.head = nn.Linear(5, 3)

    def forward(self, inputs):
        if self.how is None:
            hidden = self.inner(inputs)
        else:
            hidden = checkpoint(self.inner, inputs, use_reentrant=self.how == "reentrant")
        return self.head(torch.tanh(hidden).flatten(2).mean(2) if hidden.ndim > 2 else hidden)


def make_model(norm, layer, how=None):
    torch.manual_seed(0)
    return Net(norm, layer, how).double()


def inputs_of(layer, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (7, 6) if layer == "linear" else (4, 2, 5, 5)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def train(model, optimizer, layer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        inputs = inputs_of(layer, seed).requires_grad_()
        (model(inputs) - 1).square().mean().backward()
        optimizer.step()
    return snapshot(model)


def rows_of(module, inputs):
    if isinstance(module, nn.Linear):
        return torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
    return F.unfold(inputs, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1)


@of_each
@of_each_norm
def test_directions_are_those_of_the_rows(norm, layer):
    model = make_model(norm, layer)
    optimizer = GLS(model, **BARE)
    inputs = inputs_of(layer, 0)
    (model(inputs) - 1).square().mean().backward()
    names = dict(model.inner.named_parameters())
    weight, bias = names[NORMS[norm][1]], names.get("bias")
    params = [weight] if bias is None else [weight, bias]
    d0 = torch.cat([p.grad.flatten(1) if p.ndim > 1 else p.grad[:, None] for p in params], 1)
    a = rows_of(model.inner, inputs)
    sigma = a.T @ a / len(a)
    damping = 0.3 * sigma.trace() / min(sigma.shape[0], len(a))
    eye = torch.eye(len(sigma), dtype=a.dtype)
    sought = (d0 @ torch.linalg.inv(sigma + damping * eye)).split(
        [weight[0].numel()] + [1] * (len(params) - 1), 1
    )
    optimizer.step()
    assert_near(optimizer.state[weight]["gram"], sigma, SOLVE[a.dtype])
    for param, direction in zip(params, sought, strict=True):
        found = optimizer.state[param]["exp_avg"]
        assert_near(found, 0.5 * direction.reshape(param.shape), SOLVE[a.dtype])
    report = optimizer.report()
    assert "inner: GLS" in report
    lengths = NORMS[norm][2]
    assert lengths is None or f"inner.{lengths}: Adam (the lengths of weight_norm)" in report


@of_each
@of_each_norm
def test_losses_and_gradients_are_the_plain_models(norm, layer):
    model, plain = make_model(norm, layer), make_model(norm, layer)
    optimizer = GLS(model, **OPTIONS)
    for seed in range(4):
        plain.load_state_dict(model.state_dict())
        found = []
        for net in (model, plain):
            net.zero_grad()
            loss = (net(inputs_of(layer, seed)) - 1).square().mean()
            loss.backward()
            found.append([loss, *gradients(net), *net.buffers()])
        assert_equal(*found)
        optimizer.step()


@of_each
@of_each_norm
def test_every_site_is_the_step(norm, layer):
    """Under `attach` the direction is there when the optimizer steps."""
    found = []
    for site in ("step", "backward", "attach"):
        model = make_model(norm, layer)
        options = {"rank": 4, "curvature_every": 2}
        if site == "attach":
            stepper = torch.optim.SGD(
                [p for name, p in model.named_parameters() if name != f"inner.{NORMS[norm][2]}"],
                lr=0.1,
            )
            attach(model, stepper, **options)
        else:
            stepper = GLS(
                model, lr=0.1, normalize="none", momentum=0.0, max_change=None, site=site,
                **options,
            )  # fmt: skip
            for name, p in model.named_parameters():
                p.requires_grad_(name != f"inner.{NORMS[norm][2]}")
        found.append(train(model, stepper, layer, range(5)))
    for other in found[1:]:
        for p, q in zip(other, found[0], strict=True):
            assert_near(p, q, SAME_STEPS)


@pytest.mark.parametrize("how", ["saved", "reentrant"])
@pytest.mark.parametrize("norm", ["weight_norm", "old weight_norm"])
def test_rows_count_once_under_checkpointing(norm, how):
    found = []
    for each in (None, how):
        model = make_model(norm, "convolution", each)
        optimizer = GLS(model, **OPTIONS)
        found.append(train(model, optimizer, "convolution", range(5)))
        assert "no rows yet" not in optimizer.report()
    for p, q in zip(*found, strict=True):
        assert_near(p, q, SAME_STEPS)


@pytest.mark.parametrize("norm", ["weight_norm", "old weight_norm"])
def test_lengths_of_inputs_are_not_covered(norm):
    """The first axis of a transposed convolution's weight is its inputs'."""
    model = nn.Sequential(
        NORMS[norm][0](nn.ConvTranspose2d(2, 5, 3)), nn.Flatten(), nn.LazyLinear(2)
    )
    model(torch.randn(4, 2, 3, 3))
    optimizer = GLS(model, **OPTIONS)
    assert "0.weight: Adam (its norm is of its inputs" in optimizer.report()
    assert [layer.name for layer in optimizer._preconditioner.layers] == ["2"]


@of_each_norm
def test_resumes_bit_for_bit(norm):
    model, other = make_model(norm, "linear"), make_model(norm, "linear")
    optimizer = GLS(model, **OPTIONS)
    train(model, optimizer, "linear", range(3))
    other.load_state_dict(model.state_dict())
    resumed = GLS(other, **OPTIONS)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, stepper in ((model, optimizer), (other, resumed)):
        train(net, stepper, "linear", range(3, 7))
    assert_equal(snapshot(other), snapshot(model))
    assert_same_state(resumed.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_copies_are_plain_and_copies_of_both_go_on(norm):
    model = make_model(norm, "linear")
    optimizer = GLS(model, **OPTIONS)
    train(model, optimizer, "linear", range(3))
    plain, (other, twin) = copy.deepcopy(model), copy.deepcopy((model, optimizer))
    assert type(plain.inner) is model.inner.__class__
    found = [train(*each, "linear", range(3, 7)) for each in ((model, optimizer), (other, twin))]
    assert_equal(*found)
    optimizer.detach()
    assert type(model.inner) is model.inner.__class__


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@of_each
def test_compiled(layer):
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        model = make_model("weight_norm", layer)
        optimizer = GLS(model, **OPTIONS)
        if compiled:
            model.compile(backend="aot_eager")
        found += [train(model, optimizer, layer, range(3)), optimizer.report()]
    for p, q in zip(found[2], found[0], strict=True):
        assert_near(p, q, SAME_STEPS)
    assert found[1] == found[3]
    torch._dynamo.reset()


def test_a_norm_that_is_taken_off_leaves_its_layer_alone():
    model = make_model("weight_norm", "linear")
    optimizer = GLS(model, **OPTIONS)
    train(model, optimizer, "linear", range(2))
    optimizer.zero_grad()
    remove_parametrizations(model.inner, "weight")
    plain = copy.deepcopy(model)
    found = []
    for net in (model, plain):
        net(inputs_of("linear", 2)).square().mean().backward()
        found.append(net.inner.weight.grad)
    assert_equal(found[:1], found[1:])
    assert optimizer._preconditioner.layers[0].sums is None
    optimizer.step()


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_other_parametrizations_take_adams_update():
    def make():
        torch.manual_seed(0)
        layers = [nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), Conv1D(4, 4)]
        register_parametrization(layers[0], "weight", Doubled())
        register_parametrization(parametrizations.weight_norm(layers[1]), "weight", Doubled())
        parametrizations.weight_norm(layers[2], dim=1)
        register_parametrization(layers[3], "bias", Doubled())
        return nn.Sequential(*layers).double()

    model, twin = make(), make()
    optimizer = GLS(model, lr=0.01, momentum=0.9, beta2=0.999)
    adam = torch.optim.Adam(twin.parameters(), lr=0.01)
    report = optimizer.report()
    for place, norms in enumerate(("Doubled", "_WeightNorm, Doubled", "_WeightNorm")):
        expected = f"Adam (the parametrization {norms} is not covered)"
        lines = [line for line in report.splitlines() if line[0] == str(place)]
        assert expected in lines[-1]
    assert "3.weight: Adam (its weight or bias is parametrized)" in report
    for net, stepper in ((model, optimizer), (twin, adam)):
        net(torch.ones(3, 4, dtype=torch.float64)).square().sum().backward()
        stepper.step()
    for p, q in zip(snapshot(model), snapshot(twin), strict=True):
        assert_near(p, q, PRODUCT[torch.float64])
