"""P at the gradient (site "step") or inside the backward: one trajectory, however one trains."""

import pytest
import torch
from nets import CONVOLUTIONS, KINDS, WIDTH, loss_of, make_batch, make_net, snapshot
from tolerances import SAME_STEPS, assert_near, relative_error
from torch import nn

from gls_fused import GLS

STEPS = 20
# Steps with and without a commit; a batch of 5 rows is fewer than WIDTH and more than 3
# outputs, so that the backward site takes both of its ways.
OPTIONS = {"lr": 0.02, "rank": 4, "curvature_every": 2}


def train_step(model, optimizer, kind, step):
    loss_of(model, make_batch(kind, 5, step)).backward()
    optimizer.step()
    optimizer.zero_grad()


def train_accumulating(model, optimizer, kind, step):
    for part, n in enumerate((4, 9, 1)):
        (loss_of(model, make_batch(kind, n, 3 * step + part)) / 3).backward()
    optimizer.step()
    optimizer.zero_grad()


def train_keeping_gradients_as_zeros(model, optimizer, kind, step):
    loss_of(model, make_batch(kind, 5, step), skip=step % 2 == 1).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def train_skipping(model, optimizer, kind, step):
    loss_of(model, make_batch(kind, 5, step), skip=step % 2 == 1).backward()
    optimizer.step()
    optimizer.zero_grad()


def train_skipping_first(model, optimizer, kind, step):
    loss_of(model, make_batch(kind, 5, step), skip=step < 3).backward()
    optimizer.step()
    optimizer.zero_grad()


def train_after_exceptions(model, optimizer, kind, step):
    if step in (0, 3):

        def fail(*_):
            raise KeyboardInterrupt

        hook = model.second.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            loss_of(model, make_batch(kind, 7, 1000))
        hook.remove()
    train_step(model, optimizer, kind, step)


def train_scaled(model, optimizer, kind, step):
    (loss_of(model, make_batch(kind, 5, step)) * 1024).backward()
    for p in model.parameters():
        p.grad /= 1024
    optimizer.step()
    optimizer.zero_grad()


def train_with_evaluation(model, optimizer, kind, step):
    with torch.no_grad():
        loss_of(model, make_batch(kind, 7, 1000))
    loss_of(model, make_batch(kind, 7, 1000))  # whose backward never comes
    train_step(model, optimizer, kind, step)


def train_with_closure(model, optimizer, kind, step):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, make_batch(kind, 5, step))
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0


def call_twice(model):
    model.repeats = 2


def tie(model):
    model.second.weight, model.second.bias = model.first.weight, model.first.bias


def tie_weight_only(model):
    model.second.weight = model.first.weight


def tie_with_one_bias(model):
    model.second.weight, model.second.bias = model.first.weight, None


def freeze_layer(model):
    model.first.requires_grad_(False)


def freeze_bias(model):
    for layer in (model.stem, model.first, model.head):
        layer.bias.requires_grad_(False)


def freeze_weight(model):
    for layer in (model.stem, model.second):
        layer.weight.requires_grad_(False)


def recompute_reentrant(model):
    model.recompute = "reentrant"


def recompute_saved(model):
    model.recompute = "saved"


def leave(model):
    pass


SCENARIOS = {
    "plain": (leave, train_step),
    "accumulation": (leave, train_accumulating),
    "gradients kept as zeros": (leave, train_keeping_gradients_as_zeros),
    "called twice": (call_twice, train_step),
    "tied": (tie, train_step),
    "tied, weight only": (tie_weight_only, train_step),
    "tied, one without bias": (tie_with_one_bias, train_step),
    "frozen layer": (freeze_layer, train_step),
    "frozen bias": (freeze_bias, train_step),
    "frozen weight": (freeze_weight, train_step),
    "skipped every second step": (leave, train_skipping),
    "skipped at first": (leave, train_skipping_first),
    "checkpoint, reentrant": (recompute_reentrant, train_step),
    "checkpoint, saved": (recompute_saved, train_step),
    "exceptions in a forward": (leave, train_after_exceptions),
    "scaled loss": (leave, train_scaled),
    "evaluation between": (leave, train_with_evaluation),
    "closure": (leave, train_with_closure),
    "tied and called twice, accumulation": (
        lambda model: (tie(model), call_twice(model)),
        train_accumulating,
    ),
}
OPTION_SETS = {
    "dense": {"curvature": "dense"},
    "momentum 0": {"momentum": 0.0},
    "adam": {"normalize": "adam", "lr": 0.005},
    "none": {"normalize": "none", "lr": 0.1},
    "weight decay": {"weight_decay": 0.3},
    "every step": {"curvature_every": 1},
}


def run(kind, scenario, site, **options):
    """The parameters after every step."""
    prepare, train = SCENARIOS[scenario]
    model = make_net(kind)
    prepare(model)
    with GLS(model, site=site, **{**OPTIONS, **options}) as optimizer:
        trajectory = [snapshot(model)]
        for step in range(STEPS):
            train(model, optimizer, kind, step)
            trajectory.append(snapshot(model))
    return trajectory


def assert_same(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        for p, q in zip(ours, theirs, strict=True):
            assert_near(p, q, SAME_STEPS)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("kind", [*KINDS, "turned"])
def test_sites_agree(backend, kind, scenario):
    check_sites_agree(kind, scenario, backend=backend)


# Of experts in one parameter, where they differ from layers.
@pytest.mark.parametrize(
    "scenario",
    [
        "accumulation",
        "gradients kept as zeros",
        "called twice",
        "skipped at first",
        "checkpoint, reentrant",
        "checkpoint, saved",
        "evaluation between",
    ],
)
def test_sites_of_experts_agree(scenario):
    at_step = check_sites_agree("experts", scenario)
    if "checkpoint" in scenario or "evaluation" in scenario:
        assert_same(at_step, run("experts", "plain", "step"))


def check_sites_agree(kind, scenario, **options):
    at_step = run(kind, scenario, "step", **options)
    assert_same(run(kind, scenario, "backward", **options), at_step)
    moved = [relative_error(p, q) for p, q in zip(at_step[-1], at_step[0], strict=True)]
    assert max(moved) > 0.1
    if "frozen" not in scenario:
        assert min(moved) > 1e-3
    return at_step


@pytest.mark.parametrize(
    "scenario",
    ["accumulation", "frozen bias", "tied, one without bias", "checkpoint, saved", "scaled loss"],
)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_sites_agree_for_other_convolutions(kind, scenario):
    test_sites_agree("auto", kind, scenario)


@pytest.mark.parametrize("options", OPTION_SETS)
@pytest.mark.parametrize("scenario", ["plain", "accumulation", "frozen bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_sites_agree_for_every_option(kind, scenario, options):
    chosen = OPTION_SETS[options]
    assert_same(run(kind, scenario, "backward", **chosen), run(kind, scenario, "step", **chosen))


@pytest.mark.parametrize(
    ("scenario", "expected"),
    [
        ("checkpoint, reentrant", "plain"),
        ("checkpoint, saved", "plain"),
        ("exceptions in a forward", "plain"),
        ("scaled loss", "plain"),
        ("evaluation between", "plain"),
        ("closure", "plain"),
    ],
)
@pytest.mark.parametrize("site", ["step", "backward", "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_scenario_changes_nothing(backend, kind, site, scenario, expected):
    found = run(kind, scenario, site, backend=backend)
    assert_same(found, run(kind, expected, site, backend=backend))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_true_at_the_step_site_and_the_direction_at_the_backward(kind):
    found = {}
    for site in ("step", "backward"):
        model = make_net(kind)
        with GLS(model, power=1, site=site, **OPTIONS) as optimizer:
            for step in range(3):
                train_step(model, optimizer, kind, step)
            loss_of(model, make_batch(kind, 5, 3)).backward()
        found[site] = [p.grad for p in model.parameters()]
    model.zero_grad()
    loss_of(model, make_batch(kind, 5, 3)).backward()
    for p, kept, sought in zip(model.parameters(), *found.values(), strict=True):
        assert_near(kept, p.grad, SAME_STEPS)
        assert relative_error(sought, p.grad) > 0.1


def test_auto_chooses_by_rows_and_outputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, WIDTH)).double()
    optimizer = GLS(model, site="auto")
    assert optimizer.report().count("undecided") == 2
    model(torch.randn(5, 6).double()).sum().backward()
    optimizer.step()
    first, second, _ = optimizer.report().splitlines()
    assert "site step" in first
    assert "site backward" in second


def test_auto_keeps_the_true_gradient_for_sgd():
    """Its norm is the step size."""
    model = make_net("mlp")
    optimizer = GLS(model, normalize="sgd")
    train_step(model, optimizer, "mlp", 0)
    assert optimizer.report().count("site step") == 4
    loss_of(model, make_batch("mlp", 5, 1)).backward()
    found = [p.grad.clone() for p in model.parameters()]
    optimizer.detach()
    model.zero_grad()
    loss_of(model, make_batch("mlp", 5, 1)).backward()
    for gradient, p in zip(found, model.parameters(), strict=True):
        assert_near(gradient, p.grad, SAME_STEPS)


@pytest.mark.parametrize("kind", KINDS)
def test_auto_agrees_with_both(kind):
    assert_same(run(kind, "accumulation", "auto"), run(kind, "accumulation", "step"))


def test_gradients_of_the_inputs_are_true_at_both_sites():
    inputs, targets = make_batch("mlp", 5, 0)
    found = []
    for site in ("step", "backward"):
        model = make_net("mlp")
        optimizer = GLS(model, site=site, **OPTIONS)
        train_step(model, optimizer, "mlp", 0)
        images = inputs.clone().requires_grad_()
        loss_of(model, (images, targets)).backward()
        found.append(images.grad)
        optimizer.detach()
        images = inputs.clone().requires_grad_()
        loss_of(model, (images, targets)).backward()
        found.append(images.grad)
    for gradient in found[1:]:
        assert_near(gradient, found[0], SAME_STEPS)
