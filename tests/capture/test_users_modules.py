"""What users do to captured modules and optimizers: the module computes as it would without GLS."""

import gc
import re
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
from tolerances import PRODUCT, assert_near
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode

from gls_fused import GLS, attach, register

SITES = ("step", "backward", "auto")
# After 3 steps the next one does not gather rows, after 4 it does.
STEPS = (0, 3, 4)
OPTIONS = {"rank": 4, "curvature_every": 2}


def make_mlp(dtype=torch.float64):
    """Wide enough that "auto" takes the backward site for all but the last layer."""
    torch.manual_seed(0)
    layers = nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 3)
    return nn.Sequential(*layers).to(dtype)


def loss_of(model, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = (torch.randn(16, n, generator=generator) for n in (8, 3))
    dtype = next(model.parameters()).dtype
    return F.mse_loss(model(inputs.to(dtype)), targets.to(dtype))


def fit(model, optimizer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()


def make_fitted(steps, **options):
    model = make_mlp()
    optimizer = GLS(model, **OPTIONS, **options)
    fit(model, optimizer, range(steps))
    optimizer.zero_grad()
    return model, optimizer


def plain_of(model):
    plain = make_mlp()
    plain.load_state_dict(model.state_dict())
    return plain


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("site", SITES)
def test_bias_replaced(backend, site, steps):
    """Its gradient is a true one, as P is for the layer's own bias."""
    model, optimizer = make_fitted(steps, site=site, backend=backend)
    model[0].bias = nn.Parameter(model[0].bias.detach().clone())
    plain = plain_of(model)
    loss_of(model, 9).backward()
    loss_of(plain, 9).backward()
    torch.testing.assert_close(model[0].bias.grad, plain[0].bias.grad)
    optimizer.step()
    fit(model, optimizer, range(20, 23))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("site", SITES)
def test_functional_call_with_another_bias(backend, site, steps):
    """As adapters and meta-learning packages call a module."""
    model, _ = make_fitted(steps, site=site, backend=backend)
    plain, bias = plain_of(model), model[0].bias.detach().clone().requires_grad_()
    inputs = torch.randn(16, 8, dtype=torch.float64)
    functional_call(model, {"0.bias": bias}, inputs).square().sum().backward()
    plain(inputs).square().sum().backward()
    torch.testing.assert_close(bias.grad, plain[0].bias.grad)


class Half(nn.Module):
    def forward(self, tensor):
        return tensor / 2


CHANGES = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "bias", amount=0.5),
    "parametrized": lambda layer: parametrize.register_parametrization(layer, "bias", Half()),
    "none": lambda layer: layer.register_parameter("bias", None),
}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("site", SITES)
def test_bias_that_is_no_parameter_any_more(backend, site, change, steps):
    model, optimizer = make_fitted(steps, site=site, backend=backend)
    CHANGES[change](model[0])
    fit(model, optimizer, range(10, 14))
    inputs = torch.randn(16, 8, dtype=torch.float64)
    found = model[0](inputs)
    torch.testing.assert_close(found, F.linear(inputs, model[0].weight, model[0].bias))
    if change == "parametrized":
        parametrize.remove_parametrizations(model[0], "bias")
        fit(model, optimizer, range(14, 17))


# torch's own decompositions, which it loads at the first.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("site", SITES)
def test_forward_mode(backend, site, steps):
    """The tangent is the plain module's, whether or not the step gathers rows."""
    model, optimizer = make_fitted(steps, site=site, backend=backend)
    inputs, tangent = torch.randn(2, 16, 8, dtype=torch.float64)
    tangents = []
    for module in (model, plain_of(model)):
        with forward_ad.dual_level():
            outputs = module(forward_ad.make_dual(inputs, tangent))
            tangents.append(forward_ad.unpack_dual(outputs).tangent)
    torch.testing.assert_close(*tangents)
    tangents[0].square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("site", SITES)
def test_weights_are_swapped(backend, site, steps):
    """torch swaps no tensor that others hold, but may swap all when a model is cast."""
    model, optimizer = make_fitted(steps, site=site, backend=backend)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    fit(model, optimizer, range(10, 14))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("site", SITES)
def test_memory_is_freed_without_the_cycle_collector(backend, site):
    """After a schedule, a closure and a load, which all refer to the optimizer."""
    model, optimizer = make_fitted(4, site=site, backend=backend)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step(lambda: loss_of(model, 4))
    schedule.step()
    optimizer.report(), optimizer.diagnostics()
    gone = [optimizer, *optimizer._preconditioner.layers, optimizer.state[model[0].weight]["basis"]]
    gone = [weakref.ref(each) for each in gone]
    gc.collect()
    gc.disable()
    try:
        del optimizer, schedule
        assert [each() for each in gone] == [None] * len(gone)
    finally:
        gc.enable()
    assert type(model[0]) is nn.Linear


def test_attachment_is_freed_with_its_optimizer(backend):
    model = make_mlp()
    optimizer = torch.optim.Adam(model.parameters())
    handle = weakref.ref(attach(model, optimizer, backend=backend, **OPTIONS))
    fit(model, optimizer, range(4))
    assert handle() is not None
    gc.collect()
    gc.disable()
    try:
        del optimizer
        assert handle() is None
    finally:
        gc.enable()
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("when", ["after the forward", "after the backward"])
@pytest.mark.parametrize("steps", [3, 4])
def test_dropped_in_the_middle_of_a_step(backend, when, steps):
    """What takes over finds true gradients."""
    model, optimizer = make_fitted(steps, backend=backend)
    plain = plain_of(model)
    loss = loss_of(model, 9)
    if when == "after the backward":
        loss.backward()
    del optimizer
    if when == "after the forward":
        loss.backward()
    loss_of(plain, 9).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


class Twice(torch.Tensor):
    """Has an F.linear of its own."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        found = super().__torch_function__(function, types, args, kwargs or {})
        return 2 * found if function is F.linear else found


class Named(torch.Tensor):
    """A subclass that only has a name, as those of fastai."""


@pytest.mark.parametrize("kind", [Twice, Named])
@pytest.mark.parametrize("site", SITES)
def test_inputs_of_a_subclass(backend, site, kind):
    """The outputs are those of the plain module, and of its type."""
    model, optimizer = make_fitted(0, site=site, backend=backend)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(16, 8, generator=generator, dtype=torch.float64).as_subclass(kind)
        found, sought = model(inputs), plain_of(model)(inputs)
        assert type(found) is type(sought)
        torch.testing.assert_close(
            found.as_subclass(torch.Tensor), sought.as_subclass(torch.Tensor)
        )
        optimizer.zero_grad()
        found.square().mean().backward()
        optimizer.step()


def fitting(module, rows):
    """The module, and inputs of so few rows that P applies to them in the backward."""
    torch.manual_seed(0)
    if module == "Linear":
        return nn.Linear(8, 64).double(), torch.randn(rows, 8, dtype=torch.float64)
    return nn.Conv2d(8, 64, 1).double(), torch.randn(1, 8, rows, 1, dtype=torch.float64)


class TwiceTheBias(torch.Tensor):
    """Is twice itself to the ops that add it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        args = list(args)
        if function in (F.linear, torch.conv2d):
            with torch._C.DisableTorchFunctionSubclass():
                args[2] = 2 * args[2].as_subclass(torch.Tensor)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("module", ["Linear", "Conv2d"])
def test_bias_of_a_subclass(backend, module, frozen, late):
    """From the start the layer is not covered; put in later, the bias keeps the op that it has."""
    layer, inputs = fitting(module, 5)
    bias = nn.Parameter(torch.ones(64, dtype=torch.float64).as_subclass(TwiceTheBias), not frozen)
    if not late:
        layer.bias = bias
    elif frozen:
        layer.bias.requires_grad_(False)
    model = nn.Sequential(layer, nn.Flatten(0), nn.Tanh())
    optimizer = GLS(model, backend=backend, curvature_every=3, lr=0.01)
    for step in range(8):
        if step == 4:
            layer.bias = bias
        optimizer.zero_grad()
        outputs = model(inputs)
        with torch.no_grad():
            assert torch.equal(outputs, model(inputs))
        outputs.square().mean().backward()
        optimizer.step()
    assert late == ("its bias is a TwiceTheBias" not in optimizer.report())


class Doubling(TorchFunctionMode):
    """Of emulated products, as those of quantised training."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        return 2 * found if function in (F.linear, torch.conv2d) else found


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("module", ["Linear", "Conv2d"])
def test_products_that_a_function_mode_sees(backend, module, site):
    """They are what the mode makes of them, and the steps those of the same model without it."""
    weights = []
    for mode in (Doubling, None):
        layer, inputs = fitting(module, 5)
        optimizer = GLS(layer, backend=backend, site=site, curvature_every=3, lr=0.01)
        for _ in range(8):
            optimizer.zero_grad()
            with nullcontext() if mode is None else mode():
                outputs = layer(inputs)
            outputs = outputs if mode else 2 * outputs
            outputs.sin().square().mean().backward()
            optimizer.step()
        weights.append(layer.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-12)


def test_the_mode_of_a_default_device_is_no_ones(backend):
    layer, inputs = fitting("Linear", 5)
    optimizer = GLS(layer, backend=backend)
    with torch.device("cpu"):
        for _ in range(3):
            optimizer.zero_grad()
            layer(inputs).square().mean().backward()
            optimizer.step()
    assert "site backward" in optimizer.report()


# torch's own, of a prototype.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("site", SITES)
def test_nested_inputs(backend, site, layout):
    """They train, by Adam's update in the end, and the report says so."""
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3)).double()
    optimizer = GLS(model, site=site, backend=backend, **OPTIONS)
    for _ in range(5):
        parts = [torch.randn(n, 8, dtype=torch.float64) for n in (3, 5)]
        outputs = model(torch.nested.nested_tensor(parts, layout=layout))
        optimizer.zero_grad()
        torch.nested.to_padded_tensor(outputs, 0.0).square().mean().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert "its inputs are" in optimizer.report()


def multiply(inputs, weight, bias):
    return F.linear(inputs, weight, bias)


class LookAlike(nn.Linear):
    """Whose forward reads a name of its own file."""

    def forward(self, inputs):
        return multiply(inputs, self.weight, self.bias)


@pytest.mark.parametrize("form", ["within", "alone"])
@pytest.mark.parametrize("kind", [LookAlike, nn.Linear])
def test_scripts_and_symbolic_traces(kind, form):
    """Of a captured model, in a step that gathers and in one that does not."""
    register(LookAlike, "linear")
    torch.manual_seed(0)
    part = kind(5, 4)
    model = nn.Sequential(part, nn.Tanh()) if form == "within" else part
    optimizer = GLS(model, **OPTIONS)
    inputs = torch.randn(6, 5)
    for _ in range(3):
        expected = model(inputs)
        with warnings.catch_warnings():
            # torch's own, of torch.jit.
            warnings.simplefilter("ignore")
            scripted = torch.jit.script(model) if form == "within" else model
        for each in (torch.fx.symbolic_trace(model), scripted):
            assert torch.equal(each(inputs), expected)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    assert "6 rows" in optimizer.report()


def test_forward_that_hooks_of_others_put_back():
    """Theirs was made of a captured class's, as accelerate's, which are taken off again."""
    model = make_mlp()
    first = GLS(model, **OPTIONS)
    model[0].forward = model[0].forward
    fit(model, first, range(2))
    second = GLS(model, **OPTIONS)
    fit(model, second, range(2))
    assert "share covered: 100.0%" in second.report()
    second.detach()


@pytest.mark.parametrize("site", SITES)
def test_memory_of_a_weight_is_swapped_for_its_forward(backend, site):
    """By hooks, as for fake quantisation: the gradients are of what was computed."""
    found = []
    for captured in (True, False):
        model = make_mlp()
        kept = {}
        for module in (model[0], model[2]):

            def quantize(module, args, kept=kept):
                kept[module] = module.weight.data
                module.weight.data = (8 * module.weight.data).round() / 8

            def put_back(module, args, output, kept=kept):
                module.weight.data = kept.pop(module)

            module.register_forward_pre_hook(quantize)
            module.register_forward_hook(put_back)
        optimizer = GLS(model, site=site, backend=backend, **OPTIONS) if captured else None
        gradients = []
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            inputs = torch.randn(16, 8, generator=generator, dtype=torch.float64).requires_grad_()
            for _ in range(2):
                model.zero_grad()
                model(inputs).square().mean().backward()
            gradients.append(inputs.grad)
            if optimizer is not None:
                before = [param.detach().clone() for param in model.parameters()]
                optimizer.step()
                with torch.no_grad():
                    torch._foreach_copy_(list(model.parameters()), before)
        found.append(torch.cat(gradients))
    assert_near(*found, PRODUCT[torch.float64])


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)))


def traced():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(nn.Linear(8, 8), torch.randn(2, 8))


@pytest.mark.parametrize("make", [scripted, traced])
def test_scripted_part_takes_adams_update(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), make())
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = GLS(model, **OPTIONS)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
    report = optimizer.report()
    assert "0: GLS (Linear 9 -> 8, 16 rows" in report
    assert re.search(r"weight: Adam \(torch\.jit\._\w+\.\w+Module is not covered\)", report)
    for p, before in zip(model.parameters(), start, strict=True):
        assert (p != before).all()
    optimizer.detach()
    handle = attach(model)
    assert "is not covered" in handle.report()


def test_model_on_the_meta_device():
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv1d(1, 1, 3)).to("meta")
    optimizer = GLS(model, **OPTIONS)
    assert model(torch.ones(2, 1, 8, device="meta")).shape == (2, 1, 6)
    optimizer.detach()


def test_complex_layers_are_left_to_an_attached_optimizer():
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64), nn.Linear(4, 4))
    handle = attach(model, torch.optim.Adam(model.parameters()))
    assert "0.weight: true gradient (its weight is complex)" in handle.report()
    with pytest.raises(TypeError, match=r"optimizer: expected one of torch's, or None, got <class"):
        attach(model, torch.optim.Adam)
