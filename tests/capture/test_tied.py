"""A head that shares its weight with an embedding: its rows are seen, P acts on the sum."""

import copy
import pickle

import pytest
import torch
from nets import assert_equal, assert_same_state, snapshot
from tolerances import SAME_STEPS, SOLVE, assert_near, relative_error
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gls_fused import GLS, attach

TOKENS, WIDTH = 11, 6
OPTIONS = {"rank": 4, "curvature_every": 2, "lr": 0.02}
PLAIN = {"normalize": "none", "momentum": 0.0, "max_change": None, "power": 1}


class Tied(nn.Module):
    """Embedding, one layer, and the head, which is defined before that layer."""

    def __init__(self, bias=True, table=nn.Embedding):
        super().__init__()
        self.embed = table(TOKENS, WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=bias)
        self.head.weight = self.embed.weight
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.recompute = False

    def forward(self, tokens):
        hidden = self.embed(tokens)
        if self.recompute:
            return checkpoint(self.after, hidden, use_reentrant=False)
        return self.after(hidden)

    def after(self, hidden):
        return self.head(torch.tanh(self.middle(hidden)))


class Scaled(nn.Embedding):
    """As Gemma's."""

    def forward(self, tokens):
        return 3 * super().forward(tokens)


def make_tied(**options):
    torch.manual_seed(0)
    return Tied(**options).double()


def batch_of(step, n=7):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(TOKENS, (2, n, 3), generator=generator)


def loss_of(model, step, n=7):
    tokens, targets = batch_of(step, n)
    if isinstance(getattr(model, "embed", None), nn.EmbeddingBag):
        tokens, targets = tokens.flatten(1).flatten(0, 1)[:, None], targets.flatten()
    return F.cross_entropy(model(tokens).flatten(0, -2), targets.flatten())


def train(model, optimizer, steps, parts=1):
    for step in steps:
        optimizer.zero_grad()
        for part in range(parts):
            loss_of(model, 10 * step + part).backward()
        optimizer.step()
    return snapshot(model)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("site", ["step", "backward"])
def test_direction_is_the_joint_gradient_times_p(backend, site, bias):
    """Over two steps, against rows that a hook writes down and gradients of a plain copy."""
    model = make_tied(bias=bias)
    plain = copy.deepcopy(model)
    options = {**PLAIN, "lr": 0.1, "damping": 0.5, "curvature": "dense", "curvature_every": 5}
    optimizer = GLS(model, site=site, backend=backend, **options)
    rows = []
    plain.head.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].detach()))
    for step in range(2):
        plain.load_state_dict(model.state_dict())
        plain.zero_grad()
        loss_of(plain, 10 * step).backward()
        train(model, optimizer, [step])
        a = rows[0].flatten(0, -2)
        gradient = plain.embed.weight.grad
        if bias:
            a = torch.cat([a, torch.ones(len(a), 1).double()], 1)
            gradient = torch.cat([gradient, plain.head.bias.grad[:, None]], 1)
        sigma = a.T @ a / len(a)
        damp = 0.5 * sigma.trace() / min(a.shape[::-1])
        direction = gradient @ torch.linalg.inv(sigma + damp * torch.eye(len(sigma)).double())
        expected = plain.embed.weight - 0.1 * direction[:, :WIDTH]
        assert_near(model.head.weight, expected, SOLVE[torch.float64])
        assert model.head.weight is model.embed.weight
        if bias:
            expected = plain.head.bias - 0.1 * direction[:, -1]
            assert_near(model.head.bias, expected, SOLVE[torch.float64])


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("recompute", [False, True])
def test_sites_agree(backend, recompute, parts):
    found = []
    for site in ("step", "backward", "auto"):
        model = make_tied()
        model.recompute = recompute
        optimizer = GLS(model, site=site, backend=backend, **OPTIONS)
        start = snapshot(model)
        found.append(train(model, optimizer, range(8), parts))
    for other in found[1:]:
        for p, q in zip(other, found[0], strict=True):
            assert_near(p, q, SAME_STEPS)
    assert min(relative_error(p, q) for p, q in zip(found[0], start, strict=True)) > 1e-3


def test_its_gradient_stays_the_gradient():
    """Also where that of other layers is the direction."""
    model = make_tied()
    optimizer = GLS(model, site="backward", **OPTIONS)
    train(model, optimizer, range(3))
    optimizer.zero_grad()
    loss_of(model, 9).backward()
    found = model.head.weight.grad, model.middle.weight.grad
    optimizer.detach()
    model.zero_grad()
    loss_of(model, 9).backward()
    assert_near(found[0], model.head.weight.grad, SAME_STEPS)
    assert relative_error(found[1], model.middle.weight.grad) > 0.1


def test_report_and_order():
    """The head is last, wherever it is defined."""
    model = make_tied()
    optimizer = GLS(model, normalize="spectral", **OPTIONS)
    train(model, optimizer, range(1))
    middle, head, *rest = optimizer.report().splitlines()
    assert middle.startswith("middle: GLS (Linear 7 -> 6")
    assert "spectral" in middle
    assert head.startswith("head: GLS (Linear 7 -> 11, 21 rows, rank 4, site step")
    assert head.endswith("tied to embed, factored)")
    assert rest == ["share covered: 100.0% of 119 parameters"]


@pytest.mark.parametrize("table", [nn.Embedding, Scaled, nn.EmbeddingBag])
def test_tables(table):
    model = make_tied(table=table)
    optimizer = GLS(model, **OPTIONS)
    before = snapshot(model)
    after = train(model, optimizer, range(2))
    assert min(relative_error(p, q) for p, q in zip(after, before, strict=True)) > 1e-3
    assert "tied to embed" in optimizer.report()


def test_head_that_is_not_called():
    """Its weight, which the embedding trains, takes Adam's update."""
    model = make_tied()
    optimizer = GLS(model, **OPTIONS)
    for step in range(4):
        optimizer.zero_grad()
        model.middle(model.embed(batch_of(step)[0])).square().mean().backward()
        optimizer.step()
    assert "head: Adam (its module is not called" in optimizer.report()
    train(model, optimizer, range(4, 8))
    assert "head: GLS" in optimizer.report()


def test_head_that_is_not_covered():
    class Loud(nn.Linear):
        def forward(self, inputs):
            return 2 * super().forward(inputs)

    model = make_tied()
    model.head = Loud(WIDTH, TOKENS)
    model.head.weight = model.embed.weight
    report = GLS(model).report()
    assert "embed.weight: Adam (shared by embed, head: " in report
    assert "Loud overrides forward" in report


def test_attached_optimizer_steps_on_the_joint_direction():
    """SGD on attached gradients is GLS with "none"."""
    ours, theirs = make_tied(), make_tied()
    sgd = torch.optim.SGD(ours.parameters(), lr=0.1)
    attach(ours, sgd, power=1, rank=4, curvature_every=2)
    train(ours, sgd, range(6))
    optimizer = GLS(theirs, lr=0.1, rank=4, curvature_every=2, site="step", **PLAIN)
    train(theirs, optimizer, range(6))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_near(p, q, SAME_STEPS)


@pytest.mark.parametrize("how", ["state", "deepcopy", "pickle"])
def test_goes_on_bit_for_bit(backend, how):
    model = make_tied()
    optimizer = GLS(model, site="backward", backend=backend, **OPTIONS)
    train(model, optimizer, range(5))
    optimizer.zero_grad()
    if how == "state":
        twin = make_tied()
        twin.load_state_dict(model.state_dict())
        other = GLS(twin, site="backward", backend=backend, **OPTIONS)
        other.load_state_dict(optimizer.state_dict())
    else:
        copied = copy.deepcopy if how == "deepcopy" else lambda x: pickle.loads(pickle.dumps(x))
        twin, other = copied((model, optimizer))
    assert_equal(train(model, optimizer, range(5, 9)), train(twin, other, range(5, 9)))
    assert_same_state(other.state_dict(), optimizer.state_dict())
    assert "tied to embed" in other.report()


def test_compiled():
    eager, model = make_tied(), make_tied()
    expected, optimizer = (GLS(net, **OPTIONS) for net in (eager, model))
    train(eager, expected, range(8))
    train(torch.compile(model, fullgraph=True, backend="aot_eager"), optimizer, range(8))
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        assert_near(p, q, SAME_STEPS)
    assert "head: GLS (Linear 7 -> 11, 21 rows" in optimizer.report()
