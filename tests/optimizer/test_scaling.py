"""Mixed precision: autocast, torch.amp.GradScaler, overflow, and that the host never waits."""

import copy
import itertools

import pytest
import torch
from nets import (
    KINDS,
    assert_equal,
    assert_same_state,
    gradients,
    loss_of,
    make_batch,
    make_net,
    snapshot,
)
from tolerances import PRODUCT, assert_near
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from gls_fused import GLS, attach
from gls_fused.preconditioner import Preconditioner
from gls_fused.state import prime_states

OPTIONS = {"rank": 4, "curvature_every": 2, "lr": 0.01}
OPTION_SETS = [
    {"normalize": normalize, "site": site, "momentum": momentum}
    for normalize, site, momentum in itertools.product(
        ("rms", "row", "factored", "adam", "sgd", "none"), ("step", "backward"), (0.0, 0.9)
    )
    if (normalize, site) != ("sgd", "backward")
]


def make(kind="mlp", dtype=torch.float32):
    """Layers, and a norm that takes Adam's update."""
    return nn.Sequential(make_net(kind), nn.LayerNorm(3)).to(dtype)


def batch_of(kind, step, dtype=torch.float32):
    return tuple(x.to(dtype) for x in make_batch(kind, 9, step))


def backward(model, optimizer, scaler, kind, step, overflow=None, clip=None):
    """The gradients of a step, one of them not finite where `overflow` says which."""
    optimizer.zero_grad()
    loss = loss_of(model, batch_of(kind, step, next(model.parameters()).dtype))
    scaler.scale(loss).backward()
    if overflow == "all":
        scaler.scale(loss_of(model, batch_of(kind, step)) * torch.inf).backward()
    elif overflow == "one":
        list(model.parameters())[1].grad[0] = torch.inf
    if clip is not None:
        scaler.unscale_(optimizer)
        clip(model.parameters())


def train(model, optimizer, kind, steps, overflows=(), clip=None, enabled=True, how="all"):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
    for step in steps:
        if step in overflows:
            backward(model, optimizer, scaler, kind, 1000 + step, how, clip)
            scaler.step(optimizer)
            scaler.update()
        backward(model, optimizer, scaler, kind, step, clip=clip)
        scaler.step(optimizer)
        scaler.update()
    return snapshot(model)


@pytest.mark.parametrize("options", OPTION_SETS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_scaling_changes_nothing(kind, options):
    """Scales are powers of two."""
    found = []
    for enabled in (True, False):
        model = make(kind)
        optimizer = GLS(model, **OPTIONS, **options)
        found.append(train(model, optimizer, kind, range(5), enabled=enabled))
    assert_equal(*found)


@pytest.mark.parametrize("options", [*OPTION_SETS, {"curvature": "dense"}], ids=str)
@pytest.mark.parametrize("how", ["all", "one"])
def test_overflow_leaves_every_state_untouched(backend, options, how):
    model = make()
    optimizer = GLS(model, **OPTIONS, **options, backend=backend)
    scaler = torch.amp.GradScaler("cpu")
    train(model, optimizer, "mlp", range(4))
    weights, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
    for step in range(4, 6):
        backward(model, optimizer, scaler, "mlp", step, how)
        scaler.step(optimizer)
        scale = scaler.get_scale()
        scaler.update()
        assert scaler.get_scale() == scale / 2
        assert_equal(snapshot(model), weights)
        assert_same_state(optimizer.state_dict(), state)


@pytest.mark.parametrize("options", OPTION_SETS, ids=str)
@pytest.mark.parametrize("how", ["all", "one"])
def test_training_with_overflows_is_training_without_them(backend, options, how):
    """Also at the first steps, when no statistics have started."""
    found = []
    for overflows in ((), (0, 1, 4)):
        model = make()
        optimizer = GLS(model, **OPTIONS, **options, backend=backend)
        weights = train(model, optimizer, "mlp", range(6), overflows, how=how)
        found.append((weights, optimizer.state_dict()))
    assert_equal(found[1][0], found[0][0])
    assert_same_state(found[1][1], found[0][1])


@pytest.mark.parametrize("low_precision", ["nearest", "stochastic", "master"])
def test_overflow_leaves_16_bit_parameters_untouched(low_precision):
    model = make(dtype=torch.bfloat16)
    optimizer = GLS(model, **OPTIONS, low_precision=low_precision)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for step in range(5):
        weights, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
        backward(model, optimizer, scaler, "mlp", step, "one" if step in (2, 4) else None)
        scaler.step(optimizer)
        scaler.update()
        if step in (2, 4):
            assert_equal(snapshot(model), weights)
            assert_same_state(optimizer.state_dict(), state)
        else:
            assert any(not torch.equal(p, q) for p, q in zip(snapshot(model), weights, strict=True))


@pytest.mark.parametrize("site", ["step", "backward"])
@pytest.mark.parametrize(
    "clip",
    [lambda params: clip_grad_norm_(params, 0.1), lambda params: clip_grad_value_(params, 0.01)],
    ids=["norm", "value"],
)
def test_unscale_then_clip_then_step(site, clip):
    found = []
    for enabled, overflows in ((True, ()), (False, ()), (True, (0, 2))):
        model = make()
        optimizer = GLS(model, **OPTIONS, site=site, normalize="none")
        found.append(
            train(model, optimizer, "mlp", range(5), overflows, clip=clip, enabled=enabled)
        )
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])
    unclipped = make()
    optimizer = GLS(unclipped, **OPTIONS, site=site, normalize="none")
    different = train(unclipped, optimizer, "mlp", range(5))
    assert not torch.equal(different[0], found[0][0])


def test_scaler_without_gradients():
    """Its flag is then the number 0."""
    model = make()
    optimizer = GLS(model, **OPTIONS)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    before = snapshot(model)
    scaler.step(optimizer)
    assert_equal(snapshot(model), before)


@pytest.mark.parametrize("make_other", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("fused", [True, False])
def test_attached_optimizer_skips_with_its_statistics(make_other, fused):
    """A fused optimizer is called for a step that is skipped; another is not called at all."""
    model = make_net("mlp").float()
    optimizer = make_other(model.parameters(), lr=0.01, fused=fused)
    handle = attach(model, optimizer, rank=4, curvature_every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(7):
        before = snapshot(model), copy.deepcopy(handle.state_dict()["layers"])
        backward(model, optimizer, scaler, "mlp", step, "one" if step in (0, 3) else None)
        scaler.step(optimizer)
        scaler.update()
        after = snapshot(model), handle.state_dict()["layers"]
        if step in (0, 3):
            assert_equal(after[0], before[0])
            for name, state in before[1].items():
                assert state.keys() == after[1][name].keys()
                assert_equal(
                    map(torch.as_tensor, after[1][name].values()),
                    map(torch.as_tensor, state.values()),
                )
        else:
            assert not torch.equal(after[0][0], before[0][0])
            if "basis" in before[1]["stem"]:
                assert not torch.equal(after[1]["stem"]["basis"], before[1]["stem"]["basis"])


without_a_driver = pytest.mark.skipif(
    torch.__version__ < "2.10", reason="torch 2.9 asks CUDA's driver for fake tensors"
)


@without_a_driver
@pytest.mark.parametrize("low_precision", ["nearest", "stochastic", "master"])
@pytest.mark.parametrize("normalize", ["rms", "row", "factored", "adam", "sgd", "none"])
def test_host_never_waits(normalize, low_precision):
    """Tensors on a device that have no values: whoever asks for one raises."""
    options = {"rank": 4, "normalize": normalize, "low_precision": low_precision}
    dtype = torch.float32 if low_precision == "nearest" else torch.bfloat16
    where = {"device": "cuda", "dtype": dtype}
    with FakeTensorMode():
        model = nn.Sequential(
            nn.Linear(6, 8, **where), nn.LayerNorm(8, **where), nn.Conv2d(2, 3, 2, **where)
        )
        optimizer = GLS(model, backend="reference", curvature_every=1, **options)
        start_without_values(optimizer)
        optimizer.grad_scale, optimizer.found_inf = torch.ones(2, device="cuda").unbind()
        step_without_values(model, optimizer, 3)
        assert optimizer.param_groups[0]["step"] == 3
        with pytest.raises(DataDependentOutputException):
            bool(optimizer.found_inf)


@without_a_driver
def test_model_on_several_devices():
    """The scaler leaves its flag on one of them. Without values, as above."""
    with FakeTensorMode():
        model = nn.Sequential(
            nn.Linear(6, 8, device="cuda:0"),
            nn.LayerNorm(8, device="cuda:1"),
            nn.Linear(8, 3, device="cuda:1"),
        )
        optimizer = GLS(model, backend="reference", curvature_every=1, rank=4)
        start_without_values(optimizer)
        optimizer.grad_scale, optimizer.found_inf = torch.ones(2, device="cuda:0").unbind()
        step_without_values(model, optimizer, 2)
        for layer in optimizer._preconditioner.layers:
            state = optimizer.state[layer.weight]
            devices = {x.device for x in state.values() if isinstance(x, torch.Tensor)}
            assert devices == {layer.weight.device}


def start_without_values(optimizer):
    """As if every layer had seen rows, which a host does have to read, once."""
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.zeros_like(param)
    preconditioner = optimizer._preconditioner
    prime_states([(optimizer.param_groups[0], preconditioner.layers)], optimizer.state)
    assert isinstance(preconditioner, Preconditioner)
    for layer in preconditioner.layers:
        optimizer.state[layer.weight]["rows"] = 9
    optimizer._restart()
    assert all(layer.inverse is not None for layer in preconditioner.layers)


def step_without_values(model, optimizer, count):
    """Steps that gather, with gradients and sums of zero."""
    for _ in range(count):
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        for layer in optimizer._preconditioner.layers:
            layer.sums = layer.no_sums()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("site", ["step", "backward"])
@pytest.mark.parametrize("kind", [*KINDS, "grouped", "transposed"])
def test_autocast_trains_as_float32_does(kind, site, dtype):
    """Statistics and gradients stay float32, and the loss falls as far, within a tenth."""
    losses = {}
    for enabled in (True, False):
        torch.manual_seed(0)
        model = make_net(kind).float()
        optimizer = GLS(model, rank=4, lr=0.01, site=site)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=enabled)
        batch = batch_of(kind, 0)
        history = []
        for _ in range(40):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=enabled):
                loss = loss_of(model, batch)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            history.append(loss.item())
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        tensors = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
        losses[enabled] = history
    (first, *_, last), (_, *_, mixed) = losses[False], losses[True]
    assert last < first / 2
    assert abs(mixed - last) < 0.1 * (first - last)


@pytest.mark.parametrize("curvature", ["subspace", "dense"])
@pytest.mark.parametrize(
    ("size", "bias"),
    [(1e-6, False), (1e-4, False), (1.0, False), (1e4, False), (1e-4, True), (1.0, True)],
)
@pytest.mark.parametrize("rows", [8, 40], ids=["few rows", "many rows"])
def test_inputs_of_any_size_under_float16_autocast(backend, rows, size, bias, curvature):
    """The backward site's gradient is the direction that float32 takes at the step site."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 24, bias=bias)
    inputs, targets = (torch.randn(rows, 12) * size).half(), torch.randn(rows, 24)
    found = {}
    for site, dtype, steps in (("step", torch.float32, 2), ("backward", torch.float16, 40)):
        # The weights stay, the statistics are the first step's.
        options = {"lr": 1e-30, "curvature_every": 1000, "curvature": curvature, "rank": 4}
        optimizer = GLS(layer, site=site, backend=backend, **options)
        scaler = torch.amp.GradScaler("cpu", enabled=site == "backward")
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16, enabled=site == "backward"):
                outputs = layer(inputs.to(dtype))
            scaler.scale((outputs.float() - targets).square().mean()).backward()
            scaler.unscale_(optimizer)
            found[site] = gradients(layer)
            scaler.step(optimizer)
            scaler.update()
        (captured,) = optimizer._preconditioner.layers
        if site == "step":
            found[site] = captured.direction(found[site])
        optimizer.detach()
    for sought, expected in zip(found["backward"], found["step"], strict=True):
        assert_near(sought, expected, PRODUCT[torch.float16])


def follow(net, backend, **options):
    """SGD with GLS's directions. What `attach` returns lives as long as the optimizer."""
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    attach(net, optimizer, backend=backend, **options)
    return optimizer


@pytest.mark.parametrize(
    ("make_optimizer", "options"),
    [
        (GLS, {}),
        (GLS, {"curvature": "dense"}),
        (GLS, {"normalize": "spectral"}),
        (follow, {}),
        (follow, {"curvature": "dense"}),
    ],
)
def test_step_under_autocast_is_one_without(backend, make_optimizer, options):
    nets = [make_net("mlp").float() for _ in range(2)]
    for net, enabled in zip(nets, (True, False), strict=True):
        optimizer = make_optimizer(net, backend=backend, rank=4, curvature_every=2, **options)
        for seed in range(5):
            inputs, targets = make_batch("mlp", 8, seed)
            optimizer.zero_grad()
            loss_of(net, (inputs.float(), targets.float())).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                optimizer.step()
    assert_equal(snapshot(nets[0]), snapshot(nets[1]))
