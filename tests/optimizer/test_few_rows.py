"""Fewer rows a step than inputs, or than directions: what they do not show must do no harm."""

import copy

import pytest
import torch
from independent import Samples
from tolerances import PRODUCT, TRAJECTORY, assert_near
from torch import nn
from torch.nn import functional as F

from gls_fused import GLS


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden):
        return hidden + self.outer(F.gelu(self.inner(self.norm(hidden))))


def make_residual(zero_head):
    torch.manual_seed(0)
    width = 96
    blocks = [Block(width) for _ in range(3)]
    head = nn.Linear(width, 10)
    if zero_head:
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    return nn.Sequential(nn.Linear(48, width), *blocks, nn.LayerNorm(width), head)


def last_loss(make_optimizer, zero_head, steps=14):
    """Of a fixed batch of 8 images."""
    model = make_residual(zero_head)
    optimizer = make_optimizer(model)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 48, generator=generator)
    classes = torch.randint(0, 10, (8,), generator=generator)
    for _ in range(steps + 1):
        loss = F.cross_entropy(model(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("zero_head", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"power": 1, "normalize": "rms"}, {"curvature": "dense"}],
    ids=str,
)
def test_net_with_a_head_of_zeros_does_not_stand_still(options, zero_head):
    """In the first step the head alone moves, along what its few rows showed before."""
    ours = last_loss(lambda model: GLS(model, **options), zero_head)
    adamw = last_loss(lambda model: torch.optim.AdamW(model.parameters(), 1e-3), zero_head)
    assert ours < adamw


@pytest.mark.parametrize("normalize", ["factored", "adam"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_weights_of_an_input_that_is_always_zero_stay(backend, kind, normalize):
    """Scales per input would make a full step of what rounding, or the basis, leaves there."""
    torch.manual_seed(0)
    model = nn.Linear(20, 9) if kind == "linear" else nn.Conv2d(5, 9, 2)
    before = model.weight.detach().clone()
    optimizer = GLS(model, normalize=normalize, curvature_every=2, rank=6, backend=backend)
    for step in range(12):
        inputs = torch.randn(*((4, 20) if kind == "linear" else (4, 5, 3, 3)))
        inputs[:, 3] = 0
        optimizer.zero_grad()
        (model(inputs) - step).square().mean().backward()
        optimizer.step()
    moved = (model.weight.detach() - before).abs()
    assert moved[:, 3].max() <= 1e-3 * moved.median()


def test_few_images_give_the_same_steps_on_every_backend():
    """5 images a step, of which a head has 5 rows for 8 directions."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 9)).double()
    models = {name: copy.deepcopy(net) for name in ("reference", "native")}
    for name, model in models.items():
        optimizer = GLS(model, rank=8, curvature_every=1, power=1, backend=name)
        for step in range(8):
            generator = torch.Generator().manual_seed(step)
            images = torch.randn(5, 1, 6, 6, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()
    for ours, theirs in zip(*(model.parameters() for model in models.values()), strict=True):
        assert_near(ours, theirs, TRAJECTORY)


@pytest.mark.parametrize("curvature", ["subspace", "dense"])
def test_rows_are_counted_by_their_weights(backend, curvature):
    """Of 1 eigenvalue in 40, the damping is relative to the mean of as many as there are rows."""
    model = nn.Linear(40, 3, bias=False).double()
    options = {"beta": 0.7, "curvature_every": 1, "damping": 0.2, "curvature": curvature}
    optimizer = GLS(model, backend=backend, **options)
    expected = None
    for rows in (3, 5, 2, 9, 60):
        model(torch.randn(rows, 40, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if expected is None:
            expected = Samples(rows)
        else:
            expected.commit(rows, 0.7)
        found = {key.split("/")[1]: value for key, value in optimizer.diagnostics().items()}
        count = expected.weights.sum() ** 2 / expected.weights.square().sum()
        assert found["samples"] == pytest.approx(count.item(), rel=10 * PRODUCT[torch.float64])
        damping = 0.2 * found["trace"] / min(40, count.item())
        assert found["damping"] == pytest.approx(damping, rel=10 * PRODUCT[torch.float64])
