"""Functions whose backward runs layers and asks for their gradients, as adjoint methods do."""

import pytest
import torch
from tolerances import SAME_STEPS, assert_near
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from gls_fused import GLS, attach

OPTIONS = {"curvature": "dense", "curvature_every": 1}


class Adjoint(torch.autograd.Function):
    """layer(inputs), of which nothing is kept: the backward computes it again, and asks."""

    @staticmethod
    def forward(ctx, layer, inputs, *params):
        ctx.layer = layer
        ctx.save_for_backward(inputs, *params)
        return layer(inputs)

    @staticmethod
    def backward(ctx, gradient):
        inputs, *params = ctx.saved_tensors
        with torch.enable_grad():
            inputs = inputs.detach().requires_grad_()
            outputs = ctx.layer(inputs)
        return None, *torch.autograd.grad(outputs, [inputs, *params], gradient)


class Plain(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def again(self, inputs):
        return self.layer(inputs)


class Asking(Plain):
    def again(self, inputs):
        return Adjoint.apply(self.layer, inputs, *self.layer.parameters())


class Attention(nn.MultiheadAttention):
    def forward(self, inputs):
        return super().forward(inputs, inputs, inputs, need_weights=False)[0]


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (9, 6)),
    "weight norm": (lambda: weight_norm(nn.Linear(6, 5)), (9, 6)),
    "conv": (lambda: nn.Conv2d(2, 3, 3), (4, 2, 5, 5)),
    "attention": (lambda: Attention(6, 2, batch_first=True), (2, 4, 6)),
    "cell": (lambda: nn.GRUCell(6, 5), (9, 6)),
}


def draw(shape, seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (size * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()


def direct_first(model, inputs, others):
    (model.layer(inputs).square().mean() + model.again(others).square().mean()).backward()


def direct_last(model, inputs, others):
    (model.again(others).square().mean() + model.layer(inputs).square().mean()).backward()


def two_backwards(model, inputs, others):
    model.layer(inputs).square().mean().backward()
    model.again(others).square().mean().backward()


def after_one_that_was_dropped(model, inputs, others):
    model.again(draw(others.shape, 99, 30)).square().mean().backward()
    for param in model.parameters():
        param.grad = None
    model.again(others).square().mean().backward()


def make(kind, layer, site):
    make_layer, _ = LAYERS[layer]
    torch.manual_seed(0)
    model = kind(make_layer().double())
    if site == "attach":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, optimizer, attach(model, optimizer, **OPTIONS)
    optimizer = GLS(model, lr=0.01, site=site, **OPTIONS)
    return model, optimizer, optimizer


@pytest.mark.parametrize("site", ["step", "backward", "attach"])
@pytest.mark.parametrize(
    "run", [direct_first, direct_last, two_backwards, after_one_that_was_dropped]
)
@pytest.mark.parametrize("layer", LAYERS)
def test_steps_are_those_without_the_function(layer, run, site):
    steps = []
    for kind in (Plain, Asking):
        model, optimizer, handle = make(kind, layer, site)
        for seed in range(4):
            optimizer.zero_grad(set_to_none=True)
            run(model, draw(LAYERS[layer][1], seed, 3), draw(LAYERS[layer][1], seed + 50))
            optimizer.step()
        numbers = list(handle.diagnostics().values())
        assert len(numbers) > 2
        steps.append([*model.parameters(), torch.tensor(numbers, dtype=torch.float64)])
    for mine, plain in zip(steps[1], steps[0], strict=True):
        assert_near(mine, plain, SAME_STEPS)
