"""Calls of nn.Linear at the backward site that go past Python, and those that must not."""

import copy
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import BaseTorchFunctionMode

from gls_fused import GLS, available_backends

pytestmark = pytest.mark.skipif(
    available_backends()["native"] is not None, reason="the native backend is not available"
)


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16, bias=False), nn.Tanh())
    return model.append(nn.Linear(16, 12)).to(dtype)


def batch(step, dtype=torch.float32):
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(step), dtype=dtype)


def train(model, optimizer, steps, dtype=torch.float32):
    for step in steps:
        optimizer.zero_grad()
        model(batch(step, dtype)).square().mean().backward()
        optimizer.step()


def layers_of(optimizer):
    return optimizer._preconditioner.layers


def known_calls(optimizer):
    """A list that grows by whether the native module knew the call, for each."""
    known = []

    def watch(through):
        def call(params, inputs):
            outputs = through(params, inputs)
            known.append(outputs is not None)
            return outputs

        return call

    for layer in layers_of(optimizer):
        layer.through = watch(layer.through)
    return known


@pytest.fixture
def trained():
    model = make_model()
    optimizer = GLS(model)
    train(model, optimizer, range(12))
    assert all(layer.at_backward for layer in layers_of(optimizer))
    return model, optimizer


def test_ordinary_calls_go_through_and_gathering_ones_do_not():
    model = make_model()
    optimizer = GLS(model, curvature_every=3)
    known = known_calls(optimizer)
    train(model, optimizer, range(9))
    # The site is chosen in the first step, and each third gathers.
    assert known == [step % 3 != 0 for step in range(9) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("site", ["auto", "backward"])
def test_the_same_steps(dtype, site):
    models = [make_model(dtype), make_model(dtype)]
    optimizers = [GLS(model, curvature_every=3, site=site, seed=1) for model in models]
    for layer in layers_of(optimizers[1]):
        layer.through = None
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(4), dtype)
        if site == "auto":
            # What hooks see is the gradient.
            handle = model[0].weight.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
            train(model, optimizer, range(4, 6), dtype)
            handle.remove()
        train(model, optimizer, range(6, 12), dtype)
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(ours, theirs)


@contextmanager
def at(param, attribute, value):
    before = getattr(param, attribute)
    setattr(param, attribute, value)
    yield
    setattr(param, attribute, before)


@contextmanager
def registered(handle):
    yield
    handle.remove()


@contextmanager
def put_in(module, name, param):
    before = module._parameters[name]
    module._parameters[name] = param
    yield
    module._parameters[name] = before


class Sub(torch.Tensor):
    pass


CONTEXTS = {
    "no_grad": lambda m: torch.no_grad(),
    "inference_mode": lambda m: torch.inference_mode(),
    "autocast": lambda m: torch.autocast("cpu"),
    "function mode": lambda m: BaseTorchFunctionMode(),
    "dual level": lambda m: forward_ad.dual_level(),
    "hook": lambda m: registered(m.weight.register_hook(lambda g: None)),
    "hook of the bias": lambda m: registered(m.bias.register_hook(lambda g: None)),
    "hook after": lambda m: registered(m.weight.register_post_accumulate_grad_hook(lambda p: None)),
    "hook after the bias's": lambda m: registered(
        m.bias.register_post_accumulate_grad_hook(lambda p: None)
    ),
    "frozen": lambda m: at(m.weight, "requires_grad", False),
    "another weight": lambda m: put_in(m, "weight", nn.Parameter(m.weight.detach().clone())),
    "another bias": lambda m: put_in(m, "bias", nn.Parameter(m.bias.detach().clone())),
    "no bias": lambda m: put_in(m, "bias", None),
    "a tensor for a bias": lambda m: put_in(m, "bias", m.bias + 1),
    "a subclass for a weight": lambda m: put_in(
        m, "weight", nn.Parameter(m.weight.detach().as_subclass(Sub))
    ),
    "a subclass for a bias": lambda m: put_in(
        m, "bias", nn.Parameter(m.bias.detach().as_subclass(Sub))
    ),
    "cast": lambda m: at(m.weight, "data", m.weight.data.double()),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_calls_that_python_is_asked_about(trained, name):
    model, optimizer = trained
    module, layer = model[0], layers_of(optimizer)[0]
    inputs = batch(20)
    assert layer.through(module._parameters, inputs) is not None
    with CONTEXTS[name](module):
        assert layer.through(module._parameters, inputs) is None


@pytest.mark.parametrize(
    "inputs",
    [
        batch(20).to_sparse(),
        batch(20).as_subclass(Sub),
        torch.nested.nested_tensor([batch(20)], layout=torch.jagged),
        None,
        "rows",
    ],
    ids=["sparse", "subclass", "nested", "None", "string"],
)
def test_inputs_that_python_is_asked_about(trained, inputs):
    model, optimizer = trained
    layer = layers_of(optimizer)[0]
    assert layer.through(model[0]._parameters, inputs) is None


# A FutureWarning in torch 2.14, a DeprecationWarning in 2.11.
@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_transforms_and_tracing_ask_python(trained):
    model, optimizer = trained
    known = known_calls(optimizer)
    inputs = batch(20)
    torch.func.vmap(model)(inputs)
    torch.func.jvp(model, (inputs,), (inputs,))
    torch.func.jacrev(model)(inputs[0])
    assert known
    assert not any(known)
    known.clear()
    traced = torch.jit.trace(model, inputs, check_trace=False)
    assert not any(known)
    assert torch.equal(traced(inputs), model(inputs))


def changed_groups(optimizer):
    (group,) = optimizer.param_groups
    bias = layers_of(optimizer)[0].bias
    group["params"] = [param for param in group["params"] if param is not bias]
    optimizer.zero_grad()


@pytest.mark.parametrize(
    "change", [changed_groups, GLS.detach, lambda o: layers_of(o)[0].leave_backward_site()]
)
def test_an_optimizer_that_has_changed_asks_python(trained, change):
    model, optimizer = trained
    layer = layers_of(optimizer)[0]
    through = layer.through
    change(optimizer)
    assert through(model[0]._parameters, batch(20)) is None


def test_outputs_and_gradients_are_those_of_python(trained):
    model, optimizer = trained
    layer, module = layers_of(optimizer)[0], model[0]
    for shape in ((6,), (5, 6), (2, 3, 6), (0, 6)):
        inputs = torch.randn(shape, requires_grad=True)
        results = []
        for call in (layer.through, None):
            with ExitStack() as stack:
                stack.callback(setattr, layer, "through", layer.through)
                layer.through = call
                outputs = module(inputs)
            module.zero_grad()
            (found,) = torch.autograd.grad(outputs.square().sum(), inputs, retain_graph=True)
            outputs.square().sum().backward(inputs=list(module.parameters()))
            results.append([outputs, found, *(p.grad.clone() for p in module.parameters())])
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(results[0][0], F.linear(inputs, module.weight, module.bias))


def test_a_forward_that_is_replaced_for_all_is_asked(trained, monkeypatch):
    model, _ = trained
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: forward(self, x) + 1)
    plain = copy.deepcopy(model[0])
    assert torch.equal(model[0](batch(20)), plain(batch(20)))


def test_a_copy_computes_with_its_own_weights(trained):
    model, _ = trained
    twin = copy.copy(model[0])
    twin._parameters = {
        key: nn.Parameter(param.detach() + 1) for key, param in twin._parameters.items()
    }
    inputs = batch(20)
    assert torch.equal(twin(inputs), F.linear(inputs, twin.weight, twin.bias))
