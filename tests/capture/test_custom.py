"""A forward that shows its weight's rows by `observe` trains as nn.Linear without a bias."""

import copy
import pickle

import pytest
import torch
from nets import assert_equal, snapshot
from tolerances import SAME_STEPS, assert_near, relative_error
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import gls_fused
from gls_fused import GLS, attach
from gls_fused.capture import find

OPTIONS = {"rank": 4, "curvature_every": 2, "lr": 0.02}


class Shown(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Linear(inputs, outputs).weight

    def forward(self, x):
        return x @ gls_fused.observe(self, x).T


class Turned(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(inputs, outputs).weight.detach().T.contiguous())

    def forward(self, x):
        return x @ gls_fused.observe(self, x)


class Twice(Shown):
    """Its weight in two products, each of other rows."""

    def forward(self, x):
        half = super().forward(x)
        return half + super().forward(torch.sin(x))


class Hidden(Shown):
    def forward(self, x):
        return x @ self.weight.T


class Net(nn.Module):
    def __init__(self, make, recompute=False):
        super().__init__()
        self.first, self.second = make(6, 9), make(9, 3)
        self.recompute = recompute

    def forward(self, x):
        if self.recompute:
            return checkpoint(self.compute, x, use_reentrant=False)
        return self.compute(x)

    def compute(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(find, "KINDS", dict(find.KINDS))
    gls_fused.register(Shown, "observed")
    gls_fused.register(Turned, "turned observed")


def linear(inputs, outputs):
    """Draws what the others draw."""
    layer = nn.Linear(inputs, outputs)
    layer.bias = None
    return layer


def make_net(make, **options):
    torch.manual_seed(0)
    return Net(make, **options).double()


def train(model, optimizer, steps=range(8), run=None):
    run = model if run is None else run
    for step in steps:
        optimizer.zero_grad()
        for part in range(2):
            generator = torch.Generator().manual_seed(10 * step + part)
            inputs = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
            (run(inputs) - 1).square().mean().backward()
        optimizer.step()
    return snapshot(model)


def assert_same(found, expected):
    for p, q in zip(found, expected, strict=True):
        assert_near(p if p.shape == q.shape else p.T, q, SAME_STEPS)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("site", ["step", "backward", "auto"])
@pytest.mark.parametrize("make", [Shown, Turned])
def test_trains_as_linear(backend, make, site, recompute):
    options = {**OPTIONS, "backend": backend, "site": site}
    expected = make_net(linear)
    start = snapshot(expected)
    train(expected, GLS(expected, **options))
    model = make_net(make, recompute=recompute)
    optimizer = GLS(model, **options)
    assert_same(train(model, optimizer), snapshot(expected))
    assert min(map(relative_error, snapshot(expected), start)) > 1e-3
    name = "turned observed" if make is Turned else "observed"
    assert f"first: GLS ({name} 6 -> 9, 12 rows" in optimizer.report()
    assert "share covered: 100.0%" in optimizer.report()


@pytest.mark.parametrize("site", ["step", "backward"])
@pytest.mark.parametrize("make", [Shown, Turned])
def test_compiled(make, site):
    torch._dynamo.reset()
    counters.clear()
    model, eager = make_net(make), make_net(make)
    optimizer, expected = (GLS(net, site=site, **OPTIONS) for net in (model, eager))
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(train(model, optimizer, run=run), train(eager, expected))
    assert "first: GLS" in optimizer.report()
    assert "no rows yet" not in optimizer.report()
    # At step 0, for steps that gather rows, and for those that do not.
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]
    torch._dynamo.reset()


def test_attached():
    found = []
    for make in (Shown, linear):
        model = make_net(make)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        attach(model, optimizer, rank=4, curvature_every=2)
        found.append(train(model, optimizer))
    assert_same(*found)


def test_rows_of_every_product_count():
    gls_fused.register(Twice, "observed")
    model = make_net(Twice)
    optimizer = GLS(model, **OPTIONS)
    train(model, optimizer, range(1))
    assert "first: GLS (observed 6 -> 9, 24 rows" in optimizer.report()


def test_without_an_optimizer_it_is_the_weight():
    module, inputs = Shown(6, 3), torch.randn(4, 6)
    assert gls_fused.observe(module, inputs) is module.weight
    optimizer = GLS(module)
    assert gls_fused.observe(module, inputs) is not module.weight
    with torch.no_grad():
        assert gls_fused.observe(module, inputs) is module.weight
    copied = copy.deepcopy(module)
    assert gls_fused.observe(copied, inputs) is copied.weight
    optimizer.detach()
    assert gls_fused.observe(module, inputs) is module.weight
    assert type(module) is Shown


def test_weight_that_is_not_shown_takes_adams_update():
    model = make_net(Hidden)
    optimizer = GLS(model, **OPTIONS)
    train(model, optimizer, range(4))
    assert (
        "first: Adam (its module's forward does not call gls_fused.observe)" in optimizer.report()
    )


def test_a_bias_takes_adams_update():
    module = Shown(6, 3)
    module.bias = nn.Parameter(torch.zeros(3))
    report = GLS(module).report()
    assert "observed 6 -> 3" in report
    assert "1 norms, biases and other vectors: Adam" in report


def test_weight_of_another_shape():
    module = Shown(6, 3)
    module.weight = nn.Parameter(torch.zeros(3, 6, 2))
    assert "weight: Adam (its weight has 3 dimensions, not 2)" in GLS(module).report()


def test_inputs_of_another_width():
    module = Shown(6, 3)
    optimizer = GLS(module)
    with pytest.raises(ValueError, match=r"inputs: expected \[..., 6\] for layer '', got \[4, 3\]"):
        gls_fused.observe(module, torch.randn(4, 3))
    optimizer.detach()


@pytest.mark.parametrize("how", ["state", "deepcopy", "pickle"])
def test_goes_on_bit_for_bit(backend, how):
    model = make_net(Shown)
    optimizer = GLS(model, backend=backend, **OPTIONS)
    train(model, optimizer, range(5))
    if how == "state":
        twin = make_net(Shown)
        twin.load_state_dict(model.state_dict())
        other = GLS(twin, backend=backend, **OPTIONS)
        other.load_state_dict(optimizer.state_dict())
    else:
        copied = copy.deepcopy if how == "deepcopy" else lambda x: pickle.loads(pickle.dumps(x))
        twin, other = copied((model, optimizer))
    assert_equal(train(twin, other, range(5, 9)), train(model, optimizer, range(5, 9)))
    assert "first: GLS (observed" in other.report()


def test_another_optimizer_takes_over():
    model = make_net(Shown)
    first = GLS(model, **OPTIONS)
    second = GLS(model, **OPTIONS)
    train(model, second, range(2))
    assert "rows, rank" in second.report()
    with pytest.raises(RuntimeError, match="no longer captured"):
        first.step()
