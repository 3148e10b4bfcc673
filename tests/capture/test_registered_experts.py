"""Experts of a user's own class: registered, they take the steps of a layer for each of them."""

import copy

import pytest
import torch
from nets import linear_of
from tolerances import SAME_STEPS, SOLVE, assert_near, relative_error
from torch import nn
from torch.nn import functional as F

import gls_fused
from gls_fused import GLS
from gls_fused.capture.einsum import rows_of_einsum

EXPERTS, WIDTH, INNER = 4, 8, 16
# Who has which rows; the third expert has none.
SIZES = [3, 5, 0, 4]


class Experts(nn.Module):
    """Two weights for every expert, and rows sorted by expert."""

    def __init__(self, multiply, turned):
        super().__init__()
        self.multiply, self.turned = multiply, turned
        shapes = (EXPERTS, INNER, WIDTH), (EXPERTS, WIDTH, INNER)
        self.up, self.down = (
            nn.Parameter(torch.randn(shape).mT.contiguous() if turned else torch.randn(shape))
            for shape in shapes
        )
        # No matrix of an expert.
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, rows):
        hidden = torch.tanh(self.multiply(rows, self.up, self.turned) / 4)
        return self.multiply(hidden, self.down, self.turned) * self.scale

    def matrices(self):
        found = [*self.up.detach(), *self.down.detach()]
        return [each.T if self.turned else each for each in found]


class Turned(Experts):
    pass


class Layers(nn.Module):
    """The same, of an nn.Linear for each expert."""

    def __init__(self, experts):
        super().__init__()
        self.layers = nn.ModuleList(map(linear_of, experts.matrices()))
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, rows):
        up, down = self.layers[:EXPERTS], self.layers[EXPERTS:]
        parts = zip(rows.split(SIZES), up, down, strict=True)
        found = [down(torch.tanh(up(part) / 4)) for part, up, down in parts if len(part)]
        return torch.cat(found) * self.scale

    def matrices(self):
        return [layer.weight.detach() for layer in self.layers]


def by_index(rows, weight, turned):
    parts = enumerate(rows.split(SIZES))
    return torch.cat([x @ weight[i] if turned else F.linear(x, weight[i]) for i, x in parts])


def by_transposing(rows, weight, turned):
    parts = enumerate(rows.split(SIZES))
    return torch.cat([F.linear(x, weight[i].T) if turned else x @ weight[i].t() for i, x in parts])


def by_walking(rows, weight, turned):
    parts = zip(rows.split(SIZES), weight, strict=True)
    return torch.cat([torch.mm(x, each if turned else each.mT) for x, each in parts])


def by_unbinding(rows, weight, turned):
    parts = zip(rows.split(SIZES), torch.unbind(weight, dim=0), strict=True)
    return torch.cat([torch.mm(x, each if turned else each.mT) for x, each in parts])


def padded(rows):
    return torch.stack([F.pad(x, (0, 0, 0, max(SIZES) - len(x))) for x in rows.split(SIZES)])


def unpadded(outputs):
    return torch.cat([x[:size] for x, size in zip(outputs, SIZES, strict=True)])


def by_batch(rows, weight, turned):
    return unpadded(torch.bmm(padded(rows), weight if turned else weight.transpose(1, 2)))


def by_broadcast(rows, weight, turned):
    return unpadded(padded(rows) @ (weight if turned else weight.mT))


def by_einsum(rows, weight, turned):
    return unpadded(
        torch.einsum("enk,ekm->enm" if turned else "enk,emk->enm", padded(rows), weight)
    )


def by_einsum_of_one(rows, weight, turned):
    parts, sum_of = enumerate(rows.split(SIZES)), "km,nk->nm" if turned else "mk,nk->nm"
    return torch.cat([torch.einsum(sum_of, weight[i], x) for i, x in parts])


def by_choice(rows, weight, turned):
    whose = torch.arange(EXPERTS).repeat_interleave(torch.tensor(SIZES))
    chosen = weight[whose].mT if turned else weight[whose]
    return (chosen @ rows[:, :, None]).squeeze(2)


def by_einsum_of_choice(rows, weight, turned):
    whose = torch.arange(EXPERTS).repeat_interleave(torch.tensor(SIZES))
    return torch.einsum("nk,nkm->nm" if turned else "nk,nmk->nm", rows, weight[whose])


def by_columns(rows, weight, turned):
    parts = enumerate(rows.split(SIZES))
    return torch.cat([((weight[i].T if turned else weight[i]) @ x.T).T for i, x in parts])


def by_group(rows, weight, turned):
    ends = torch.tensor(SIZES, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return F.grouped_mm(rows, weight if turned else weight.mT, offs=ends)


PRODUCTS = [by_index, by_transposing, by_walking, by_unbinding, by_columns, by_batch]
PRODUCTS += [by_broadcast, by_choice, by_einsum, by_einsum_of_one, by_einsum_of_choice]
HAS_GROUPED_MM = hasattr(F, "grouped_mm")
PRODUCTS += [by_group] if HAS_GROUPED_MM else []


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(gls_fused.capture.experts, "_REGISTERED", {})
    gls_fused.register(Experts, "experts")
    gls_fused.register(Turned, "turned experts")


@pytest.mark.parametrize("site", ["step", "backward"])
@pytest.mark.parametrize("kind", [Experts, Turned])
@pytest.mark.parametrize("multiply", PRODUCTS)
def test_trains_as_layers(registered, multiply, kind, site):
    # torch has no grouped product of float64.
    dtype = torch.float32 if multiply is by_group else torch.float64
    torch.manual_seed(0)
    ours = kind(multiply, kind is Turned).to(dtype)
    theirs = Layers(ours).to(dtype)
    start = [p.clone() for p in ours.matrices()]
    options = {"rank": 4, "curvature_every": 2, "lr": 0.02, "site": site, "normalize": "factored"}
    for model in (ours, theirs):
        optimizer = GLS(model, **options)
        for step in range(5):
            rows = torch.randn(sum(SIZES), WIDTH, generator=torch.Generator().manual_seed(step))
            rows = rows.to(dtype)
            (model(rows) - rows).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if model is ours:
            assert optimizer.report().count("GLS (Experts") == 2
    tolerance = SAME_STEPS if dtype == torch.float64 else SOLVE[dtype]
    pairs = zip(ours.matrices(), theirs.matrices(), start, strict=True)
    for place, (p, q, before) in enumerate(pairs):
        assert_near(p, q, tolerance)
        assert (relative_error(p, before) > 1e-3) == (place % EXPERTS != 2)
    assert_near(ours.scale, theirs.scale, tolerance)


def test_all_experts_may_have_the_same_rows(registered):
    """Of a mixture that is not sparse."""

    def to_all(rows, weight, turned):
        return rows @ weight.mT

    torch.manual_seed(0)
    model = Experts(to_all, False)
    optimizer = GLS(model, rank=4)
    model(torch.randn(6, WIDTH)).square().mean().backward()
    for layer in optimizer._preconditioner.layers:
        assert layer.sums.view(EXPERTS, -1)[:, 0].tolist() == [6] * EXPERTS


@pytest.mark.slow
@pytest.mark.parametrize("multiply", [by_index, by_transposing, by_broadcast, by_einsum])
def test_graph_of_torch_compile(registered, multiply):
    if multiply is by_broadcast and torch.__version__ < "2.14":
        pytest.skip("older dynamo does not show modes `Tensor.mT`")
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Experts(multiply, False).double()
    models = model, copy.deepcopy(model)
    for each in models:
        optimizer = GLS(each, rank=4, curvature_every=2, lr=0.02)
        compiled = torch.compile(each, backend="aot_eager", fullgraph=True)
        run = compiled if each is model else each
        for step in range(5):
            rows = torch.randn(sum(SIZES), WIDTH, generator=torch.Generator().manual_seed(step))
            run(rows.double()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.report().count("GLS (Experts") == 2
    for p, q in zip(*(each.parameters() for each in models), strict=True):
        assert_near(p, q, SAME_STEPS)


@pytest.mark.parametrize(
    "equation",
    # Of an input that is summed over beforehand, of the outputs, of a diagonal, of unknown axes.
    ["enk,emk->em", "enm,emk->enk", "enk,ekk->en", "e...k,emk->e...m", "enk,emk", "nk,emk->enm,"],
)
def test_sums_that_have_no_rows(equation):
    weight, inputs = torch.zeros(2, 3, 3), torch.zeros(2, 4, 3)
    assert rows_of_einsum(equation, 1, weight, inputs, turned=False) is None


@pytest.mark.skipif(not HAS_GROUPED_MM, reason="torch 2.9 has no such product")
def test_rows_of_a_grouped_product_are_not_cast_by_autocast(registered):
    """As the product itself, of float32, is not."""
    traces = []
    for enabled in (True, False):
        torch.manual_seed(0)
        model = Experts(by_group, False)
        optimizer = GLS(model, rank=4)
        rows = torch.randn(sum(SIZES), WIDTH)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(rows).square().mean()
        loss.backward()
        optimizer.step()
        layer = optimizer._preconditioner.layers[0]
        traces.append(optimizer.state[layer.weight]["trace"])
    assert torch.equal(*traces)
