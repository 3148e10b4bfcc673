"""The checks that torch's own tests (test/test_optim.py) make of every optimizer, made of GLS.

Left out is what GLS does not have: `foreach`, `fused`, `capturable`, `differentiable`, `maximize`.
"""

import copy
import io

import pytest
import torch
from nets import assert_equal, assert_same_state, loss_of, make_batch, make_net, snapshot
from tolerances import PRODUCT, SAME_STEPS, assert_near
from torch import nn
from torch.optim import lr_scheduler

from gls_fused import GLS, attach

INPUTS = {
    "default": {},
    "tensor lr": {"lr": torch.tensor(0.001)},
    "momentum 0": {"momentum": 0.0},
    "weight decay": {"weight_decay": 0.1},
    "adam": {"normalize": "adam"},
    "sgd": {"normalize": "sgd"},
    "none": {"normalize": "none"},
    "dense": {"curvature": "dense"},
    "rank": {"rank": 2, "curvature_every": 1},
    "step site": {"site": "step"},
    "backward site": {"site": "backward"},
    "master": {"low_precision": "master"},
}
every_input = pytest.mark.parametrize("options", INPUTS.values(), ids=INPUTS)


def take_steps(model, optimizer, steps=3, dtype=torch.float64):
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, [x.to(dtype) for x in make_batch("mlp", 9, step)]).backward()
        optimizer.step()
    return snapshot(model)


# ---- test_forloop_goes_right_direction -----------------------------------------------------------


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("schedule", [False, True])
@every_input
def test_goes_in_the_right_direction(options, schedule, contiguous):
    torch.manual_seed(0)
    model = nn.Linear(10, 5)
    if not contiguous:
        model.weight = nn.Parameter(torch.randn(10, 5).T)
        model.bias = nn.Parameter(torch.randn(5, 2)[:, 0])
        assert not model.weight.is_contiguous()
        assert not model.bias.is_contiguous()
    inputs = torch.randn(7, 10)
    optimizer = GLS(model, **options)
    schedules = []
    if schedule:
        decay, plateau = lr_scheduler.StepLR(optimizer, 2, 0.9), lr_scheduler.ReduceLROnPlateau
        slow = plateau(optimizer, patience=3)
        schedules = [lambda loss: decay.step(), lambda loss: slow.step(loss.item())]

    def closure():
        optimizer.zero_grad()
        loss = model(inputs).square().sum()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(20):
        loss = optimizer.step(closure)
        for advance in schedules:
            advance(loss)
    assert closure().item() < first


@every_input
def test_strides_of_a_parameter_change_nothing(options, backend):
    """A transposed weight, a bias with gaps: the same numbers as contiguous ones."""
    found = []
    for contiguous in (True, False):
        model = make_net("mlp").float()
        for layer in (model.stem, model.first, model.head):
            if not contiguous:
                layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
                gaps = torch.stack([layer.bias.detach()] * 2, dim=1)
                layer.bias = nn.Parameter(gaps[:, 0])
        optimizer = GLS(model, backend=backend, **options)
        found.append(take_steps(model, optimizer, dtype=torch.float32))
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


# ---- test_param_groups_lr, test_param_groups_weight_decay ----------------------------------------


def test_rate_of_a_group():
    """A group's rate scales its first steps."""
    moved = []
    for rate in (1e-3, 1e-2):
        model = make_net("mlp")
        groups = [{"params": model.stem}, {"params": [model.first, model.head], "lr": rate}]
        before = snapshot(model)
        after = take_steps(model, GLS(groups, lr=1e-3), 1)
        moved.append([(q - p).norm() for p, q in zip(before, after, strict=True)])
    assert torch.equal(moved[0][0], moved[1][0])
    torch.testing.assert_close(moved[1][2], moved[0][2] * 10)


def test_weight_decay_of_a_group():
    """A bias that is given apart, without decay, keeps its value where there is no gradient."""
    model = nn.Linear(4, 3)
    groups = [{"params": [model.weight], "weight_decay": 0.5}, {"params": [model.bias]}]
    optimizer = GLS(groups, lr=0.1, model=model)
    before = snapshot(model)
    (model(torch.ones(2, 4)) * 0).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.weight, before[0] * 0.95)
    assert torch.equal(model.bias, before[1])


# ---- test_step_is_noop_..., test_empty_grad, zero size -------------------------------------------


@every_input
def test_step_without_gradients_does_nothing(options):
    model = make_net("mlp")
    optimizer = GLS(model, **options)
    before = snapshot(model)
    optimizer.step()
    assert_equal(snapshot(model), before)
    assert not optimizer.state


@every_input
def test_step_on_zero_gradients_moves_nothing(options):
    model = make_net("mlp")
    optimizer = GLS(model, **{**options, "weight_decay": 0.0})
    before = snapshot(model)
    for step in range(3):
        optimizer.zero_grad()
        (loss_of(model, make_batch("mlp", 9, step)) * 0).backward()
        optimizer.step()
        assert_equal(snapshot(model), before)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("low_precision", ["nearest", "stochastic", "master"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# What torch says when it initialises such a layer.
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_parameters_without_elements(backend, shape, low_precision, dtype):
    """Beside ones that have some."""
    outputs, inputs = shape
    empty = nn.Linear(inputs, outputs, bias=outputs > 0).to(dtype)
    other, norm = nn.Linear(4, 3).to(dtype), nn.LayerNorm(3).to(dtype)
    norm.register_parameter("none", nn.Parameter(torch.empty(0, dtype=dtype)))
    optimizer = GLS(
        nn.ModuleList([empty, other, norm]), backend=backend, low_precision=low_precision
    )
    before = snapshot(other)
    for _ in range(3):
        optimizer.zero_grad()
        loss = empty(torch.ones(5, inputs, dtype=dtype)).sum() + norm.none.sum()
        (loss + norm(other(torch.randn(5, 4, dtype=dtype))).square().sum()).backward()
        optimizer.step()
    assert not torch.equal(other.weight, before[0])
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert_same_state(optimizer.state_dict(), saved)


# ---- test_mixed_device_dtype ---------------------------------------------------------------------


class Mixed(nn.Module):
    """bfloat16, then float32, then float64, each with a norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        dtypes = (torch.bfloat16, torch.float32, torch.float64)
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)).to(dtype) for dtype in dtypes
        )

    def forward(self, inputs):
        for part in self.parts:
            inputs = part(inputs.to(part[0].weight.dtype))
        return inputs


@every_input
def test_parameters_of_several_dtypes(backend, options):
    """In one group: as three optimizers, one to a dtype, take their steps."""
    options = {"lr": 0.01, "backend": backend, **options}
    together, apart = Mixed(), Mixed()
    optimizer = GLS(together, **options)
    others = [GLS(part, **options) for part in apart.parts]
    for step in range(4):
        inputs = torch.randn(9, 6, generator=torch.Generator().manual_seed(step))
        for model in (together, apart):
            model.zero_grad()
            (model(inputs) - 1)[:, :3].square().sum().backward()
        optimizer.step()
        for other in others:
            other.step()
    assert_equal(snapshot(together), snapshot(apart))
    for p in together.parameters():
        wide = torch.promote_types(p.dtype, torch.float32)
        kept = {key: v for key, v in optimizer.state[p].items() if torch.is_tensor(v)}
        assert {v.dtype for key, v in kept.items() if key != "step"} <= {wide}


# ---- test_complex, test_errors -------------------------------------------------------------------


class Spectrum(nn.Module):
    """As of a Fourier neural operator: a complex matrix for each frequency, and a real head."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(5, 6, 4, dtype=dtype))
        self.head = nn.Linear(4, 3, dtype=self.weight.real.dtype)

    def forward(self, inputs):
        spectrum = torch.einsum("nfi,fio->nfo", torch.fft.rfft(inputs, dim=1), self.weight)
        return self.head(torch.fft.irfft(spectrum, n=8, dim=1))

    def loss(self, step):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(7, 8, 6, generator=generator, dtype=self.head.weight.dtype)
        return (self(inputs) - inputs[..., :3]).square().mean()


def conjugated(values):
    return values.conj().resolve_conj().conj()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_complex_parameters_take_adams_update(backend, momentum, dtype):
    model = Spectrum(dtype)
    optimizer = GLS(model, lr=0.01, weight_decay=0.1, momentum=momentum, backend=backend)
    apart = nn.Parameter(model.weight.detach().clone())
    adamw = torch.optim.AdamW([apart], lr=0.01, betas=(momentum, 0.95), weight_decay=0.1)
    for step in range(9):
        optimizer.zero_grad()
        model.loss(step).backward()
        apart.grad = model.weight.grad.clone()
        if step == 2:
            # As torch's own ops give it, where a product's other factor is real.
            model.weight.grad = conjugated(model.weight.grad)
        if step == 4:
            saved = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict()], saved)
            saved.seek(0)
            weights, states = torch.load(saved, weights_only=True)
            model = Spectrum(dtype)
            model.load_state_dict(weights)
            optimizer = GLS(model, backend=backend)
            optimizer.load_state_dict(states)
            model.weight.grad = apart.grad.clone()
        optimizer.step()
        adamw.step()
        assert_near(
            torch.view_as_real(model.weight.detach()),
            torch.view_as_real(apart.detach()),
            SAME_STEPS if dtype is torch.complex128 else PRODUCT[torch.float32],
        )
        assert optimizer.state[model.weight]["exp_avg"].dtype is dtype
    assert "weight: Adam (Spectrum" in optimizer.report().replace(f"{__name__}.", "")
    assert "head: GLS (Linear 5 -> 3" in optimizer.report()


def negated(values):
    return torch.complex(torch.zeros_like(values), -values).conj().imag


@pytest.mark.parametrize("view", [conjugated, negated])
def test_parameters_that_are_conjugated_or_negated_when_they_are_read(backend, view):
    dtype = torch.complex128 if view is conjugated else torch.float64
    found = []
    for make in (view, torch.clone):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4, dtype=torch.float64))
        model.own = nn.Parameter(make(torch.randn(4, dtype=dtype)))
        assert (model.own.is_conj() or model.own.is_neg()) == (make is view)
        optimizer = GLS(model, lr=0.1, weight_decay=0.1, backend=backend)
        for step in range(5):
            optimizer.zero_grad()
            inputs = torch.full((5, 3), step + 1.0, dtype=torch.float64)
            (model[0](inputs) * model.own - step).abs().square().mean().backward()
            optimizer.step()
        found.append([p.detach().resolve_conj().resolve_neg() for p in model.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("role", ["weight", "bias"])
def test_a_layer_that_is_negated_when_it_is_read_takes_adams_update(backend, role):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    setattr(model[0], role, nn.Parameter(negated(getattr(model[0], role).detach())))
    optimizer = GLS(model, lr=0.1, backend=backend)
    assert f"0.weight: Adam (its {role} is a view that is negated" in optimizer.report()
    before = snapshot(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(5, 3)).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(snapshot(model), before, strict=True))


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_a_model_that_is_cast_to_complex_takes_adams_update(backend):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = GLS(model, lr=0.1, backend=backend)
    model.to(torch.complex64)
    before = snapshot(model)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.ones(5, 3, dtype=torch.complex64)).abs().square().mean().backward()
        optimizer.step()
    assert all((p != q).all() for p, q in zip(snapshot(model), before, strict=True))
    assert "0: Adam (its weight is complex)" in optimizer.report()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_layer_of_complex_weights_takes_adams_update(dtype):
    model = nn.Linear(3, 2, dtype=dtype)
    optimizer = GLS(model, lr=0.1)
    assert "weight: Adam (its weight is complex)" in optimizer.report()
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (model(torch.ones(4, 3, dtype=dtype)) - (1 + 2j)).abs().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_rate_must_have_no_dimension():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"lr: expected a number or a tensor .* got \[2\]"):
        GLS(model, lr=torch.tensor([0.1, 0.2]))
    assert type(model) is model.__class__


def test_parameter_twice_in_a_group_is_one():
    """torch warns of a list with duplicates; a module lists what it shares once."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert len(GLS(model).param_groups[0]["params"]) == 3


# ---- test_optimizer_can_be_printed, test_non_empty_state -----------------------------------------


@every_input
def test_prints_before_and_after_steps(options):
    model = make_net("mlp")
    optimizer = GLS(model, **options)
    assert "Parameter Group 0" in repr(optimizer)
    assert "no rows yet" in str(optimizer)
    take_steps(model, optimizer, 1)
    assert "9 rows" in str(optimizer)


@every_input
def test_state_is_filled_by_the_first_step(options):
    model = make_net("mlp")
    optimizer = GLS(model, **options)
    assert not optimizer.state
    take_steps(model, optimizer, 1)
    for layer in (model.stem, model.first, model.second, model.head):
        assert optimizer.state[layer.weight]["step"] == 1
        assert optimizer.state[layer.weight]["step"].shape == ()


# ---- test_state_dict_deterministic, test_save_load_equality_with_weights_only --------------------


@every_input
def test_state_dict_into_a_fresh_optimizer_goes_on_alike(options):
    options = {key: copy.deepcopy(value) for key, value in options.items()}
    model = make_net("mlp")
    optimizer = GLS(model, **options)
    take_steps(model, optimizer)
    twin = make_net("mlp")
    twin.load_state_dict(model.state_dict())
    loaded = GLS(twin, **copy.deepcopy(options))
    loaded.load_state_dict(optimizer.state_dict())
    assert_same_state(loaded.state_dict(), optimizer.state_dict())
    for step in range(3):
        for net, one in ((model, optimizer), (twin, loaded)):
            one.zero_grad()
            loss_of(net, make_batch("mlp", 9, 10 + step)).backward()
            one.step()
        assert_equal(snapshot(twin), snapshot(model))
        assert_same_state(loaded.state_dict(), optimizer.state_dict())


@every_input
def test_state_dict_through_a_file_of_weights_only(options):
    model = make_net("mlp")
    optimizer = GLS(model, **options)
    take_steps(model, optimizer)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert_same_state(torch.load(file, weights_only=True), optimizer.state_dict())


def test_state_of_a_group_with_a_different_rate_is_loaded_with_it():
    """test_can_load_older_state_dict and its like: the saved options hold."""
    model = make_net("mlp")
    optimizer = GLS(model, lr=0.5)
    take_steps(model, optimizer)
    other = GLS(make_net("mlp"), lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.5


def test_state_of_float64_fits_a_model_of_float32():
    """test_cpu_load_state_dict: a state moves to where the parameters are, in their precision."""
    model = make_net("mlp")
    optimizer = GLS(model)
    take_steps(model, optimizer)
    twin = make_net("mlp").float()
    loaded = GLS(twin)
    loaded.load_state_dict(optimizer.state_dict())
    tensors = [v for s in loaded.state.values() for v in s.values() if torch.is_tensor(v)]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    take_steps(twin, loaded, 2, dtype=torch.float32)
    assert all(p.isfinite().all() for p in twin.parameters())


# ---- test_deepcopy_copies_all_public_attrs -------------------------------------------------------


@every_input
def test_deepcopy_keeps_every_attribute(options):
    model = make_net("mlp")
    optimizer = GLS(model, **options)
    take_steps(model, optimizer)
    copied = copy.deepcopy(optimizer)
    # torch's own mark, left out by its copies too.
    keys = vars(optimizer).keys() - {"_warned_capturable_if_run_uncaptured"}
    assert vars(copied).keys() == keys
    assert copied.defaults == {**optimizer.defaults, "differentiable": False}
    assert_same_state(copied.state_dict(), optimizer.state_dict())
    assert copied.report() == optimizer.report()
    params = [{id(p) for g in o.param_groups for p in g["params"]} for o in (copied, optimizer)]
    assert not params[0] & params[1]


# ---- the GradScaler's protocol -------------------------------------------------------------------


def test_declares_that_it_scales():
    assert GLS._step_supports_amp_scaling
    model = make_net("mlp").float()
    optimizer = GLS(model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, [x.float() for x in make_batch("mlp", 9, 0)])).backward()
    scaler.step(optimizer)
    assert not hasattr(optimizer, "found_inf")
    assert not hasattr(optimizer, "grad_scale")


def test_attachment_keeps_the_optimizers_own_state():
    """What torch checks of an optimizer holds for one that steps on directions too."""
    model = make_net("mlp")
    optimizer = torch.optim.Adam(model.parameters())
    attach(model, optimizer)
    take_steps(model, optimizer)
    keys = {key for state in optimizer.state_dict()["state"].values() for key in state}
    assert keys == {"step", "exp_avg", "exp_avg_sq"}
