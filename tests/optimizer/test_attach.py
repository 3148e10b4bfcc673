"""attach: other optimizers step on D = D0 P."""

import copy
import functools

import pytest
import torch
from nets import assert_equal, gradients, loss_of, make_batch, make_net, snapshot
from tolerances import SAME_STEPS, assert_near
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from gls_fused import GLS, attach

OPTIONS = {"damping": 0.4, "rank": 3, "curvature_every": 2}


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.01)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)


class Muon:
    """Muon for the matrices, Adam for the rest; hooks go on the last to step."""

    def __init__(self, model):
        matrices = [p for p in model.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if p.ndim != 2]
        self.muon = torch.optim.Muon(matrices, lr=0.02)
        self.adam = torch.optim.Adam(others, lr=0.01)

    def step(self):
        self.muon.step()
        self.adam.step()


def train(model, optimizer, kind, steps, handle=None):
    losses = []
    for step in range(steps):
        model.zero_grad()
        loss = loss_of(model, make_batch(kind, 12, step % 3))
        loss.backward()
        if handle is not None:
            handle.pre_step()
        optimizer.step()
        if handle is not None:
            handle.commit()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_gradients_are_directions(kind):
    """Against GLS at the step site with lr so small that both models stay where they are."""
    model = make_net(kind)
    twin = copy.deepcopy(model)
    handle = attach(model, **OPTIONS)
    plain = {"normalize": "none", "momentum": 0.0, "max_change": None, "site": "step"}
    optimizer = GLS(twin, lr=1.0, **plain, **OPTIONS)
    for step in range(7):
        before = [p.detach().clone() for p in twin.parameters()]
        for net in (model, twin):
            net.zero_grad()
            loss_of(net, make_batch(kind, 12, step)).backward()
        true = gradients(twin)
        handle.pre_step()
        optimizer.step()
        found = gradients(model)
        for p, old, sought, plain in zip(twin.parameters(), before, found, true, strict=True):
            assert_near(sought, old - p.detach(), 1e-9)
            assert (sought - plain).norm() > 1e-3 * plain.norm()
            with torch.no_grad():
                p.copy_(old)
        handle.commit()


@pytest.mark.parametrize("make", [adam, sgd], ids=["Adam", "SGD"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_hooks_do_what_the_handle_does(kind, make):
    hooked, manual = make_net(kind), make_net(kind)
    optimizer = make(hooked)
    attach(hooked, optimizer, **OPTIONS)
    losses = train(hooked, optimizer, kind, 10)
    handle = attach(manual, **OPTIONS)
    assert train(manual, make(manual), kind, 10, handle) == losses
    assert losses[-1] < losses[0]
    for p, q in zip(hooked.parameters(), manual.parameters(), strict=True):
        assert_near(p, q, SAME_STEPS)


def test_muon():
    model = make_net("mlp")
    losses = train(model, Muon(model), "mlp", 200, attach(model, **OPTIONS))
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_state_is_restored(kind):
    model = make_net(kind)
    optimizer = sgd(model)
    handle = attach(model, optimizer, **OPTIONS)
    train(model, optimizer, kind, 5)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), handle.state_dict()))
    expected = train(model, optimizer, kind, 5)

    model = make_net(kind)
    optimizer = sgd(model)
    handle = attach(model, optimizer, **OPTIONS)
    for target, state in zip((model, optimizer, handle), saved, strict=True):
        target.load_state_dict(state)
    assert train(model, optimizer, kind, 5) == expected


def test_rows_of_a_step_that_is_left_out_count_as_accumulated():
    """A GradScaler does not call an optimizer that is not fused where a gradient overflows."""
    states = []
    for left_out in (True, False):
        model = make_net("mlp")
        optimizer = sgd(model)
        handle = attach(model, optimizer, **OPTIONS)
        scaler = torch.amp.GradScaler("cpu")
        for step in range(5):
            if step in (0, 2):
                # Of the other run, a micro-batch of no weight.
                loss = loss_of(model, make_batch("mlp", 12, 10 + step))
                (scaler.scale(loss) * (torch.inf if left_out else 0)).backward()
            if step in (0, 2) and left_out:
                scaler.step(optimizer)
                scaler.update()
                model.zero_grad()
            scaler.scale(loss_of(model, make_batch("mlp", 12, step))).backward()
            scaler.step(optimizer)
            scaler.update()
            model.zero_grad()
        states.append(handle.state_dict())
    assert states[0]["step"] == states[1]["step"] == 5
    for name, state in states[1]["layers"].items():
        found = states[0]["layers"][name]
        assert found.keys() == state.keys()
        assert_equal(map(torch.as_tensor, found.values()), map(torch.as_tensor, state.values()))


def test_state_of_another_model_is_refused():
    handle = attach(make_net("mlp"))
    with pytest.raises(ValueError, match="'0'"):
        handle.load_state_dict(attach(torch.nn.Sequential(torch.nn.Linear(2, 2))).state_dict())


def test_detach_gives_the_true_gradient_back():
    model = make_net("mlp")
    optimizer = sgd(model)
    with attach(model, optimizer, **OPTIONS) as handle:
        train(model, optimizer, "mlp", 3)
        assert "site backward" in repr(handle)
    plain = copy.deepcopy(model)
    for net in (model, plain):
        net.zero_grad()
        loss_of(net, make_batch("mlp", 12, 0)).backward()
    assert all(torch.equal(p, q) for p, q in zip(gradients(model), gradients(plain), strict=True))
    optimizer.step()
    assert "forward" not in model.stem.__dict__


def test_attached_again_takes_the_place_of_the_first():
    """As where a cell of a notebook runs twice."""
    found = []
    for times in (1, 2):
        model = make_net("mlp")
        optimizer = adam(model)
        for _ in range(times):
            handle = attach(model, optimizer, rank=4, curvature_every=2)
        train(model, optimizer, "mlp", 6)
        assert "no rows yet" not in handle.report()
        found.append(snapshot(model))
    assert_equal(*found)


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("as_keyword", [True, False])
@pytest.mark.parametrize("kind", ["mlp", "tied", "weight_norm"])
def test_closure_is_evaluated_before_the_gradients_are_asked_for(kind, as_keyword, batches):
    """As Lightning steps; where it accumulates, the last batch alone is the closure's."""
    found = []
    for closes in (True, False):
        model = make_net("mlp")
        if kind == "tied":
            table, head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
            head.weight = table.weight
            model = nn.Sequential(table, nn.Linear(6, 6), nn.Tanh(), head).double()
        elif kind == "weight_norm":
            model = nn.Sequential(weight_norm(nn.Linear(3, 5)), nn.Tanh(), nn.Linear(5, 2)).double()
        optimizer = sgd(model)
        attach(model, optimizer, **OPTIONS)

        def backward(seed, model=model):
            generator = torch.Generator().manual_seed(seed)
            if kind == "tied":
                inputs = torch.randint(9, (7,), generator=generator)
                F.cross_entropy(model(inputs), inputs.flip(0)).backward()
            else:
                batch = make_batch("mlp", 9, seed)
                inputs = batch[0][:, :3] if kind == "weight_norm" else batch[0]
                model(inputs).square().mean().backward()

        for step in range(6):
            optimizer.zero_grad()
            seeds = [10 * step + batch for batch in range(batches)]
            for seed in seeds[:-1] if closes else seeds:
                backward(seed)
            closure = functools.partial(backward, seeds[-1])
            if not closes:
                optimizer.step()
            elif as_keyword:
                optimizer.step(closure=closure)
            else:
                optimizer.step(closure)
        found.append(snapshot(model))
    assert_equal(*found)


class Thrice(torch.optim.SGD):
    """Evaluates its closure three times, and moves nothing."""

    def step(self, closure):
        self.seen = []
        for _ in range(3):
            with torch.enable_grad():
                closure()
            params = self.param_groups[0]["params"]
            self.seen.append([p.grad.clone() for p in params])


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_each_evaluation_of_a_step_gives_the_direction(kind):
    model = make_net(kind)
    optimizer = Thrice(model.parameters(), lr=0.1)
    attach(model, optimizer, **OPTIONS)
    batch = make_batch(kind, 12, 0)

    def closure():
        optimizer.zero_grad()
        loss_of(model, batch).backward()

    for _ in range(3):
        optimizer.step(closure)
        for again in optimizer.seen[1:]:
            for p, q in zip(again, optimizer.seen[0], strict=True):
                assert_near(p, q, SAME_STEPS)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("again", ["of an earlier forward", "of a new one", "of a compiled one"])
def test_rows_after_the_start_do_not_count_in_that_step(again):
    found = []
    for repeats in (False, True):
        torch.manual_seed(0)
        model = make_net("mlp")
        handle = attach(model, **OPTIONS)
        if again == "of a compiled one":
            model.compile(backend="aot_eager")
        losses = [loss_of(model, make_batch("mlp", 12, seed)) for seed in range(2)]
        losses[0].backward()
        handle.pre_step()
        if repeats and again == "of a new one":
            loss_of(model, make_batch("mlp", 12, 1)).backward()
        elif repeats:
            losses[1].backward()
        handle.commit()
        assert not any(layer.has_rows for layer in handle._layers)
        states = handle.state_dict()["layers"].values()
        found.append([torch.as_tensor(value) for state in states for value in state.values()])
    assert_equal(*found)


def test_closure_may_be_evaluated_several_times():
    """By L-BFGS, in whose first step layers start: D each time, once."""
    torch.manual_seed(0)
    model = make_net("mlp")
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    handle = attach(model, optimizer, **OPTIONS)
    batch = make_batch("mlp", 12, 0)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(4)]
    assert losses[-1] < losses[0]
    assert not any(layer.has_rows for layer in handle._layers)
    assert handle.report().count("12 rows") == len(list(handle.state_dict()["layers"]))
