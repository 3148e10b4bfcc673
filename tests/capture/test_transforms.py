"""Models that are called inside transforms of torch.func: the same rows, P and steps as outside."""

import copy

import pytest
import torch
from nets import DIMENSIONS, OPTIONS, gradients, make_batch, make_net, make_trained, snapshot, train
from tolerances import PRODUCT, SAME_STEPS, assert_near
from torch import nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import gls_fused
from gls_fused import GLS

# torch's own, of the derivatives that jvp loads.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


def of_one(model):
    return lambda inputs: model(inputs[None]).square().sum()


def gradient_of(model, inputs):
    """That of each sample, which the loss differentiates again."""
    inputs = inputs.clone().requires_grad_()
    (found,) = torch.autograd.grad(model(inputs).square().sum(), inputs, create_graph=True)
    return found, inputs


def laplacian_of(model, inputs):
    first, inputs = gradient_of(model, inputs)
    second = 0
    for place in range(inputs[0].numel()):
        own = first.flatten(1)[:, place].sum()
        (found,) = torch.autograd.grad(own, inputs, create_graph=True)
        second = second + found.flatten(1)[:, place]
    return second


def traces(matrices):
    return matrices.flatten(1).unflatten(1, (6, 6)).diagonal(dim1=1, dim2=2).sum(1)


# Each with the same loss without a transform.
LOSSES = {
    "vmap": (lambda m, x: vmap(of_one(m))(x).sum(), lambda m, x: m(x).square().sum()),
    "grad": (
        lambda m, x: vmap(grad(of_one(m)))(x).square().sum(),
        lambda m, x: gradient_of(m, x)[0].square().sum(),
    ),
    "jacrev": (
        lambda m, x: vmap(jacrev(of_one(m)))(x).square().sum(),
        lambda m, x: gradient_of(m, x)[0].square().sum(),
    ),
    "jacfwd": (
        lambda m, x: vmap(jacfwd(of_one(m)))(x).square().sum(),
        lambda m, x: gradient_of(m, x)[0].square().sum(),
    ),
    "jvp": (
        lambda m, x: jvp(lambda z: m(z).square().sum(), (x,), (torch.ones_like(x),))[1].square(),
        lambda m, x: gradient_of(m, x)[0].sum().square(),
    ),
}
LAPLACIAN = (
    lambda m, x: traces(vmap(hessian(of_one(m)))(x)).square().sum(),
    lambda m, x: laplacian_of(m, x).square().sum(),
)


def trained(model, optimizer, loss, kind):
    """Weights and diagnostics after some steps."""
    for step in range(5):
        optimizer.zero_grad()
        (loss(model, make_batch(kind, 5, step)[0]) / 30).backward()
        optimizer.step()
    return snapshot(model), optimizer.diagnostics()


def check_alike(make, losses, kind, site, backend):
    """The steps of a transformed loss are those of the plain one, at the step site."""
    options = {**OPTIONS, "backend": backend}
    transformed, plain = losses
    model = make()
    expected, wanted = trained(model, GLS(model, site="step", **options), plain, kind)
    model = make()
    optimizer = GLS(model, site=site, **options)
    weights, found = trained(model, optimizer, transformed, kind)
    for p, q in zip(weights, expected, strict=True):
        assert_near(p, q, SAME_STEPS)
    assert wanted
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-8), key
    assert "Adam (its" not in optimizer.report()


@pytest.mark.parametrize("site", ["auto", "step", "backward"])
@pytest.mark.parametrize("transform", LOSSES)
@pytest.mark.parametrize("kind", ["mlp", "turned", "cnn", "grouped", "transposed", "few patches"])
def test_transforms_over_inputs(backend, kind, transform, site):
    check_alike(lambda: make_net(kind), LOSSES[transform], kind, site, backend)


@pytest.mark.parametrize("site", ["auto", "step", "backward"])
def test_laplacian(backend, site):
    """Three transforms in one another."""
    check_alike(lambda: make_net("mlp"), LAPLACIAN, "mlp", site, backend)


class Shown(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Linear(8, 8).weight

    def forward(self, inputs):
        return inputs @ gls_fused.observe(self, inputs).T


gls_fused.register(Shown, "observed")


class Users(nn.Module):
    """Uses weights by itself: some rows of one, a transposed one, a whole one; one is computed."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = parametrizations.weight_norm(nn.Linear(6, 8))
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.inner, self.last = nn.Linear(8, 8, bias=False), nn.Linear(8, 3)
        self.shown = Shown()
        self.double()

    def forward(self, inputs):
        tokens = torch.tanh(self.stem(inputs)).unflatten(-1, (2, 4))
        memory = tokens + 1
        hidden = self.attend(tokens, memory, memory)[0].flatten(-2)
        hidden = torch.tanh(self.shown(hidden @ self.inner.weight.t()))
        return F.linear(hidden, self.last.weight, self.last.bias)


@pytest.mark.parametrize("site", ["auto", "step"])
@pytest.mark.parametrize("transform", ["vmap", "grad", "jacrev"])
def test_weights_that_are_used_without_their_module(transform, site):
    check_alike(Users, LOSSES[transform], "mlp", site, "auto")


def test_standardized_convolution():
    layers = pytest.importorskip("timm.layers")

    def make():
        torch.manual_seed(0)
        stem = layers.StdConv2d(2, 4, 3)
        return nn.Sequential(stem, nn.Tanh(), nn.Flatten(), nn.Linear(144, 3)).double()

    # Not mapped: a batch norm inside standardizes, which `vmap` takes for one of a running mean.
    check_alike(make, LOSSES["jvp"], "cnn", "step", "auto")


@pytest.mark.parametrize("kind", ["mlp", "conv1d"])
def test_calls_of_one_sample(kind):
    """Without a batch's axis, or with one of their own."""
    model, whole = make_net(kind).stem, copy.deepcopy(make_net(kind).stem)
    optimizers = [GLS(each, **OPTIONS) for each in (model, whole)]
    inputs, _ = make_batch(kind, 12, 0)
    for step in range(3):
        rows = inputs if step else inputs.unflatten(0, (4, 3))
        axis = int(step > 0)
        vmap(model, in_dims=axis)(rows.movedim(0, axis)).square().sum().backward()
        whole(inputs).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    found, expected = (optimizer.diagnostics() for optimizer in optimizers)
    assert found == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("site", ["step", "backward"])
@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("kind", ["mlp", *DIMENSIONS])
def test_gradient_with_respect_to_parameters_is_the_callers(backend, kind, steps, site):
    """It is true, and leaves neither rows nor anything else."""
    model, optimizer = make_trained(steps, kind, site=site, backend=backend)
    twin, other = make_trained(steps, kind, site=site, backend=backend)
    inputs, _ = make_batch(kind, 5, 9)

    def gradient(net):
        def loss(params):
            return functional_call(net, params, inputs).square().sum()

        return grad(loss)(dict(net.named_parameters()))

    found, expected = gradient(model), gradient(copy.deepcopy(model))
    for name, wanted in expected.items():
        assert_near(found[name], wanted, PRODUCT[torch.float64])
    train(model, optimizer, range(steps, 4), kind)
    train(twin, other, range(steps, 4), kind)
    for p, q in zip(snapshot(model), snapshot(twin), strict=True):
        assert torch.equal(p, q)


def test_parameters_that_torch_func_alone_differentiates_take_adams_update():
    """And the report says why."""
    model, twin = make_net("mlp"), make_net("mlp")
    optimizer = GLS(model, **OPTIONS)
    inputs, _ = make_batch("mlp", 5, 0)

    def loss(params):
        return functional_call(model, params, inputs).square().sum()

    for _ in range(4):
        found = grad(loss)(dict(model.named_parameters()))
        for name, param in model.named_parameters():
            param.grad = found[name]
        optimizer.step()
    assert "stem: Adam (torch.func differentiates it" in optimizer.report()
    assert not torch.equal(model.stem.weight, twin.stem.weight)


@pytest.mark.parametrize("transform", [lambda m, x: m(x), lambda m, x: vmap(grad(of_one(m)))(x)])
def test_evaluation_leaves_no_rows(transform):
    """Under no_grad, and where nobody differentiates what comes out."""
    model, optimizer = make_trained(2)
    twin, other = make_trained(2)
    inputs, _ = make_batch("mlp", 7, 9)
    with torch.no_grad():
        expected = transform(copy.deepcopy(model), inputs)
        assert_near(transform(model, inputs), expected, PRODUCT[torch.float64])
    assert_near(transform(model, inputs), expected, PRODUCT[torch.float64])
    train(model, optimizer, range(2, 6))
    train(twin, other, range(2, 6))
    for p, q in zip(snapshot(model), snapshot(twin), strict=True):
        assert torch.equal(p, q)


def test_cast_before_a_transformed_call(backend):
    """What the layer is made anew with is no part of the transform."""
    model, optimizer = make_trained(4, backend=backend)
    model.float()
    inputs = make_batch("mlp", 5, 9)[0].float()
    vmap(grad(of_one(model)))(inputs).square().sum().backward()
    for layer in optimizer._preconditioner.layers:
        made = vars(layer) | (vars(layer.marks) if backend == "reference" else {})
        tensors = [each for each in made.values() if isinstance(each, torch.Tensor)]
        assert not any(map(is_functorch_wrapped_tensor, tensors))
    optimizer.step()
    train(model.double(), optimizer, range(3))
    assert all(torch.isfinite(p).all() for p in snapshot(model))


class Cell(nn.Module):
    """Of a weight whose rows no transform shows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head = nn.GRUCell(6, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, inputs):
        return self.head(self.cell(inputs))


def test_recurrent_modules_take_adams_update_or_are_refused():
    model = Cell()
    optimizer = GLS(model, **OPTIONS, site="step")
    trained(model, optimizer, LOSSES["jvp"][0], "mlp")
    assert "cell.weight_ih: Adam (torch.func transforms its module)" in optimizer.report()
    assert "head: GLS (Linear 5 -> 3, 5 rows" in optimizer.report()
    model = Cell()
    optimizer = GLS(model, **OPTIONS, site="backward")
    trained(model, optimizer, LOSSES["vmap"][1], "mlp")
    before = gradients(model)
    with pytest.raises(RuntimeError, match=r"weight_ih': torch\.func .*; use GLS.*site=\"step\""):
        LOSSES["jvp"][0](model, make_batch("mlp", 5, 0)[0])
    for kept, found in zip(before, gradients(model), strict=True):
        assert torch.equal(kept, found)


def test_transforms_of_frozen_layers_and_without_gradients():
    model = make_net("mlp")
    inputs, _ = make_batch("mlp", 5, 1)
    expected = vmap(of_one(model))(inputs)
    GLS(model)
    with torch.no_grad():
        assert_near(vmap(of_one(model))(inputs), expected, PRODUCT[torch.float64])
    model.requires_grad_(False)
    assert_near(vmap(of_one(model))(inputs), expected, PRODUCT[torch.float64])


def test_ensemble_of_copies():
    """What torch.func.stack_module_state makes of captured models has their weights."""
    models = [make_net("mlp") for _ in range(2)]
    for model in models:
        train(model, GLS(model), range(2))
    params, buffers = torch.func.stack_module_state([copy.deepcopy(model) for model in models])
    base = copy.deepcopy(models[0])
    inputs, _ = make_batch("mlp", 5, 1)

    def call(values, extra):
        return functional_call(base, (values, extra), inputs)

    outputs = vmap(call)(params, buffers)
    for model, output in zip(models, outputs, strict=True):
        assert_near(output, model(inputs), PRODUCT[torch.float64])
    outputs.sum().backward()
    assert all(stacked.grad is not None for stacked in params.values())
