"""Groups as everybody writes them, and what the report says of them."""

import copy
import gc
import warnings
import weakref
from collections import defaultdict

import pytest
import torch
from tolerances import SAME_STEPS, assert_near
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gls_fused import GLS

OPTIONS = {"rank": 4, "curvature_every": 2}


def make_mlp():
    torch.manual_seed(0)
    hidden = nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 32), nn.LayerNorm(32)
    return nn.Sequential(*hidden, nn.Linear(32, 3))


def fit(model, optimizer, seeds):
    for seed in seeds:
        inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
        inputs = inputs.to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        F.mse_loss(model(inputs), inputs[:, :3]).backward()
        optimizer.step()


def params_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def split(model):
    matrices = [(name, p) for name, p in model.named_parameters() if p.ndim > 1]
    vectors = [(name, p) for name, p in model.named_parameters() if p.ndim < 2]
    return matrices, vectors


FORMS = {
    "parameters": lambda model: model.parameters(),
    "named": lambda model: model.named_parameters(),
    "one group": lambda model: [{"params": model.parameters()}],
    "decay and none": lambda model: [
        {"params": [p for _, p in part], "weight_decay": 0.0} for part in split(model)
    ],
    "named, decay and none": lambda model: [{"params": part} for part in split(model)],
    "a group to each": lambda model: [{"params": [p], "lr_scale": 1} for p in model.parameters()],
    "an empty group": lambda model: [{"params": model.parameters()}, {"params": []}],
}


@pytest.mark.parametrize("form", FORMS)
def test_form_of_the_groups_changes_no_step(backend, form):
    found = []
    for groups in (None, FORMS[form]):
        model = make_mlp()
        given = model if groups is None else groups(model)
        optimizer = GLS(given, model=model, backend=backend, **OPTIONS)
        fit(model, optimizer, range(8))
        assert optimizer.report().count(": GLS") == 3
        found.append(params_of(model))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


class Counted(TorchDispatchMode):
    """How many of torch's ops are called."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_decay_of_weights_alone_takes_as_many_ops_for_any_number_of_layers():
    counts = {}
    for layers in (3, 12):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(layers)])
        for forms in ("one group", "decay and none"):
            given = FORMS[forms](model)
            given[0]["weight_decay"] = 0.1
            optimizer = GLS(given, model=model, site="step", curvature_every=3)
            for step in range(3):
                optimizer.zero_grad()
                model(torch.randn(4, 8)).square().mean().backward()
                with Counted() as counted:
                    optimizer.step()
                counts[forms, layers, step] = counted.calls
            optimizer.detach()
    # The last step is ordinary, and no buffer is made in it any more.
    few, many = (
        counts["decay and none", layers, 2] - counts["one group", layers, 2] for layers in (3, 12)
    )
    assert few == many


def test_a_flag_that_is_false_leaves_the_digits_of_float64(backend):
    """Of the decay of a bias in a group of its own, and of the shares that are counted."""
    found = []
    for flag in (None, torch.tensor(0.0)):
        model = make_mlp().double()
        groups = [{"params": [p for _, p in part]} for part in split(model)]
        groups[1].update(lr=0.003, weight_decay=0.1)
        optimizer = GLS(groups, model=model, backend=backend, **OPTIONS)
        for seed in range(8):
            if flag is not None:
                # As torch.amp.GradScaler leaves it.
                optimizer.found_inf = flag
            fit(model, optimizer, [seed])
        held = [state["held"] for state in optimizer.state.values() if "held" in state]
        found.append([params_of(model), torch.stack(held)])
    torch.testing.assert_close(*found, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_warmup_from_zero_of_weights_and_biases_apart(backend, as_tensor):
    """Schedulers fill a rate that is a tensor in place."""
    model = make_mlp()
    groups = [{"params": [p for _, p in part]} for part in split(model)]
    for group in groups:
        group["lr"] = torch.tensor(0.01) if as_tensor else 0.01
    optimizer = GLS(groups, model=model, backend=backend, **OPTIONS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 4)
    before = params_of(model)
    fit(model, optimizer, [0])
    assert torch.equal(params_of(model), before)
    for seed in range(1, 6):
        schedule.step()
        fit(model, optimizer, [seed])
    assert 0 < (params_of(model) - before).abs().max() < 0.2


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("normalize", ["factored", "rms", "spectral"])
def test_bias_steps_at_its_own_rate_beside_a_weight_that_rests(backend, normalize, as_tensor):
    """A rate of 0 lets the bias take the step that a tiny one does."""
    moved = []
    for rate in (1e-9, 0.0):
        model = make_mlp()
        rates = [torch.tensor(x, dtype=torch.float64) if as_tensor else x for x in (rate, 1e-3)]
        groups = [
            {"params": [p for p in model.parameters() if (p.ndim < 2) == place], "lr": lr}
            for place, lr in enumerate(rates)
        ]
        optimizer = GLS(groups, model=model, backend=backend, normalize=normalize)
        before = params_of(model)
        fit(model, optimizer, range(3))
        moved.append(params_of(model) - before)
    assert moved[0].abs().max() > 1e-3
    assert_near(moved[1], moved[0], 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_rate_is_a_tensor_of_any_dtype(backend, dtype):
    found = []
    for rate in (torch.tensor(1, dtype=dtype), 1.0):
        model = make_mlp()
        fit(model, GLS(model, lr=rate, backend=backend, **OPTIONS), range(3))
        found.append(params_of(model))
    assert_near(*found, SAME_STEPS)


def test_biases_alone():
    model = make_mlp()
    weights = [p.detach().clone() for p in model.parameters() if p.ndim > 1]
    params = [p for p in model.parameters() if p.ndim < 2]
    optimizer = GLS(params, model=model, **OPTIONS)
    fit(model, optimizer, range(4))
    assert "share covered: 0.0%" in optimizer.report()
    for p, weight in zip((p for p in model.parameters() if p.ndim > 1), weights, strict=True):
        assert torch.equal(p, weight)


def test_layer_is_thawed_and_added_later():
    model = make_mlp()
    model[0].requires_grad_(False)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = GLS(params, model=model, **OPTIONS)
    fit(model, optimizer, range(3))
    assert model[0].weight not in optimizer.state
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 1e-4})
    fit(model, optimizer, range(3, 7))
    assert "0: GLS (Linear 9 -> 64, 16 rows" in optimizer.report()


def test_keys_of_others_are_kept_and_misspellings_named():
    model = make_mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = GLS([{"params": model.parameters(), "lr_scale": 0.5}], model=model)
    assert optimizer.param_groups[0]["lr_scale"] == 0.5
    with pytest.warns(UserWarning, match="weight_decay") as first:
        optimizer = GLS([{"params": model[:2].parameters(), "weight_decy": 0.1}], model=model)
    with pytest.warns(UserWarning, match="weight_decay") as second:
        optimizer.add_param_group({"params": model[2:].parameters(), "weight_decy": 0.1})
    assert [warning.filename for warning in (*first, *second)] == [__file__] * 2


@pytest.mark.parametrize("kind", [set, frozenset])
def test_parameters_without_an_order_are_refused(kind):
    """A saved state would be given to others."""
    model = make_mlp()
    with pytest.raises(TypeError, match="params: expected an order"):
        GLS(kind(model.parameters()), model=model)
    with pytest.raises(TypeError, match="params: expected an order"):
        GLS([{"params": kind(model.parameters())}], model=model)


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ([], TypeError, "group: expected a dict"),
        (None, TypeError, "group: expected a dict"),
        ({"lr": 1.0}, ValueError, "group: expected a key 'params'"),
        ({"params": None}, TypeError, "params: expected modules, parameters"),
        ({"params": 3}, TypeError, "params: expected modules, parameters"),
        ({"params": "weight"}, TypeError, "params: expected modules, parameters"),
    ],
)
def test_what_is_no_group(group, error, message):
    optimizer = GLS(make_mlp())
    with pytest.raises(error, match=message):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


def test_parameters_without_their_model():
    with pytest.warns(UserWarning, match="model=model"):
        GLS(make_mlp().parameters())
    with pytest.warns(UserWarning, match="pass the model whose parameters they are"):
        GLS(make_mlp().parameters(), model=make_mlp())


class Elsewhere(nn.Module):
    """Uses a product of its weight without calling the module."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, inputs):
        return F.linear(inputs, self.inner.weight * 1, self.inner.bias)


def test_layer_whose_module_is_never_called(backend):
    model = nn.Sequential(Elsewhere(), nn.Linear(8, 8))
    optimizer = GLS(model, backend=backend, **OPTIONS)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
    lines = optimizer.report().splitlines()
    assert "0.inner: Adam (its module is not called" in lines[0]
    assert lines[-1].startswith("share covered: 50.0%")


def test_layer_decay_of_timm():
    timm = pytest.importorskip("timm")
    pytest.importorskip("timm.optim")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=4
    )
    groups = timm.optim.param_groups_layer_decay(model, weight_decay=0.05)
    optimizer = GLS(groups, model=model, **OPTIONS)
    for _ in range(2):
        model(torch.randn(2, 3, 32, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.report().count(": GLS") == 10


def test_groups_of_the_trainer():
    transformers = pytest.importorskip("transformers")
    model = make_mlp()
    decayed = transformers.trainer_pt_utils.get_parameter_names(model, [nn.LayerNorm], ["bias"])
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for name, p in named.items() if name in decayed], "weight_decay": 0.1},
        {"params": [p for name, p in named.items() if name not in decayed], "weight_decay": 0.0},
    ]
    optimizer = GLS(groups, model=model, **OPTIONS)
    fit(model, optimizer, range(4))
    assert optimizer.report().count(": GLS") == 3


def test_group_added_later_is_reported_once():
    """What the first groups left uncovered has one line, whatever groups follow."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    optimizer = GLS([*model[0].parameters(), *model[1].parameters()], model=model)
    optimizer.add_param_group({"params": model[2].parameters()})
    report = optimizer.report()
    assert report.count("0.weight: Adam") == 1
    assert report.count(": GLS") == 2
    assert report.endswith(f"of {sum(p.numel() for p in model.parameters())} parameters")


def gradients_of(model, seed):
    """Of a copy that no optimizer has captured."""
    plain = make_mlp()
    plain.load_state_dict(model.state_dict())
    backward(plain, seed)
    return {name: param.grad for name, param in plain.named_parameters()}


def backward(model, seed):
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
    F.mse_loss(model(inputs), inputs[:, :3]).backward()


@pytest.mark.parametrize("taken", ["biases", "group"])
def test_gradient_of_what_was_taken_out_is_the_gradient(backend, taken):
    """Somebody else steps on it from the next backward on."""
    model = make_mlp()
    optimizer = GLS([{"params": model[0]}, {"params": model[2:]}], backend=backend, **OPTIONS)
    fit(model, optimizer, range(3))
    if taken == "group":
        mine = {f"{i}.{name}" for i in (2, 3, 4) for name in ("weight", "bias")}
        gone = optimizer.param_groups.pop()["params"]
    else:
        mine = {"0.bias", "2.bias"}
        gone = [model[0].bias, model[2].bias]
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if all(p is not q for q in gone)]
    for param in gone:
        optimizer.state.pop(param, None)
    for seed in (3, 4, 5):
        optimizer.zero_grad()
        model.zero_grad()
        expected = gradients_of(model, seed)
        backward(model, seed)
        if seed != 4:
            optimizer.step()
        for name, param in model.named_parameters():
            if name in mine:
                torch.testing.assert_close(param.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_weight_that_was_replaced_is_added(backend):
    model = make_mlp()
    optimizer = GLS(model, backend=backend, **OPTIONS)
    fit(model, optimizer, range(3))
    old, model[4].weight = model[4].weight, nn.Parameter(torch.randn(3, 32))
    group = optimizer.param_groups[0]
    group["params"] = [param for param in group["params"] if param is not old]
    optimizer.state.pop(old)
    optimizer.add_param_group({"params": [model[4].weight]})
    fit(model, optimizer, range(3, 8))
    assert optimizer.report().count("4: GLS") == 1
    assert "no rows yet" not in optimizer.report()


def test_what_is_found_of_groups_that_are_added(recwarn):
    """Parameters of the model that was given, and modules outside of it; others are warned of."""
    model = make_mlp()
    optimizer = GLS(model, **OPTIONS)
    model.adapter = nn.Linear(3, 5)
    optimizer.add_param_group({"params": model.adapter.parameters()})
    optimizer.add_param_group({"params": nn.Linear(4, 6)})
    assert "share covered: 9" in optimizer.report()
    assert "adapter: GLS (Linear 4 -> 5" in optimizer.report()
    assert "Linear: GLS (Linear 5 -> 6" in optimizer.report()
    optimizer.add_param_group({"params": []})
    optimizer.add_param_group({"params": nn.Parameter(torch.zeros(2))})
    assert not recwarn
    with pytest.warns(UserWarning, match="given with a model that holds none of them"):
        optimizer.add_param_group({"params": nn.Linear(2, 2).parameters()})
    beside = GLS([{"params": make_mlp()}, {"params": nn.Linear(4, 6)}], model=model)
    assert beside.report().count("GLS (Linear") == 4


@pytest.mark.parametrize("how", ["extended", "assigned"])
def test_parameters_put_into_the_groups_by_hand(backend, how):
    """As Lightning's callbacks do that thaw a model: its layers are found as by add_param_group."""
    found = []
    for by_hand in (True, False):
        model = make_mlp()
        parts = [list(model[2:].parameters()), list(model[0].parameters())]
        optimizer = GLS(parts[0], model=model, backend=backend, **OPTIONS)
        fit(model, optimizer, range(3))
        if not by_hand:
            optimizer.add_param_group({"params": parts[1]})
        elif how == "assigned":
            group = {"params": parts[1], "lr": 1e-3}
            optimizer.param_groups = [*optimizer.param_groups, group]
        else:
            optimizer.param_groups[0]["params"].extend(parts[1])
        fit(model, optimizer, range(3, 7))
        assert "0: GLS (Linear 9 -> 64, 16 rows" in optimizer.report()
        found.append((params_of(model), copy.deepcopy(optimizer.state_dict())))
    assert_near(found[0][0], found[1][0], 2e-3 if how == "extended" else 1e-12)
    if how == "assigned":
        twin = GLS(parts[0], model=model, backend=backend, **OPTIONS)
        twin.param_groups = [*twin.param_groups, {"params": parts[1], "lr": 1e-3}]
        twin.load_state_dict(found[0][1])
        fit(model, twin, [7])


def test_an_error_in_groups_that_were_changed_by_hand_leaves_them_to_be_seen():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))
    optimizer = GLS(model[4].parameters(), model=model)

    def step():
        optimizer.zero_grad()
        model(torch.randn(5, 6)).square().mean().backward()
        optimizer.step()

    step()
    optimizer.param_groups.append({"params": list(model[:4].parameters()), "split": 3})
    before = [param.detach().clone() for param in model.parameters()]
    for _ in range(2):
        with pytest.raises(ValueError, match="split: expected a divisor of the 8 outputs"):
            step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    optimizer.param_groups[1]["split"] = 1
    step()
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert "share covered: 100.0%" in optimizer.report()


@pytest.mark.parametrize("replaced", ["module", "weight"])
def test_what_was_replaced_is_not_kept_alive(replaced):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = GLS(model)
    gone = []
    for _ in range(4):
        old = model[0].weight
        if replaced == "module":
            model[0] = nn.Linear(6, 8)
        else:
            model[0].weight = nn.Parameter(torch.randn(8, 6))
        optimizer.param_groups[0]["params"] = list(model.parameters())
        optimizer.state = defaultdict(
            dict, {p: s for p, s in optimizer.state.items() if p in set(model.parameters())}
        )
        gone.append(weakref.ref(old))
        del old
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(5, 6)).square().mean().backward()
            optimizer.step()
    gc.collect()
    assert [each() for each in gone] == [None] * 4
    assert [line[:6] for line in optimizer.report().splitlines()[:2]] == ["2: GLS", "0: GLS"]


def test_states_that_are_loaded_often_leave_nothing_behind():
    model = nn.Linear(6, 3)
    optimizer = GLS(model)
    for _ in range(5):
        model(torch.randn(5, 6)).square().mean().backward()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    assert len(optimizer._membership._checked) <= 1
