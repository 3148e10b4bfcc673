"""Layers that train and are not called take no part in the statistics, until they are called."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gls_fused
from gls_fused import GLS, attach
from gls_fused.preconditioner import MOST_MISSES

OPTIONS = {"rank": 4, "curvature_every": 3}


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """The weights of the head are used whether or not it is called."""

    def __init__(self, kind="linear"):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3) if kind == "linear" else nn.Conv2d(1, 3, (1, 8))
        self.calls = False

    def forward(self, inputs):
        hidden = torch.tanh(self.first(inputs))
        if not isinstance(self.head, nn.Linear):
            hidden = hidden[:, None, None]
        if self.calls:
            return self.head(hidden)
        # A product of it, which is no weight that a layer knows.
        weight, bias = self.head.weight.flatten(1) * 1, self.head.bias
        return F.linear(hidden.flatten(1), weight, bias)


def inputs_of(seed):
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))


def backward(model, seed):
    model(inputs_of(seed)).sub(1).square().mean().backward()


def make_idle(kind="linear", compiled=False, **options):
    model = Net(kind)
    optimizer = GLS(model, **{**OPTIONS, **options})
    if compiled:
        model.compile(fullgraph=True, backend="aot_eager")
    train(model, optimizer, range(MOST_MISSES + 1))
    assert "head: Adam (its module is not called" in optimizer.report()
    return model, optimizer


def train(model, optimizer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()


# A graph takes seconds.
@pytest.mark.parametrize(
    ("site", "kind", "compiled"),
    [
        *itertools.product(("auto", "step", "backward"), ("linear", "conv"), (False,)),
        ("auto", "linear", True),
        ("backward", "conv", True),
    ],
)
def test_it_starts_once_it_is_called(site, kind, compiled):
    model, optimizer = make_idle(kind, compiled, site=site)
    assert "exp_avg_sq" in optimizer.state[model.head.weight]
    model.calls = True
    train(model, optimizer, [10])
    assert "head: GLS" in optimizer.report()
    assert "rows" not in optimizer.state[model.head.weight]
    train(model, optimizer, [11])
    state = optimizer.state[model.head.weight]
    assert state["rows"] == 16
    # Adam's averages are of another quantity, and those of the layer have counted one step.
    assert state["step"] == 1
    train(model, optimizer, range(12, 16))
    assert "16 rows" in optimizer.report().splitlines()[1]
    for p in model.parameters():
        assert p.isfinite().all()


def test_it_starts_under_attach():
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    handle = attach(model, optimizer, **OPTIONS)
    train(model, optimizer, range(MOST_MISSES + 1))
    assert "head: Adam" in handle.report()
    model.calls = True
    train(model, optimizer, range(10, 12))
    assert handle.state_dict()["layers"]["head"]["rows"] == 16


def test_it_gathers_nothing_while_idle(monkeypatch):
    model, optimizer = make_idle()
    layer = optimizer._preconditioner.layers[1]
    monkeypatch.setattr(type(layer), "gather", lambda *_: pytest.fail("rows were gathered"))
    optimizer.param_groups[0]["curvature_every"] = 10**6
    train(model, optimizer, range(10, 12))
    model.calls = True
    train(model, optimizer, range(12, 13))


def evaluate(model):
    with torch.no_grad():
        model(inputs_of(9))
    model(inputs_of(9))


def ask_for_inputs(model):
    inputs = inputs_of(9).requires_grad_()
    model(inputs).sum().backward(inputs=[inputs])


def drop(model):
    backward(model, 9)
    model.zero_grad()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("call", [evaluate, ask_for_inputs, drop])
def test_calls_whose_rows_do_not_count_do_not_wake_it(call, compiled):
    model, optimizer = make_idle(compiled=compiled)
    for seed in range(10, 14):
        optimizer.zero_grad()
        model.calls = True
        call(model)
        model.calls = False
        if call is drop:
            # Its gradient is written by hand, as its rows' has been cleared.
            optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()
    assert "head: Adam (its module is not called" in optimizer.report()


def test_it_can_be_idle_again():
    model, optimizer = make_idle()
    model.calls = True
    train(model, optimizer, [10])
    model.calls = False
    train(model, optimizer, range(11, 11 + MOST_MISSES))
    assert "head: Adam (its module is not called" in optimizer.report()
    model.calls = True
    train(model, optimizer, range(20, 22))
    assert "head: GLS" in optimizer.report()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_inputs_that_were_nested():
    model = nn.Linear(6, 3)
    optimizer = GLS(model, **OPTIONS)
    for _ in range(MOST_MISSES):
        optimizer.zero_grad()
        nested = torch.nested.nested_tensor([inputs_of(1), inputs_of(2)[:4]], layout=torch.jagged)
        model(nested).values().square().mean().backward()
        optimizer.step()
    assert "Adam (its inputs are jagged" in optimizer.report()
    train(model, optimizer, range(2))
    assert "GLS (Linear 7 -> 3, 16 rows" in optimizer.report()


def test_gradients_that_were_written_by_hand():
    model = nn.Linear(6, 3)
    optimizer = GLS(model, **OPTIONS)
    for seed in range(MOST_MISSES + 2):
        optimizer.zero_grad()
        backward(model, seed)
        kept = [p.grad for p in model.parameters()]
        optimizer.zero_grad()
        for p, gradient in zip(model.parameters(), kept, strict=True):
            p.grad = gradient
        optimizer.step()
    assert "its gradient is cleared" in optimizer.report()
    twin = copy.deepcopy(optimizer)
    train(model, optimizer, range(2))
    assert "GLS (Linear 7 -> 3, 16 rows" in optimizer.report()
    assert "no rows yet" in twin.report()


def test_reason_is_the_last_one():
    model = nn.Linear(6, 3)
    optimizer = GLS(model, **OPTIONS)
    for seed in range(MOST_MISSES):
        backward(model, seed)
        optimizer.zero_grad()
        F.linear(inputs_of(seed), model.weight).sum().backward()
        optimizer.step()
    assert "its gradient is cleared" in optimizer.report()
    train(model, optimizer, [10])
    for seed in range(MOST_MISSES):
        optimizer.zero_grad()
        F.linear(inputs_of(seed), model.weight).sum().backward()
        optimizer.step()
    assert "its module is not called" in optimizer.report()


class Router(nn.Module):
    """Multiplies its weight in a way that shows rows, or in one that does not."""

    def __init__(self):
        super().__init__()
        self.matrix, self.shows = nn.Parameter(torch.randn(5, 8)), False

    def forward(self, x):
        if self.shows:
            return F.linear(x, self.matrix)
        return torch.einsum("nk,mk->nm", x, self.matrix)


def test_products_start_once_they_are_seen():
    gls_fused.register(Router, "products")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), Router())
    optimizer = GLS(model, rank=4, curvature_every=1)
    train(model, optimizer, range(2 * MOST_MISSES))
    assert "1.matrix: Adam (its module's forward multiplies no rows" in optimizer.report()
    model[1].shows = True
    train(model, optimizer, range(2))
    assert "1.matrix: GLS (products 8 -> 5, 16 rows" in optimizer.report()
