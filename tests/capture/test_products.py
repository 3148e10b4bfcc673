"""Parameters that their own module multiplies with rows: the steps of an nn.Linear for each."""

import copy

import pytest
import torch
from nets import assert_equal, linear_of, snapshot
from tolerances import SAME_STEPS, assert_near, relative_error
from torch import nn
from torch.nn import functional as F

import gls_fused
from gls_fused import GLS

STEPS, WIDTH = 6, 6
OPTIONS = {"rank": 4, "curvature_every": 2, "lr": 0.02, "normalize": "factored"}


def parameter(*shape):
    return nn.Parameter(0.4 * torch.randn(*shape, dtype=torch.float64))


class Gate(nn.Module):
    """As the routers of mixtures of experts; `spare` is used as no factor of rows."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = parameter(5, WIDTH), parameter(5)
        self.spare = parameter(5, WIDTH)

    def forward(self, x):
        return torch.softmax(F.linear(x, self.weight, self.bias), -1) + self.spare.sum(1)


class Attention(nn.Module):
    """Projections as they are written by hand."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (parameter(WIDTH, n) for n in (5, 5, 4))

    def forward(self, x):
        query, key, value = x @ self.query, torch.matmul(x, self.key), torch.mm(x, self.value)
        return torch.softmax(query @ key.t(), -1) @ value


class Mixed(nn.Module):
    """Both products of a weight [outputs, inputs]."""

    def __init__(self):
        super().__init__()
        self.first, self.second = parameter(4, WIDTH), parameter(WIDTH, 4)

    def forward(self, x):
        return (self.second @ torch.tanh(x @ self.first.t()).t()).t()


class Alone(nn.Module):
    def __init__(self, module, turned):
        super().__init__()
        for name, param in module.named_parameters():
            if param.ndim == 2 and name != "spare":
                matrix = param.detach()
                setattr(self, name, linear_of(matrix.t().contiguous() if turned else matrix))
            else:
                self.register_parameter(name, copy.deepcopy(param))


class GateAlone(Alone):
    def forward(self, x):
        return torch.softmax(self.weight(x) + self.bias, -1) + self.spare.sum(1)


class AttentionAlone(Alone):
    def forward(self, x):
        return torch.softmax(self.query(x) @ self.key(x).t(), -1) @ self.value(x)


class MixedAlone(Alone):
    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


CASES = {Gate: (GateAlone, False), Attention: (AttentionAlone, True), Mixed: (MixedAlone, False)}
for kind, (_, turned) in CASES.items():
    gls_fused.register(kind, "turned products" if turned else "products")


def train(model, optimizer, steps=range(STEPS)):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(20, WIDTH, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        (model(inputs) - 1).square().mean().backward()
        optimizer.step()
    return snapshot(model)


def make(kind, *, alone=False):
    torch.manual_seed(0)
    module = kind()
    found, turned = CASES[kind]
    return found(module, turned) if alone else module


def assert_same(module, twin):
    for name, param in module.named_parameters():
        expected = getattr(twin, name)
        if isinstance(expected, nn.Linear):
            expected = expected.weight
        assert_near(param if param.shape == expected.shape else param.t(), expected, SAME_STEPS)


@pytest.mark.parametrize("site", ["step", "backward", "auto"])
@pytest.mark.parametrize("kind", CASES)
def test_trains_as_linear(backend, kind, site):
    options = {**OPTIONS, "backend": backend, "site": site}
    model, twin = make(kind), make(kind, alone=True)
    start = snapshot(model)
    train(twin, GLS(twin, **options))
    optimizer = GLS(model, **options)
    train(model, optimizer)
    assert_same(model, twin)
    assert min(map(relative_error, snapshot(model), start)) > 1e-3
    matrices = [name for name, param in model.named_parameters() if param.ndim == 2]
    covered = [name for name in matrices if name != "spare"]
    assert optimizer.report().count("products 6 -> ") + optimizer.report().count("4 -> 6") == len(
        covered
    )
    assert "no rows yet" not in optimizer.report()
    if kind is Gate:
        assert "spare: Adam (its module's forward multiplies no rows with it" in optimizer.report()


@pytest.mark.parametrize("site", ["step", "backward"])
@pytest.mark.parametrize("kind", CASES)
def test_compiled(kind, site):
    torch._dynamo.reset()
    model, eager = make(kind), make(kind)
    optimizer, expected = (GLS(net, site=site, **OPTIONS) for net in (model, eager))
    train(eager, expected)
    model.compile(fullgraph=True, backend="aot_eager")
    train(model, optimizer)
    assert_same(model, eager)
    assert "no rows yet" not in optimizer.report()
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", CASES)
def test_resumes_bit_for_bit(kind):
    model, other = make(kind), make(kind)
    optimizer = GLS(model, **OPTIONS)
    train(model, optimizer, range(3))
    other.load_state_dict(model.state_dict())
    resumed = GLS(other, **OPTIONS)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_equal(train(other, resumed, range(3, 6)), train(model, optimizer, range(3, 6)))


def test_products_of_another_orientation_are_no_rows():
    """With a weight [k, m], F.linear would take its rows for outputs."""

    class Square(Attention):
        def forward(self, x):
            return F.linear(x, self.query) + x @ self.key + (self.value @ x.t()).t()

        def __init__(self):
            super().__init__()
            self.query, self.key, self.value = (parameter(WIDTH, WIDTH) for _ in range(3))

    gls_fused.register(Square, "turned products")
    torch.manual_seed(0)
    model = Square()
    optimizer = GLS(model, **OPTIONS)
    train(model, optimizer, range(4))
    report = optimizer.report().splitlines()
    found = [name for name in ("query", "key", "value") if f"{name}: GLS" in "\n".join(report)]
    assert found == ["key"]


def test_routers_of_transformers():
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = modeling.MixtralConfig(hidden_size=WIDTH, num_local_experts=5)
    torch.manual_seed(0)
    router = modeling.MixtralTopKRouter(config).double()
    nn.init.normal_(router.weight)
    model = nn.ModuleDict({"gate": router})
    optimizer = GLS(model, **OPTIONS)
    for step in range(4):
        optimizer.zero_grad()
        logits, *_ = router(torch.randn(20, WIDTH, dtype=torch.float64))
        (logits - step).square().mean().backward()
        optimizer.step()
    assert "gate: GLS (products 6 -> 5, 20 rows" in optimizer.report()
