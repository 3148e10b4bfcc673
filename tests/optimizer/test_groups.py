"""Groups, also added later, and parameters frozen and thawed."""

import copy

import pytest
import torch
from nets import KINDS, assert_equal, loss_of, make_batch, make_net, snapshot, train
from tolerances import SAME_STEPS, assert_near
from torch import nn

from gls_fused import GLS

OPTIONS = {"rank": 4, "curvature_every": 2, "lr": 0.02}


# ---- groups --------------------------------------------------------------------------------------


def test_group_is_an_optimizer_of_its_own():
    """Two groups, against two optimizers on the parts of an equal model."""
    first = {"lr": 0.03, "damping": 0.1, "rank": 2, "weight_decay": 0.2, "momentum": 0.0}
    second = {"lr": 0.01, "damping": 2.0, "normalize": "adam", "beta2": 0.8, "curvature_every": 3}
    grouped, apart = make_net("mlp"), make_net("mlp")
    optimizer = GLS(
        [
            {"params": [grouped.stem, grouped.first], **first},
            {"params": [grouped.second, grouped.head], **second},
        ]
    )
    train(grouped, optimizer, range(8))
    optimizers = [
        GLS([{"params": [apart.stem, apart.first]}], **first),
        GLS([{"params": [apart.second, apart.head]}], **second),
    ]
    for step in range(8):
        apart.zero_grad()
        loss_of(apart, make_batch("mlp", 9, step)).backward()
        for part in optimizers:
            part.step()
    assert_equal(snapshot(grouped), snapshot(apart))


@pytest.mark.parametrize("site", ["step", "backward"])
def test_group_added_later_is_as_one_from_its_first_step(site):
    """The head was not trained before, so its own optimizer sees the same steps."""
    late, apart = make_net("mlp"), make_net("mlp")
    body = [late.stem, late.first, late.second]
    optimizer = GLS([{"params": body}], **OPTIONS, site=site)
    train(late, optimizer, range(3))
    optimizer.add_param_group({"params": late.head, "lr": 0.1, "damping": 0.7})
    train(late, optimizer, range(3, 7))

    other = GLS([{"params": [apart.stem, apart.first, apart.second]}], **OPTIONS, site=site)
    train(apart, other, range(3))
    apart.zero_grad()
    head = GLS(apart.head, **{**OPTIONS, "lr": 0.1}, damping=0.7, site=site)
    for step in range(3, 7):
        apart.zero_grad()
        loss_of(apart, make_batch("mlp", 9, step)).backward()
        other.step()
        head.step()
    assert_equal(snapshot(late), snapshot(apart))


def test_state_with_a_group_added_later_is_loaded():
    model = make_net("mlp")
    optimizer = GLS([{"params": [model.stem, model.first]}], **OPTIONS)
    train(model, optimizer, range(3))
    optimizer.add_param_group({"params": [model.second, model.head]})
    train(model, optimizer, range(3, 6))
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    later = make_net("mlp")
    later.load_state_dict(weights)
    groups = [{"params": [later.stem, later.first]}, {"params": [later.second, later.head]}]
    twin = GLS(groups, **OPTIONS)
    twin.load_state_dict(saved)
    assert [group["step"] for group in twin.param_groups] == [6, 3]
    assert_equal(train(later, twin, range(6, 9)), train(model, optimizer, range(6, 9)))


# ---- freezing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["layer", "weight", "bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_in_the_middle(kind, part):
    """What is frozen stays, bit for bit, and goes on later; both sites take the same steps."""
    found = []
    for site in ("step", "backward"):
        model = make_net(kind)
        optimizer = GLS(model, **OPTIONS, site=site)
        layer = model.second
        frozen = {"layer": [layer.weight, layer.bias]}.get(part) or [getattr(layer, part)]
        train(model, optimizer, range(4), kind)
        for param in frozen:
            param.requires_grad_(False)
        before = [param.clone() for param in frozen]
        states = copy.deepcopy([optimizer.state[param] for param in frozen])
        moving = model.first.weight.clone()
        train(model, optimizer, range(4, 7), kind)
        assert_equal(frozen, before)
        assert not torch.equal(model.first.weight, moving)
        if part == "layer":
            for param, state in zip(frozen, states, strict=True):
                assert optimizer.state[param].keys() == state.keys()
                assert_equal(
                    map(torch.as_tensor, optimizer.state[param].values()),
                    map(torch.as_tensor, state.values()),
                )
        for param in frozen:
            param.requires_grad_(True)
        train(model, optimizer, range(7, 11), kind)
        assert not any(torch.equal(p, q) for p, q in zip(frozen, before, strict=True))
        found.append(snapshot(model))
    for p, q in zip(*found, strict=True):
        assert_near(p, q, SAME_STEPS)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_at_first(kind):
    """A layer that is trained from step 3 on starts its statistics there."""
    model = make_net(kind)
    model.second.requires_grad_(False)
    optimizer = GLS(model, **OPTIONS)
    train(model, optimizer, range(3), kind)
    assert "basis" not in optimizer.state[model.second.weight]
    before = model.second.weight.clone()
    model.second.requires_grad_(True)
    train(model, optimizer, [3], kind)
    assert "basis" in optimizer.state[model.second.weight]
    assert optimizer.state[model.second.weight]["step"] == 1
    assert not torch.equal(model.second.weight, before)


def test_averages_of_a_bias_do_not_outlive_its_weights_rest():
    """While its weight is frozen a bias averages true gradients, later it averages directions."""
    found = []
    for scale in (1, 1000):
        model = make_net("mlp")
        optimizer = GLS(model, **OPTIONS)
        train(model, optimizer, range(3))
        model.head.weight.requires_grad_(False)
        kept = model.head.bias.detach().clone()
        optimizer.zero_grad()
        (loss_of(model, make_batch("mlp", 9, 3)) * scale).backward()
        for p in model.parameters():
            if p is not model.head.bias:
                p.grad = None
        optimizer.step()
        with torch.no_grad():
            model.head.bias.copy_(kept)
        model.head.weight.requires_grad_(True)
        train(model, optimizer, range(4, 6))
        found.append(snapshot(model))
    assert_equal(*found)


def test_bias_goes_on_when_its_weight_is_frozen_and_thawed(backend):
    model = make_net("mlp")
    optimizer = GLS(model, backend=backend, **OPTIONS)
    for step in range(9):
        frozen = step in (3, 4, 5)
        model.stem.weight.requires_grad_(not frozen)
        before = snapshot(model)
        train(model, optimizer, [step])
        weight, bias, *_ = (torch.equal(p, q) for p, q in zip(snapshot(model), before, strict=True))
        assert weight == frozen
        assert not bias
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("width", [8, 9])
def test_report_of_modules_with_the_same_names(width):
    def make(width):
        return nn.Sequential(nn.Linear(6, width), nn.LayerNorm(width), nn.Linear(width, 6))

    optimizer = GLS([{"params": make(8)}, {"params": make(width)}])
    assert "4 norms, biases and other vectors: Adam" in optimizer.report()


def test_report_leaves_out_what_the_optimizer_no_longer_has():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    optimizer = GLS(model)
    model[0] = nn.Embedding(7, 4)
    optimizer.param_groups[0]["params"][0] = model[0].weight
    assert optimizer.report().count("Embedding is not covered") == 1


@pytest.mark.parametrize("site", ["auto", "step", "backward"])
@pytest.mark.parametrize("moved", [1, 4])
def test_parameters_that_move_to_the_group_before_theirs(site, moved):
    """As in thawing, where the order of all parameters may stay; all but one move, or all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 3))
    thawed, frozen = list(model[0].parameters()), list(model[2:].parameters())
    groups = [{"params": thawed, "lr": 0.01}, {"params": frozen, "lr": 0.0}]
    optimizer = GLS(groups, model=model, site=site, curvature_every=2)

    def train(steps):
        before = snapshot(model)
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(5, 6)).square().mean().backward()
            optimizer.step()
        return [not torch.equal(p, q) for p, q in zip(snapshot(model), before, strict=True)]

    assert train(3) == [True, True] + [False] * 4
    first, second = optimizer.param_groups
    first["params"] += second["params"][:moved]
    del second["params"][:moved]
    assert train(2) == [True] * (2 + moved) + [False] * (4 - moved)
    saved = optimizer.state_dict()
    assert [len(group["params"]) for group in saved["param_groups"]] == [2 + moved, 4 - moved]
