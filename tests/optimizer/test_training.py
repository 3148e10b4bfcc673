"""What users do around a step: schedulers, clipping, accumulation, hooks."""

import copy

import pytest
import torch
from nets import KINDS, assert_equal, loss_of, make_batch, make_net, snapshot, train
from tolerances import SAME_STEPS, assert_near
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import lr_scheduler, swa_utils

from gls_fused import GLS

OPTIONS = {"rank": 4, "curvature_every": 2, "lr": 0.02}


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
    third = torch.full((8,), 1 / 3)
    seen = []

    def replace(own, found):
        found = copy.deepcopy(found)
        found["state"][0]["exp_avg_sq"] = third.clone()
        found["param_groups"][0]["lr"] = 0.5
        return found

    def look(own):
        state = own.state[model.stem.weight]
        same = torch.equal(state["exp_avg_sq"], third)
        seen.append((own.param_groups[0]["lr"], same, state["basis"].dtype))

    handles = [
        optimizer.register_load_state_dict_pre_hook(replace),
        optimizer.register_load_state_dict_post_hook(look),
    ]
    optimizer.load_state_dict(saved)
    assert seen == [(0.5, True, torch.float32)]
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
