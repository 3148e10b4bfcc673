"""What a step of GLS depends on, and what it does not."""

import copy

import pytest
import torch
from nets import KINDS, assert_equal, loss_of, make_batch, make_net, snapshot
from tolerances import PRODUCT, SAME_STEPS, assert_near

from gls_fused import GLS

EVERY_STEP = {"rank": 4, "curvature_every": 1}


def train(model, optimizer, steps, start=0, kind="mlp"):
    for step in range(start, start + steps):
        loss_of(model, make_batch(kind, 5, step)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("normalize", "lr"),
    [("rms", 0.01), ("row", 0.01), ("factored", 0.01), ("adam", 0.01), ("none", 0.1), ("sgd", 0.5)],
)
def test_training_lowers_the_loss(backend, kind, normalize, lr):
    model = make_net(kind)
    optimizer = GLS(model, lr=lr, normalize=normalize, backend=backend, **EVERY_STEP)
    batch = make_batch(kind, 20, 0)
    before = loss_of(model, batch)
    for _ in range(30):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss_of(model, batch) < 0.8 * before


@pytest.mark.parametrize(
    ("option", "value"), [("beta2", 0.999), ("beta2", 0.99999), ("momentum", 0.9999)]
)
@pytest.mark.parametrize("normalize", ["factored", "row", "rms", "adam", "spectral", "none"])
def test_averages_that_remember_long(backend, normalize, option, value):
    """1 - beta in the parameters' dtype would have lost digits."""
    found = []
    for dtype in (torch.float32, torch.float64):
        model = make_net("mlp").to(dtype)
        optimizer = GLS(
            *(model, 1e-4), damping=1e6, normalize=normalize, backend=backend, **{option: value}
        )
        for step in range(8):
            optimizer.zero_grad()
            loss_of(model, [x.to(dtype) for x in make_batch("mlp", 5, step)]).backward()
            optimizer.step()
        states = optimizer.state.values()
        keys = "exp_avg", "exp_avg_sq"
        found.append([state[key] for state in states for key in keys if key in state])
    for average, wanted in zip(*found, strict=True):
        assert_near(average, wanted, 2e-5)


def test_zero_grad_clears_gradients():
    model = make_net("mlp")
    optimizer = GLS(model)
    loss_of(model, make_batch("mlp", 5, 0)).backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_zero_grad_forgets_the_rows(backend):
    found = []
    for dropped in (False, True):
        model = make_net("mlp")
        optimizer = GLS(model, backend=backend, **EVERY_STEP)
        for step in range(4):
            if dropped:
                loss_of(model, make_batch("mlp", 9, 50 + step)).backward()
                optimizer.zero_grad(set_to_none=step % 2 == 0)
            train(model, optimizer, 1, step)
        found.append(snapshot(model))
    assert_equal(*found)


def test_loading_forgets_the_rows(backend):
    """They were sketched with a basis that is no longer in force."""
    model = make_net("mlp")
    optimizer = GLS(model, backend=backend, **EVERY_STEP)
    train(model, optimizer, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 3, 2)

    fresh = make_net("mlp")
    other = GLS(fresh, backend=backend, **EVERY_STEP)
    loss_of(fresh, make_batch("mlp", 9, 50)).backward()
    fresh.zero_grad()
    fresh.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    train(fresh, other, 3, 2)
    assert_equal(snapshot(fresh), snapshot(model))


def test_loading_an_earlier_state_of_the_same_optimizer(backend):
    model = make_net("mlp")
    optimizer = GLS(model, backend=backend, **EVERY_STEP)
    train(model, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 4, 3)
    after = snapshot(model)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(model, optimizer, 4, 3)
    assert_equal(snapshot(model), after)


def test_step_without_gradients_moves_nothing():
    model = make_net("mlp")
    optimizer = GLS(model, weight_decay=0.1)
    before = snapshot(model)
    assert optimizer.step() is None
    assert_equal(snapshot(model), before)


def test_step_returns_the_loss_of_the_closure():
    model = make_net("mlp")
    optimizer = GLS(model)
    expected = loss_of(model, make_batch("mlp", 5, 0))

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, make_batch("mlp", 5, 0))
        loss.backward()
        return loss

    assert torch.equal(optimizer.step(closure), expected)


def test_hooks_of_the_optimizer_run():
    model = make_net("mlp")
    optimizer = GLS(model)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(model, optimizer, 1)
    assert calls == ["before", "after"]


def test_half_the_rate_moves_half_as_far():
    moved = []
    for gamma in (1.0, 0.5):
        model = make_net("mlp")
        optimizer = GLS(model, lr=0.01, **EVERY_STEP)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=gamma)
        for step in range(3):
            before = snapshot(model)
            train(model, optimizer, 1, step)
            scheduler.step()
        moved.append([p - q for p, q in zip(snapshot(model), before, strict=True)])
    for half, whole in zip(moved[1], moved[0], strict=True):
        assert_near(half * 2, whole, SAME_STEPS)


def test_one_cycle_scheduler_cycles_the_momentum():
    optimizer = GLS(make_net("mlp"), lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    first = optimizer.param_groups[0]["momentum"]
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["momentum"] < first


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("normalize", ["none", "spectral"])
def test_learning_rate_as_a_tensor(backend, normalize, apart, dtype):
    """One that 16 bits hold; what is computed of it they would not."""
    found = []
    for lr in (0.25, torch.tensor(0.25, dtype=dtype)):
        model = make_net("mlp")
        named = list(model.named_parameters())
        groups = [{"params": [pair for pair in named if pair[0].endswith("bias") is bias]}
                  for bias in (False, True)]  # fmt: skip
        groups[1]["weight_decay"] = 0.3 if apart else 0.1
        options = {"lr": lr, "normalize": normalize, "weight_decay": 0.1}
        train(model, GLS(groups, model=model, backend=backend, **options), 3)
        found.append(snapshot(model))
    for p, q in zip(*found, strict=True):
        # What is computed of it has the tensor's precision, and at least float32's.
        assert_near(p, q, SAME_STEPS if dtype is torch.float64 else PRODUCT[torch.float32])


def test_each_group_steps_with_its_own_options(backend):
    """Its layers move as in an optimizer over the whole model with those options."""
    common = {"lr": 0.05, "curvature_every": 1, "backend": backend}
    options = [{"lr": 0.1, "rank": 2}, {"lr": 0.01, "curvature": "dense"}, {"momentum": 0.0}]
    model = make_net("mlp")
    owners = [[model.stem], [model.first, model.second], [model.head]]
    groups = [{"params": layers, **own} for layers, own in zip(owners, options, strict=True)]
    train(model, GLS(groups, **common), 1)

    names = {module: name for name, module in model.named_modules()}
    for layers, own in zip(owners, options, strict=True):
        other = make_net("mlp")
        train(other, GLS(other, **{**common, **own}), 1)
        for layer in layers:
            twin = other.get_submodule(names[layer])
            assert_near(layer.weight, twin.weight, SAME_STEPS)
            assert_near(layer.bias, twin.bias, SAME_STEPS)


def test_parameters_without_their_module_take_adams_update():
    ours, theirs = make_net("mlp"), make_net("mlp")
    with pytest.warns(UserWarning, match="given without the model"):
        optimizer = GLS([{"params": list(ours.parameters()), "lr": 0.01, "weight_decay": 0.1}])
    train(ours, optimizer, 5)
    options = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
    train(theirs, torch.optim.AdamW(theirs.parameters(), **options), 5)
    assert_equal(snapshot(ours), snapshot(theirs))


def test_model_that_holds_none_of_the_parameters_is_warned_of():
    ours, copied = make_net("mlp"), make_net("mlp")
    with pytest.warns(UserWarning, match="given with a model that holds none of them"):
        GLS(ours.parameters(), model=copied)


def test_adams_steps_before_the_statistics_start_leave_no_trace(backend):
    """Without usable rows a layer takes Adam's steps; its averages start anew with GLS's."""
    found = []
    for late in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3, bias=False)
        optimizer = GLS(model, normalize="adam", lr=0.1, backend=backend, **EVERY_STEP)
        for scale in [0.0, 0.0, 0.0] * late + [1.0, 1.0, 1.0]:
            rows = torch.linspace(-1, 1, 20).view(5, 4) * scale
            (model(rows) - 1).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(snapshot(model))
    assert_equal(*found)
