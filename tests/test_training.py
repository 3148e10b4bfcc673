"""What users do around a step: schedulers, clipping, groups, freezing, hooks, accumulation."""

import copy

import pytest
import torch
from nets import KINDS, assert_equal, loss_of, make_batch, make_net, snapshot
from tolerances import SAME_STEPS, assert_near
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import lr_scheduler, swa_utils

from gls_fused import GLS

OPTIONS = {"rank": 4, "curvature_every": 2, "lr": 0.02}


def train(model, optimizer, steps, kind="mlp", after=None):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, make_batch(kind, 9, step)).backward()
        optimizer.step()
        if after is not None:
            after()
    return snapshot(model)


# ---- schedulers ----------------------------------------------------------------------------------


def warm_then_decay(optimizer):
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)]
    parts.append(lr_scheduler.ExponentialLR(optimizer, 0.5))
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])


def chained(optimizer):
    parts = [lr_scheduler.ConstantLR(optimizer, 0.5, total_iters=2)]
    parts.append(lr_scheduler.StepLR(optimizer, 2, 0.3))
    return lr_scheduler.ChainedScheduler(parts)


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: step / 3),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.1),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.1),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=4, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2),
    "SequentialLR": warm_then_decay,
    "ChainedScheduler": chained,
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.05, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=3),
}


def test_all_schedulers_are_here():
    names = {name for name in lr_scheduler.__all__ if name != "LRScheduler"}
    assert names | {"SWALR"} == SCHEDULERS.keys()


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(name, tensor):
    """As if its rates, and momenta, were set by hand; they are those that SGD gets from it."""

    def rate():
        return torch.tensor(0.02, dtype=torch.float64) if tensor else 0.02

    plain = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=rate(), momentum=0.9)
    model, manual = make_net("mlp"), make_net("mlp")
    optimizer = GLS(model, **{**OPTIONS, "lr": rate()})
    by_hand = GLS(manual, **{**OPTIONS, "lr": rate()})
    schedulers = [SCHEDULERS[name](o) for o in (optimizer, plain)]
    seen = set()
    for step in range(6):
        (group,), (expected,) = optimizer.param_groups, plain.param_groups
        assert group["lr"] == expected["lr"]
        assert group["momentum"] == expected["momentum"]
        seen.add((float(group["lr"]), float(group["momentum"])))
        by_hand.param_groups[0]["lr"] = float(expected["lr"])
        by_hand.param_groups[0]["momentum"] = expected["momentum"]
        train(model, optimizer, [step])
        train(manual, by_hand, [step])
        plain.step()
        for scheduler in schedulers:
            arguments = [1.0] if name == "ReduceLROnPlateau" else []
            scheduler.step(*arguments)
    assert len(seen) > 1
    assert_equal(snapshot(model), snapshot(manual))


def test_rate_of_zero_keeps_the_weights_and_learns_the_statistics():
    """As warm-up schedules begin."""
    model = make_net("mlp")
    before = snapshot(model)
    optimizer = GLS(model, **OPTIONS)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: step / 3)
    train(model, optimizer, [0])
    scheduler.step()
    assert_equal(snapshot(model), before)
    assert optimizer.state[model.stem.weight]["rows"] == 9
    train(model, optimizer, [1])
    assert not torch.equal(model.stem.weight, before[0])


# ---- clipping and accumulation -------------------------------------------------------------------


@pytest.mark.parametrize(
    "clip",
    [lambda p: clip_grad_norm_(p, 0.01), lambda p: clip_grad_value_(p, 1e-3)],
    ids=["norm", "value"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_clipped_gradient_is_what_the_step_takes(kind, clip):
    """At the step site, against a backward that gave the clipped gradient."""
    found = []
    for clips in (True, False):
        model = make_net(kind)
        optimizer = GLS(model, **OPTIONS, normalize="none", site="step")
        for step in range(5):
            optimizer.zero_grad()
            loss_of(model, make_batch(kind, 9, step)).backward()
            if clips:
                clip(model.parameters())
            else:
                params = [p.detach().clone() for p in model.parameters()]
                for copied, p in zip(params, model.parameters(), strict=True):
                    copied.grad = p.grad.clone()
                norm_before = torch.stack([p.grad.norm() for p in params]).norm()
                clip(params)
                assert torch.stack([p.grad.norm() for p in params]).norm() < 0.9 * norm_before
                for copied, p in zip(params, model.parameters(), strict=True):
                    p.grad = copied.grad
            optimizer.step()
        found.append(snapshot(model))
    assert_equal(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_clipping_by_a_factor_scales_the_direction_at_the_backward_site(kind):
    """P is linear: the norm that is clipped is D's, and D times a factor is stepped on."""
    model, twin = make_net(kind), make_net(kind)
    options = {**OPTIONS, "normalize": "none", "momentum": 0.0, "site": "backward"}
    optimizer, other = GLS(model, **options), GLS(twin, **options)
    train(model, optimizer, [0], kind)
    train(twin, other, [0], kind)
    before = snapshot(model)
    for net in (model, twin):
        net.zero_grad()
        loss_of(net, make_batch(kind, 9, 1)).backward()
    norm = clip_grad_norm_(model.parameters(), 1e-3)
    factor = 1e-3 / norm
    assert factor < 0.5
    optimizer.step()
    other.step()
    for p, q, old in zip(model.parameters(), twin.parameters(), before, strict=True):
        # clip_grad_norm_ adds 1e-6 to the norm it divides by.
        assert_near(p - old, (q - old) * factor, 1e-5 / norm)


@pytest.mark.parametrize("site", ["step", "backward"])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_halves_are_the_whole(kind, site, set_to_none):
    found = []
    for parts in (1, 3):
        model = make_net(kind)
        optimizer = GLS(model, **OPTIONS, site=site)
        for step in range(6):
            inputs, targets = make_batch(kind, 9, step)
            for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
                (loss_of(model, (x, y)) / parts).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        assert all((p.grad is None) == set_to_none for p in model.parameters())
        found.append(snapshot(model))
    for p, q in zip(*found, strict=True):
        assert_near(p, q, SAME_STEPS)


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


# ---- hooks ---------------------------------------------------------------------------------------


def test_step_hooks_see_the_weights_before_and_after():
    model = make_net("mlp")
    optimizer = GLS(model, **OPTIONS)
    seen = []

    def record(own, args, kwargs):
        assert own is optimizer
        seen.append(model.stem.weight.detach().clone())

    handles = [optimizer.register_step_pre_hook(record), optimizer.register_step_post_hook(record)]
    before = model.stem.weight.detach().clone()
    train(model, optimizer, [0])
    assert_equal(seen, [before, model.stem.weight])
    assert not torch.equal(*seen)
    for handle in handles:
        handle.remove()
    train(model, optimizer, [1])
    assert len(seen) == 2


def test_global_step_hooks_are_called():
    from torch.optim.optimizer import (
        register_optimizer_step_post_hook,
        register_optimizer_step_pre_hook,
    )

    model = make_net("mlp")
    optimizer, calls = GLS(model, **OPTIONS), []
    handles = [
        register_optimizer_step_pre_hook(lambda own, *_: calls.append(("pre", own))),
        register_optimizer_step_post_hook(lambda own, *_: calls.append(("post", own))),
    ]
    train(model, optimizer, [0])
    for handle in handles:
        handle.remove()
    assert calls == [("pre", optimizer), ("post", optimizer)]


def test_state_dict_hooks():
    optimizer, calls = GLS(make_net("mlp"), **OPTIONS), []
    optimizer.register_state_dict_pre_hook(calls.append)

    def mark(own, saved):
        calls.append(own)
        return {**saved, "mark": 1}

    optimizer.register_state_dict_post_hook(mark)
    assert optimizer.state_dict()["mark"] == 1
    assert calls == [optimizer, optimizer]


def test_load_hooks_change_what_is_loaded_and_see_it_loaded():
    """What a hook gives is checked and kept, in float32 beside bfloat16 weights."""
    model = make_net("mlp").bfloat16()
    optimizer = GLS(model, **OPTIONS)
    for _ in range(2):
        loss_of(model, [x.bfloat16() for x in make_batch("mlp", 9, 0)]).backward()
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    third = torch.tensor(1 / 3)
    seen = []

    def replace(own, found):
        found = copy.deepcopy(found)
        found["state"][0]["exp_avg_sq"] = third
        found["param_groups"][0]["lr"] = 0.5
        return found

    def look(own):
        state = own.state[model.stem.weight]
        seen.append((own.param_groups[0]["lr"], state["exp_avg_sq"], state["basis"].dtype))

    handles = [
        optimizer.register_load_state_dict_pre_hook(replace),
        optimizer.register_load_state_dict_post_hook(look),
    ]
    optimizer.load_state_dict(saved)
    assert seen == [(0.5, third, torch.float32)]
    for handle in handles:
        handle.remove()
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == OPTIONS["lr"]


def test_closure_may_clear_the_gradients_itself():
    """However often it evaluates the model: the rows are those of the last time."""

    def run(evaluations):
        model = make_net("mlp")
        optimizer = GLS(model, **OPTIONS)

        def closure():
            for _ in range(evaluations):
                optimizer.zero_grad()
                loss = loss_of(model, make_batch("mlp", 9, 0))
                loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(4)]
        assert losses == sorted(losses, reverse=True)
        return snapshot(model)

    assert_equal(run(1), run(3))
