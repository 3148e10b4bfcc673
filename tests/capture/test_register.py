"""Classes that compute what a known kind computes, named by their users or known by their path."""

import copy

import pytest
import torch
from nets import snapshot
from tolerances import PRODUCT, SAME_STEPS, assert_near, relative_error
from torch import nn
from torch.nn import functional as F

import gls_fused
from gls_fused import GLS
from gls_fused.capture import find, modules

OPTIONS = {"rank": 4, "curvature_every": 2, "lr": 0.02}


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch):
    monkeypatch.setattr(find, "KINDS", dict(find.KINDS))
    monkeypatch.setattr(modules, "ALIKE", set(modules.ALIKE))
    monkeypatch.setattr(find, "ALIKE", modules.ALIKE)


class Product(nn.Module):
    """As torch_geometric's: no nn.Linear, and its inputs have a name of their own."""

    def __init__(self, inputs, outputs, bias=True):
        super().__init__()
        linear = nn.Linear(inputs, outputs, bias=bias)
        self.weight = linear.weight
        if bias:
            self.bias = linear.bias

    def forward(self, x):
        outputs = x @ self.weight.T
        return outputs + self.bias if hasattr(self, "bias") else outputs


class Turned(Product):
    def __init__(self, inputs, outputs, bias=True):
        super().__init__(inputs, outputs, bias)
        self.weight = nn.Parameter(self.weight.detach().T.contiguous())

    def forward(self, x):
        return (x @ self.weight) + self.bias


class Image(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


class Signal(nn.Conv1d):
    def forward(self, x):
        return F.conv1d(x, self.weight, self.bias)


class Volume(nn.Conv3d):
    """In parts, as diffusers' CogVideoXSafeConv3d."""

    def forward(self, x):
        return torch.cat([super(Volume, self).forward(part) for part in x.chunk(2)])


class Standardised(nn.Conv2d):
    """As timm's StdConv2d: not the convolution with its own weight."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def train(model, inputs, **options):
    optimizer = GLS(model, **OPTIONS, **options)
    for step in range(6):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        given = torch.randn(*inputs, generator=generator, dtype=torch.float64)
        (model(given) - 1).square().mean().backward()
        optimizer.step()
    return optimizer.report()


ALIKE = {
    "linear": (Product, nn.Linear, (6, 5), (4, 6)),
    "turned linear": (Turned, nn.Linear, (6, 5), (4, 6)),
    "conv1d": (Signal, nn.Conv1d, (2, 5, 3), (4, 2, 6)),
    "conv2d": (Image, nn.Conv2d, (2, 5, 3), (4, 2, 6, 6)),
    "conv3d": (Volume, nn.Conv3d, (2, 5, 3), (4, 2, 4, 4, 4)),
}


@pytest.mark.parametrize("site", ["step", "backward"])
@pytest.mark.parametrize("kind", ALIKE)
def test_trains_as_the_known_kind(backend, kind, site):
    ours, theirs, sizes, inputs = ALIKE[kind]
    gls_fused.register(ours, kind)
    found = []
    for module_class in (ours, theirs):
        torch.manual_seed(0)
        model = nn.Sequential(module_class(*sizes)).double()
        start = snapshot(model)
        assert "share covered: 100.0%" in train(model, inputs, site=site, backend=backend)
        moved = [relative_error(p, q) for p, q in zip(model.parameters(), start, strict=True)]
        assert min(moved) > 1e-3
        found.append({name: p.detach() for name, p in model[0].named_parameters()})
    if kind == "turned linear":
        found[0]["weight"] = found[0]["weight"].T
    for name, expected in found[1].items():
        assert_near(found[0][name], expected, SAME_STEPS)


def test_without_bias_there_need_be_no_attribute():
    gls_fused.register(Product, "linear")
    model = Product(6, 5, bias=False).double()
    assert "GLS (Linear 6 -> 5, 4 rows" in train(model, (4, 6), site="backward")


def test_subclasses_are_covered_unless_they_compute_otherwise():
    class Named(Product):
        pass

    class Doubled(Product):
        def forward(self, x):
            return 2 * super().forward(x)

    gls_fused.register(Product, "linear")
    report = GLS(nn.Sequential(Named(3, 4), Doubled(4, 3))).report()
    assert "0: GLS (Linear 4 -> 4" in report
    assert "Doubled overrides forward, which may change the weight" in report
    gls_fused.register(Doubled, "linear")
    assert "1: GLS" in GLS(nn.Sequential(Named(3, 4), Doubled(4, 3))).report()


@pytest.mark.parametrize("site", ["auto", "backward"])
def test_rows_of_calls_with_more_than_the_inputs_are_not_seen(site):
    class Scaled(Product):
        def forward(self, x, scale=None):
            return super().forward(x) * (1 if scale is None else scale)

    gls_fused.register(Scaled, "linear")
    model, inputs = Scaled(6, 5), torch.randn(4, 6)
    plain = copy.deepcopy(model)
    optimizer = GLS(model, site=site)
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs, scale=2).sum().backward()
        optimizer.step()
    assert "Adam (it is called with more than its inputs)" in optimizer.report()
    for scale in (None, 2):
        plain.load_state_dict(model.state_dict())
        assert torch.equal(model(inputs, scale), plain(inputs, scale))
        optimizer.zero_grad()
        model(inputs, scale).sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    model(inputs).sum().backward()
    optimizer.step()
    assert "Linear 7 -> 5" in optimizer.report()
    if site == "backward":
        with pytest.raises(RuntimeError, match=r"more than its inputs.*site=\"step\""):
            model(inputs, 2)


def test_weight_that_is_changed_before_use():
    report = GLS(Standardised(2, 3, 3)).report()
    assert "weight: Adam (test_register.Standardised overrides forward, which may change" in report


def test_weight_of_another_shape():
    gls_fused.register(Product, "linear")
    model = Product(3, 4)
    model.weight = nn.Parameter(torch.randn(2, 4, 3))
    assert "weight: Adam (its weight has 3 dimensions, not 2)" in GLS(model).report()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (Product(2, 2), "linear"),
            TypeError,
            "module_class: expected a subclass of nn.Module, got",
        ),
        ((int, "linear"), TypeError, r"subclass of nn.Module, got <class 'int'>"),
        (
            (Product, "conv2d"),
            TypeError,
            r"a subclass of nn.Conv2d for 'conv2d', got test_register",
        ),
        ((Product, "linea"), ValueError, r"kind: expected linear, turned linear, .*, got 'linea'"),
        ((Product, ["linear"]), ValueError, r"kind: expected linear, .*, got \['linear'\]"),
        ((nn.Module, "linear"), ValueError, "module_class: expected a class of its own"),
        ((nn.Linear, "turned linear"), ValueError, "module_class: Linear is covered as it is"),
        ((nn.LSTM, "experts"), ValueError, "module_class: LSTM is covered as it is"),
        ((nn.Embedding, "linear"), ValueError, "module_class: Embedding looks rows up"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        gls_fused.register(*arguments)


# What makes a module of a kind, and the shape of its inputs.
MADE = {
    "linear": ((5, 6), (3, 5)),
    "turned linear": ((6, 5), (3, 5)),
    "conv3d": ((5, 6, 3), (3, 5, 4, 4, 4)),
}


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in find.KNOWN if find.KNOWN[path] in MADE])
def test_known_classes_compute_what_is_said(path):
    name, _, short = path.rpartition(".")
    found = getattr(pytest.importorskip(name), short)
    sizes, shape = MADE[find.KNOWN[path]]
    module, inputs = found(*sizes), torch.randn(shape)
    nn.init.normal_(module.bias)
    expected = module(inputs)
    layer = find.find_layers([("", module)])[0][0]
    assert_near(
        layer.compute(module, inputs, module.weight, module.bias), expected, PRODUCT[torch.float32]
    )
