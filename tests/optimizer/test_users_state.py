"""What users do to the state, the model's dtype and torch's defaults: it goes on."""

import copy
import io
import weakref
from collections import defaultdict

import numpy as np
import pytest
import torch
from tolerances import assert_near
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gls_fused import GLS, attach

SITES = ("step", "backward", "auto")
OPTIONS = {"rank": 4, "curvature_every": 2}


def make_mlp(dtype=torch.float32):
    torch.manual_seed(0)
    hidden = nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 32), nn.LayerNorm(32)
    return nn.Sequential(*hidden, nn.Linear(32, 3)).to(dtype)


def loss_of(model, seed):
    inputs = torch.randn(16, 8, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    outputs = model(inputs.to(next(model.parameters()).dtype))
    return F.mse_loss(outputs.float(), inputs[:, :3])


def fit(model, optimizer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()


def params_of(model):
    return torch.cat([p.detach().flatten().float() for p in model.parameters()])


def change_tensors(change):
    def run(model, optimizer):
        for state in optimizer.state.values():
            state.update({k: change(v) for k, v in state.items() if isinstance(v, torch.Tensor)})

    return run


def pop(key):
    def run(model, optimizer):
        for state in optimizer.state.values():
            state.pop(key, None)

    return run


def replace_states(model, optimizer):
    optimizer.state = {param: {} for param in optimizer.state}


def empty_and_fill(model, optimizer):
    params = optimizer.param_groups[0]["params"]
    kept = list(params)
    params.clear()
    optimizer.step()
    params.extend(kept)


def start_groups_anew(model, optimizer):
    optimizer.param_groups.clear()
    optimizer.state = defaultdict(dict)
    optimizer.add_param_group({"params": list(model.parameters())})


def split_groups(model, optimizer):
    (group,) = optimizer.param_groups
    matrices = {**group, "params": [p for p in group["params"] if p.ndim > 1]}
    others = {**group, "params": [p for p in group["params"] if p.ndim < 2], "lr": 0.01}
    optimizer.param_groups = [matrices, others]


CHANGES = {
    "cleared": lambda model, optimizer: optimizer.state.clear(),
    "replaced": replace_states,
    "halved": change_tensors(torch.Tensor.half),
    "doubled": change_tensors(torch.Tensor.double),
    "copied": change_tensors(torch.clone),
    "groups emptied and filled": empty_and_fill,
    "groups anew": start_groups_anew,
    "groups split": split_groups,
    "normalized otherwise": lambda model, optimizer: optimizer.param_groups[0].update(
        normalize="adam"
    ),
    **{
        f"without {key}": pop(key)
        for key in ("step", "exp_avg", "exp_avg_sq", "rows", "outputs", "basis", "core", "shift")
    },
}


@pytest.mark.parametrize("steps", [3, 4])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("site", SITES)
def test_state_is_the_users(backend, site, change, steps):
    """Whatever was changed, the next steps are as small as the first."""
    model = make_mlp()
    optimizer = GLS(model, site=site, backend=backend, **OPTIONS)
    fit(model, optimizer, range(steps))
    before = params_of(model)
    CHANGES[change](model, optimizer)
    fit(model, optimizer, range(10, 15))
    moved = (params_of(model) - before).abs().max()
    assert 0 < moved < 0.2
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fit(model, optimizer, range(15, 17))


@pytest.mark.parametrize("at", ["before a step", "after its backward"])
@pytest.mark.parametrize("change", ["cleared", "halved", "without rows"])
def test_state_changed_around_a_backward(backend, change, at):
    model = make_mlp()
    optimizer = GLS(model, backend=backend, **OPTIONS)
    fit(model, optimizer, range(3))
    optimizer.zero_grad()
    loss = loss_of(model, 3)
    if at == "after its backward":
        loss.backward()
    CHANGES[change](model, optimizer)
    if at == "before a step":
        loss.backward()
    optimizer.step()
    for step in range(4, 8):
        fit(model, optimizer, [step])
        # A step that begins averages anew leaves them to the next.
        for state in optimizer.state.values():
            assert "basis" not in state or {"step", "exp_avg", "exp_avg_sq"} <= state.keys()
    assert params_of(model).isfinite().all()


@pytest.mark.parametrize("low_precision", ["nearest", "stochastic", "master"])
@pytest.mark.parametrize("steps", [0, 1, 3, 4])
@pytest.mark.parametrize("dtypes", [("double",), ("bfloat16",), ("bfloat16", "float")])
def test_model_is_cast(backend, dtypes, steps, low_precision):
    model = make_mlp()
    optimizer = GLS(model, backend=backend, low_precision=low_precision, **OPTIONS)
    fit(model, optimizer, range(steps))
    for dtype in dtypes:
        getattr(model, dtype)()
    before = params_of(model)
    fit(model, optimizer, range(10, 15))
    moved = (params_of(model) - before).abs().max()
    assert 0 < moved < 0.2
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fit(model, optimizer, range(15, 17))


@pytest.mark.parametrize("low_precision", ["nearest", "stochastic", "master"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("normalize", ["rms", "adam", "none"])
def test_every_parameter_counts_as_written(backend, normalize, dtype, low_precision):
    """Norms, which take Adam's update, and biases of another group too."""
    model = make_mlp(dtype)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.1},
    ]
    options = {"normalize": normalize, "low_precision": low_precision, **OPTIONS}
    optimizer = GLS(groups, model=model, backend=backend, **options)
    for seed in range(4):
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        versions = [p._version for p in model.parameters()]
        optimizer.step()
        for p, version in zip(model.parameters(), versions, strict=True):
            assert p._version > version


class NoFloat64(TorchDispatchMode):
    """Stands in for a device without it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64:
                assert not leaf.ndim
                assert function.__name__.startswith(("scalar", "empty", "full"))
        return found


def test_scaler_on_a_device_without_float64():
    model = make_mlp()
    optimizer, scaler = GLS(model, backend="reference", **OPTIONS), torch.amp.GradScaler("cpu")
    with NoFloat64():
        for seed in range(4):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, seed)).backward()
            scaler.step(optimizer)
            scaler.update()


@pytest.mark.parametrize("options", [{}, {"curvature": "dense"}, {"site": "backward"}])
def test_default_device_elsewhere(backend, options):
    """While it is built, trains, loses its state and is attached; "meta" stands for a GPU."""
    model = make_mlp()
    torch.set_default_device("meta")
    try:
        optimizer = GLS(model, backend=backend, **{**OPTIONS, **options})
        fit(model, optimizer, range(4))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        fit(model, optimizer, range(4, 6))
        optimizer.zero_grad()
        loss_of(model, 6).backward()
        optimizer.state.clear()
        optimizer.step()
        optimizer.diagnostics()
        optimizer.detach()
        other = torch.optim.SGD(model.parameters(), 0.01)
        attach(model, other, backend=backend, **OPTIONS)
        fit(model, other, range(6, 10))
    finally:
        torch.set_default_device(None)
    assert params_of(model).isfinite().all()


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("how", ["clear", "anew"])
def test_emptied_after_the_first_step(backend, how, every):
    """As after a dry run: what follows begins anew, and is in the state."""
    model = make_mlp()
    optimizer = GLS(model, rank=4, curvature_every=every, backend=backend)
    fit(model, optimizer, range(1))
    if how == "clear":
        optimizer.state.clear()
    else:
        optimizer.state = defaultdict(dict)
    before = params_of(model)
    fit(model, optimizer, range(1, 5))
    assert 0 < (params_of(model) - before).abs().max() < 0.02
    for param in model.parameters():
        assert "exp_avg" in optimizer.state[param]
        assert 0 < optimizer.state[param].get("step", 1) <= 4
    weights = [module.weight for module in model if isinstance(module, nn.Linear)]
    assert all("basis" in optimizer.state[weight] for weight in weights)


@pytest.mark.parametrize("rows", [False, True])
def test_loaded_between_backward_and_step(rows):
    """Its gradient is the step's, whatever the backward has made of it."""
    found = []
    for site in ("step", "auto"):
        model = make_mlp(torch.float64)
        optimizer = GLS(model, site=site, **OPTIONS)
        saved = copy.deepcopy(optimizer.state_dict())
        fit(model, optimizer, range(3))
        if rows:
            saved = copy.deepcopy(optimizer.state_dict())
        optimizer.zero_grad()
        loss_of(model, 3).backward()
        optimizer.load_state_dict(saved)
        optimizer.step()
        found.append(params_of(model))
    assert (found[0] - found[1]).abs().max() < 1e-6


def test_saved_state_is_laid_out_by_rows():
    """As a rank receives it that another one broadcasts to; and back by columns."""
    model = make_mlp()
    optimizer = GLS(model, **OPTIONS)
    fit(model, optimizer, range(2))
    weight = model[0].weight
    assert not optimizer.state[weight]["basis"].is_contiguous()
    saved = copy.deepcopy(optimizer.state_dict())
    assert all(x.is_contiguous() for x in tree_leaves(saved) if isinstance(x, torch.Tensor))
    other = GLS(model, **OPTIONS)
    other.load_state_dict(saved)
    assert other.state[weight]["basis"].stride() == optimizer.state[weight]["basis"].stride()
    assert torch.equal(other.state[weight]["basis"], optimizer.state[weight]["basis"])
    assert (saved["state"][0]["at_step"], saved["state"][0]["lent"]) == (0, 0)


def test_numbers_of_numpy_are_saved_as_pythons():
    model = make_mlp()
    optimizer = GLS(model, lr=np.float64(1e-3), **OPTIONS)
    fit(model, optimizer, range(2))
    optimizer.param_groups[0]["lr"] = np.float32(1e-4)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["param_groups"][0]
    assert type(loaded["lr"]) is float
    assert loaded["lr"] == float(np.float32(1e-4))


SCALES = ("auto", "spectral", "factored", "row", "rms", "adam", "sgd", "none")


@pytest.mark.parametrize("before", SCALES)
def test_saved_after_another_normalize_was_chosen(before):
    for after in SCALES:
        for steps in (0, 1):
            model = make_mlp()
            optimizer = GLS(model, normalize=before, lr=1e-3, **OPTIONS)
            fit(model, optimizer, range(3))
            optimizer.param_groups[0]["normalize"] = after
            fit(model, optimizer, range(3, 3 + steps))
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            fit(model, optimizer, range(4, 6))
            assert params_of(model).isfinite().all()


@pytest.mark.parametrize("site", SITES)
def test_sixteen_bits_for_the_passes_and_more_for_the_step(backend, site):
    """As CLIP was trained: weights and gradients are cast around every step."""
    model = make_mlp(torch.bfloat16)
    optimizer = GLS(model, lr=1e-3, site=site, backend=backend, **OPTIONS)

    def cast(dtype):
        for param in model.parameters():
            param.data = param.data.to(dtype)
            if param.grad is not None:
                param.grad.data = param.grad.data.to(dtype)

    losses = []
    for seed in range(30):
        optimizer.zero_grad()
        loss = loss_of(model, seed % 3)
        loss.backward()
        losses.append(loss.item())
        cast(torch.float32)
        optimizer.step()
        cast(torch.bfloat16)
    assert "Adam (" not in optimizer.report().replace("Adam (LayerNorm", "")
    assert "16 rows" in optimizer.report()
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("step", [1, 2])
def test_model_is_cast_between_backward_and_step(backend, site, step):
    """What p.grad holds, the gradient or D, it holds in another dtype."""
    found = []
    for casts in (True, False):
        model = make_mlp()
        optimizer = GLS(model, lr=1e-2, site=site, backend=backend, **OPTIONS)
        fit(model, optimizer, range(step))
        optimizer.zero_grad()
        loss_of(model, 7).backward()
        if casts:
            model.double()
        optimizer.step()
        found.append(params_of(model))
    assert_near(*found, 1e-6)


@pytest.mark.parametrize("normalize", ["factored", "row", "rms", "adam", "sgd", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_states_that_were_cast_are_cast_back(backend, momentum, dtype, normalize):
    model = make_mlp()
    optimizer = GLS(model, momentum=momentum, normalize=normalize, backend=backend, **OPTIONS)
    fit(model, optimizer, range(3))
    for state in optimizer.state.values():
        for key, value in state.items():
            # All but the count of steps, as torch's own load_state_dict does.
            if isinstance(value, torch.Tensor) and key != "step":
                state[key] = value.to(dtype)
    fit(model, optimizer, range(3, 6))
    kept = {v.dtype for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)}
    assert kept == {torch.float32}


def test_states_are_replaced_between_backward_and_step(backend):
    """With D in p.grad, as the user has asked for."""
    found = []
    for replaces in (True, False):
        model = make_mlp(torch.float64)
        optimizer = GLS(model, lr=1e-2, site="backward", backend=backend, **OPTIONS)
        fit(model, optimizer, range(3))
        optimizer.zero_grad()
        loss_of(model, 7).backward()
        if replaces:
            change_tensors(torch.clone)(model, optimizer)
        optimizer.step()
        found.append(params_of(model))
    assert_near(*found, 1e-6)


@pytest.mark.parametrize("when", ["before the forward", "before the step"])
@pytest.mark.parametrize("site", SITES)
def test_states_of_equal_values_change_nothing(backend, site, when):
    """As those that are offloaded between steps, and brought back."""
    found = []
    for replaces in (True, False):
        model = make_mlp()
        optimizer = GLS(model, site=site, backend=backend, **OPTIONS)
        for seed in range(9):
            optimizer.zero_grad()
            if replaces and when == "before the forward":
                change_tensors(torch.clone)(model, optimizer)
            loss_of(model, seed).backward()
            if replaces and when == "before the step":
                change_tensors(torch.clone)(model, optimizer)
            optimizer.step()
        found.append((params_of(model), optimizer.diagnostics()))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("how", ["replaced", "cleared", "loaded", "detached"])
def test_states_that_are_gone_are_freed(how):
    """But for P, which is known until the next step."""
    model = make_mlp()
    optimizer = GLS(model, backend="auto", **OPTIONS)
    fit(model, optimizer, range(3))
    kept = {"basis", "core_inverse", "shift"} if how in ("replaced", "cleared") else set()
    old = [
        weakref.ref(value)
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and key not in kept
    ]
    assert len(old) > 20
    if how == "replaced":
        change_tensors(torch.clone)(model, optimizer)
    elif how == "loaded":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        if how == "detached":
            optimizer.detach()
        optimizer.state.clear()
    if how in ("replaced", "cleared"):
        optimizer.zero_grad()
    assert not any(ref() is not None for ref in old)
