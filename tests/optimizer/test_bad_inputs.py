"""What a user may pass by mistake, and what a batch may hold: errors name it, training survives."""

import copy
import math
from fractions import Fraction
from typing import get_args

import pytest
import torch
from nets import KINDS, assert_equal, assert_same_state, loss_of, make_batch, make_net, snapshot
from torch import nn
from torch.nn import functional as F

from gls_fused import GLS, attach
from gls_fused.groups import NORMALIZATIONS, Scale

CURVATURES = ("subspace", "dense")
EVERY_STEP = {"rank": 4, "curvature_every": 1}


# ---- options -------------------------------------------------------------------------------------


BAD_OPTIONS = [
    ("lr", -1e-3),
    ("lr", math.nan),
    ("lr", math.inf),
    ("momentum", 1.0),
    ("momentum", -0.1),
    ("momentum", math.nan),
    ("beta2", 1.0),
    ("beta2", -0.1),
    ("eps", 0.0),
    ("eps", -1e-8),
    ("eps", 10**400),
    ("weight_decay", -0.1),
    ("max_change", 0.0),
    ("max_change", -1.0),
    ("max_growth", 0.5),
    ("max_growth", math.inf),
    ("max_growth", 1e39),
    ("normalize", "l2"),
    ("normalize", None),
    ("low_precision", "kahan"),
    ("seed", -1),
    ("seed", 1.5),
    ("seed", True),
    ("seed", 2**32),
]
BAD_STATISTICS = [
    ("damping", 0.0),
    ("damping", -1.0),
    ("damping", math.nan),
    ("damping", math.inf),
    ("power", 2),
    ("power", 0.6),
    ("power", Fraction(1, 2)),
    ("damping", 10**400),
    ("beta", 1.0),
    ("beta", -0.1),
    ("beta", math.nan),
    ("rank", 0),
    ("rank", -3),
    ("rank", 2.0),
    ("rank", True),
    ("rank", "low"),
    ("curvature_every", 0),
    ("curvature_every", 1.5),
    ("curvature", "diagonal"),
    ("backend", "fortran"),
]


def assert_names(error, name, value):
    message = str(error.value)
    assert message.startswith(name)
    assert str(value) in message or repr(value) in message
    assert "expected" in message


@pytest.mark.parametrize(("name", "value"), [*BAD_OPTIONS, *BAD_STATISTICS, ("site", "middle")])
def test_option_out_of_range(name, value):
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=name) as error:
        GLS(model, **{name: value})
    assert_names(error, name, value)
    assert type(model) is model.__class__


@pytest.mark.parametrize(("name", "value"), BAD_STATISTICS)
def test_option_of_attach_out_of_range(name, value):
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=name) as error:
        attach(model, **{name: value})
    assert_names(error, name, value)
    assert type(model) is model.__class__


@pytest.mark.parametrize(
    ("name", "value"),
    [pair for pair in [*BAD_OPTIONS, *BAD_STATISTICS] if pair[0] != "backend"],
)
def test_option_of_a_group_out_of_range(name, value):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=name) as error:
        GLS([{"params": model[0]}, {"params": model[1], name: value}])
    assert_names(error, name, value)
    assert type(model[0]) is model[0].__class__


WRONG_TYPES = [
    ("lr", "1e-3"),
    ("lr", None),
    ("lr", [1e-3]),
    ("momentum", (0.9, 0.999)),
    ("beta", torch.tensor(0.9)),
    ("eps", Fraction(1, 10**8)),
    ("max_change", "0.1"),
    ("max_growth", "2"),
    ("damping", 1j),
]


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES)
def test_option_of_another_type(name, value):
    model = nn.Linear(3, 2)
    makes = [lambda: GLS(model, **{name: value}), lambda: GLS([{"params": model, name: value}])]
    if name in dict(BAD_STATISTICS):
        makes.append(lambda: attach(model, **{name: value}))
    for make in makes:
        with pytest.raises(TypeError, match=f"{name}: expected a number in") as error:
            make()
        assert repr(value) in str(error.value)
    assert type(model) is model.__class__


def test_model_in_the_place_of_lr():
    model = nn.Linear(3, 2)
    with pytest.raises(TypeError, match=r"lr: .* pass it as GLS\(params, model=model\)"):
        GLS(model.parameters(), model)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("site", "step", "an option of the whole optimizer, not of a group, got 'step'"),
        ("backend", "reference", "an option of the whole optimizer, not of a group"),
        ("maximize", True, "GLS minimizes"),
    ],
)
def test_what_a_group_cannot_have(key, value, message):
    with pytest.raises(ValueError, match=message):
        GLS([{"params": nn.Linear(3, 2), key: value}])
    GLS([{"params": nn.Linear(3, 2), "maximize": False}])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name, value in BAD_OPTIONS if name not in ("seed", "max_change")),
        *((name, value) for name, value in BAD_STATISTICS if name != "backend"),
        ("lr", "1e-3"),
        ("split", 2),
        ("curvature", "dense"),
        ("rank", 2),
    ],
)
def test_option_changed_by_hand(name, value):
    """Nothing moves before the error, and the run goes on once the option is mended."""
    found = []
    for wrong in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        optimizer = GLS(model, rank=4, curvature_every=2)
        (group,) = optimizer.param_groups
        for step in range(4):
            optimizer.zero_grad()
            inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            model(inputs).square().mean().backward()
            if wrong and step == 3:
                before = snapshot(model), copy.deepcopy(optimizer.state_dict())
                kept, group[name] = group[name], value
                with pytest.raises((TypeError, ValueError), match=name) as error:
                    optimizer.step()
                assert "expected" in str(error.value)
                group[name] = kept
                assert_equal(snapshot(model), before[0])
                assert_same_state(optimizer.state_dict(), before[1])
            optimizer.step()
        found.append(snapshot(model))
    assert_equal(*found)


def test_rate_of_zero_moves_nothing():
    model = nn.Linear(3, 2)
    optimizer = GLS(model, lr=0.0)
    before = snapshot(model)
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    assert_equal(snapshot(model), before)


@pytest.mark.parametrize("make", [GLS, attach])
def test_what_is_refused_leaves_others_alone(make):
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    optimizer = GLS(model)
    with pytest.raises((TypeError, ValueError), match=r"split|optimizer"):
        GLS(model, split=3) if make is GLS else attach(model, "sgd")
    model(torch.randn(8, 6)).square().mean().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="split: expected a divisor of the 4 outputs"):
        optimizer.add_param_group({"params": nn.Linear(2, 4), "split": 3, "spectral_head": True})
    assert len(optimizer.param_groups) == 1
    optimizer.step()


def test_type_names_what_is_taken():
    named = [get_args(part) or (part,) for part in get_args(Scale)]
    assert {name for names in named for name in names} == set(NORMALIZATIONS)


def test_attach_is_told_of_the_right_things():
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    with pytest.raises(TypeError, match="model: expected a module, got generator"):
        attach(model.parameters())
    with pytest.raises(ValueError, match=r"optimizer: .* holds the weight of no layer"):
        attach(model, torch.optim.SGD(other.parameters()))
    handle = attach(model)
    with pytest.raises(ValueError, match="state_dict: expected one of attach, got keys"):
        handle.load_state_dict(torch.optim.SGD(other.parameters()).state_dict())


@pytest.mark.parametrize(
    ("key", "meant"),
    [("betas", "beta"), ("dampening", "damping"), ("wieght_decay", "weight_decay")],
)
def test_misspelt_key_of_a_group(key, meant):
    with pytest.warns(UserWarning, match=f"{key!r} is no option of GLS, did you mean {meant!r}"):
        optimizer = GLS([{"params": nn.Linear(3, 2), key: 1}])
    assert optimizer.param_groups[0][key] == 1


@pytest.mark.parametrize("key", ["lr_scale", "layer_name", "fix_lr", "max_lr", "name"])
def test_foreign_key_of_a_group_is_kept(key):
    model = nn.Linear(3, 2)
    optimizer = GLS([{"params": model, key: 7}])
    optimizer.add_param_group({"params": nn.Linear(2, 2), key: 8})
    assert [group[key] for group in optimizer.param_groups] == [7, 8]
    twin = GLS([{"params": nn.Linear(3, 2)}, {"params": nn.Linear(2, 2)}])
    twin.load_state_dict(optimizer.state_dict())
    assert [group[key] for group in twin.param_groups] == [7, 8]


def test_unknown_option():
    with pytest.raises(TypeError, match="betas"):
        GLS(nn.Linear(3, 2), betas=(0.9, 0.999))


def test_parameters_without_the_model():
    model = nn.Linear(3, 2)
    for given in (model.parameters(), list(model.parameters()), model.named_parameters()):
        with pytest.warns(UserWarning, match=r"pass GLS\(params, model=model\)"):
            optimizer = GLS(given)
        assert "2 parameters given without their model: Adam" in optimizer.report()
        assert optimizer.report().endswith("share covered: 0.0% of 8 parameters")


def test_strange_entry_of_a_group():
    with pytest.raises(TypeError, match=r"expected modules, .* or named .*, got str"):
        GLS([{"params": ["weight"]}])


@pytest.mark.parametrize(
    "empty", [nn.Sequential(), nn.ReLU(), [{"params": nn.ReLU()}], [{"params": []}]]
)
def test_nothing_to_train(empty):
    with pytest.raises(ValueError, match="no parameters"):
        GLS(empty)


def test_empty_list():
    with pytest.raises(ValueError, match=r"non-empty list, got \[\]"):
        GLS([])


@pytest.mark.parametrize("model", [nn.Sequential(), nn.LayerNorm(3), nn.Embedding(2, 2)])
def test_attach_to_nothing(model):
    with pytest.raises(ValueError, match=r"without a layer that GLS covers"):
        attach(model)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_complex_parameters_of_16_bits():
    with pytest.raises(ValueError, match=r"any dtype but complex32, got torch\.complex32"):
        GLS(nn.Linear(3, 2, dtype=torch.complex32))


def test_parameter_in_two_groups():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="more than one parameter group"):
        GLS([{"params": model}, {"params": [model.weight]}])
    assert type(model) is model.__class__


def test_site_backward_does_not_keep_what_sgd_needs():
    for wrong in (
        lambda: GLS(nn.Linear(3, 2), normalize="sgd", site="backward"),
        lambda: GLS([{"params": nn.Linear(3, 2), "normalize": "sgd"}], site="backward"),
    ):
        with pytest.raises(ValueError, match=r"site: .*got 'backward'"):
            wrong()


def test_sparse_gradient():
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = GLS(model)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="SparseAdam"):
        optimizer.step()


# ---- batches -------------------------------------------------------------------------------------


def spoil(batch, value):
    inputs, targets = batch
    inputs = inputs.clone()
    inputs[1] = value
    return inputs, targets


def states(optimizer):
    """All tensors of the state."""
    return [
        value
        for state in optimizer.state_dict()["state"].values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]


def assert_finite(tensors):
    assert all(x.isfinite().all() for x in tensors)


def run_with_bad_batches(kind, bad_value, bad_steps, **options):
    """Parameters and state after 6 steps, where some bad batches came and were dropped."""
    model = make_net(kind)
    optimizer = GLS(model, **EVERY_STEP, **options)
    for step in range(6):
        if step in bad_steps:
            loss = loss_of(model, spoil(make_batch(kind, 5, 99), bad_value))
            loss.backward()
            assert loss.isnan()
            optimizer.zero_grad()
        loss_of(model, make_batch(kind, 5, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return snapshot(model), states(optimizer)


@pytest.mark.parametrize("bad_value", [math.nan, math.inf])
@pytest.mark.parametrize("site", ["step", "backward"])
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_dropped_batch_leaves_no_trace(backend, kind, curvature, site, bad_value):
    options = {"curvature": curvature, "site": site, "backend": backend}
    clean = run_with_bad_batches(kind, bad_value, (), **options)
    spoilt = run_with_bad_batches(kind, bad_value, (0, 1, 4), **options)
    for actual, expected in zip(spoilt, clean, strict=True):
        assert_equal(actual, expected)


@pytest.mark.parametrize("bad_value", [math.nan, math.inf])
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad_step", [0, 2])
def test_bad_micro_batch_is_not_counted(backend, kind, curvature, bad_value, bad_step):
    """Its gradients, which are put back here, are the user's concern; the sums are not."""
    found = []
    for spoilt in (False, True):
        model = make_net(kind)
        optimizer = GLS(model, curvature=curvature, backend=backend, **EVERY_STEP)
        for step in range(4):
            loss_of(model, make_batch(kind, 5, 2 * step)).backward()
            kept = [p.grad.clone() for p in model.parameters()]
            if spoilt and step == bad_step:
                loss_of(model, spoil(make_batch(kind, 5, 99), bad_value)).backward()
            for p, gradient in zip(model.parameters(), kept, strict=True):
                p.grad = gradient
            optimizer.step()
            optimizer.zero_grad()
        found.append((snapshot(model), states(optimizer)))
    for actual, expected in zip(*found, strict=True):
        assert_equal(actual, expected)


@pytest.mark.parametrize("normalize", ["rms", "row", "factored", "adam", "sgd", "none"])
@pytest.mark.parametrize("bad_step", [0, 2])
def test_non_finite_gradient_is_taken_as_adam_takes_it(backend, normalize, bad_step):
    model = make_net("mlp")
    options = {"normalize": normalize, "site": "step", "backend": backend}
    optimizer = GLS(model, **EVERY_STEP, **options)
    for step in range(5):
        loss = loss_of(model, make_batch("mlp", 5, step))
        (loss * math.nan if step == bad_step else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        finite = all(p.isfinite().all() for p in model.parameters())
        assert finite == (step < bad_step)
    for key in ("basis", "core", "trace", "core_inverse", "shift"):
        assert_finite(state[key] for state in optimizer.state.values() if key in state)


def train(model, batches, **options):
    """Trains on the batches; the parameters and the state must stay finite."""
    optimizer = GLS(model, **{**EVERY_STEP, **options})
    for inputs in batches:
        outputs = model(inputs)
        loss = (outputs - 1).square().sum() / max(1, len(outputs))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_finite(snapshot(model))
        assert_finite(states(optimizer))
    return optimizer


def make_float_net(kind, **options):
    return make_net(kind, **options).float()


def inputs_of(kind, n, seed=0):
    return make_batch(kind, n, seed)[0].float()


def only_feature(inputs, scale):
    """Scales one feature, keeps the rest."""
    chosen = (torch.arange(inputs[0].numel()) == 1).view(inputs[0].shape)
    return torch.where(chosen, inputs * scale, inputs)


def each_scaled(inputs, factors):
    """Scales every sample by its own factor."""
    return inputs * factors.view(-1, *[1] * (inputs.ndim - 1))


POOR = {
    "no rows": lambda x: x[:0],
    "one row": lambda x: x[:1],
    "constant": torch.ones_like,
    "zero": torch.zeros_like,
    "one feature": lambda x: x - only_feature(x, 0),
    "rank one": lambda x: each_scaled(x[:1].expand_as(x), torch.linspace(-2, 2, len(x))),
}
SCALED = {
    "large": lambda x: x * 1e15,
    "small": lambda x: x * 1e-15,
    "scales mixed": lambda x: each_scaled(x, torch.logspace(-12, 12, len(x))),
    "one feature large": lambda x: only_feature(x, 1e8),
}
DEGENERATE = {**POOR, **SCALED}


@pytest.mark.parametrize("damping", [1.0, 1e-2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_inputs_stay_finite(backend, kind, curvature, name, bias, damping):
    batches = [DEGENERATE[name](inputs_of(kind, 6, seed=step)) for step in range(12)]
    options = {"curvature": curvature, "damping": damping, "backend": backend}
    train(make_float_net(kind, bias=bias), batches, **options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", POOR)
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_trains_on_after_poor_inputs(kind, curvature, name, bias):
    model = make_float_net(kind, bias=bias)
    real = inputs_of(kind, 6)
    poor = POOR[name](real)
    train(model, [poor] * 2, curvature=curvature)
    before = (model(real) - 1).square().sum()
    optimizer = train(model, [poor] * 2 + [real] * 15, curvature=curvature, lr=1e-2)
    assert (model(real) - 1).square().sum() < 0.9 * before
    assert "no rows yet" not in optimizer.report()


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_inputs_in_the_middle_stay_finite(backend, kind, curvature, name):
    batches = [inputs_of(kind, 6, seed=step) for step in range(9)]
    batches[3:6] = [DEGENERATE[name](batch) for batch in batches[3:6]]
    train(make_float_net(kind), batches, curvature=curvature, backend=backend)


@pytest.mark.parametrize("site", ["step", "backward"])
@pytest.mark.parametrize("kind", KINDS)
def test_empty_batches_change_nothing(backend, kind, site):
    """At step 0, when nothing has started, and later; also beside real rows in one step."""
    found = []
    for empty in (False, True):
        model = make_net(kind)
        optimizer = GLS(model, site=site, backend=backend, momentum=0.0, **EVERY_STEP)
        for step in range(4):
            if empty:
                model(make_batch(kind, 0, step)[0]).sum().backward()
            loss_of(model, make_batch(kind, 5, step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((snapshot(model), states(optimizer)))
    for actual, expected in zip(*found, strict=True):
        assert_equal(actual, expected)


def test_zero_inputs_have_a_bias_to_learn_from():
    """The column of ones is a row like any other; without it there is nothing to learn from."""
    for bias in (True, False):
        model = nn.Linear(3, 2, bias=bias)
        before = copy.deepcopy(model.state_dict())
        optimizer = train(model, [torch.zeros(4, 3)] * 3, lr=0.1)
        assert torch.equal(model.weight, before["weight"])
        assert ("no rows yet" in optimizer.report()) == (not bias)
        if bias:
            assert not torch.equal(model.bias, before["bias"])


@pytest.mark.parametrize("curvature", CURVATURES)
def test_scale_of_the_inputs_is_undone(backend, curvature):
    """The damping is relative: at any scale of the inputs the outputs move alike."""
    moved = []
    for scale in (1.0, 1e15, 1e-15):
        torch.manual_seed(0)
        model = nn.Linear(5, 2, bias=False)
        with torch.no_grad():
            model.weight /= scale
        rows = torch.randn(20, 5) * scale
        before = model(rows)
        options = {"curvature": curvature, "backend": backend, **EVERY_STEP}
        optimizer = GLS(model, lr=0.1, power=1, normalize="none", max_change=None, **options)
        for _ in range(3):
            (model(rows) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        moved.append(model(rows) - before)
    for other in moved[1:]:
        torch.testing.assert_close(other, moved[0], rtol=1e-4, atol=1e-5)


def test_dense_steps_on_few_live_inputs_stay_finite():
    """Some of whose Sigma's eigenvalues are NaNs in float32, by MKL of torch 2.14 on a CPU."""
    for seed in (9, 23):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(100, 32), nn.ReLU(), nn.Linear(32, 4))
        optimizer = GLS(model, curvature="dense")
        often = torch.rand(100) ** 4 * 0.3
        for _ in range(22):
            inputs = (torch.rand(16, 100) < often).float()
            F.cross_entropy(model(inputs), torch.randint(4, (16,))).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(param.isfinite().all() for param in model.parameters())
