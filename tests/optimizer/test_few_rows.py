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


@pytest.mark.parametrize("normalize", ["factored", "adam"])
@pytest.mark.parametrize("power", [1, 0.75, 0.5, 0.25])
def test_dense_curvature_mixes_nothing_into_an_input_that_is_always_zero(backend, power, normalize):
    """Rounding of eigenvectors would, and the scales per input make steps of it."""
    torch.manual_seed(0)
    model = nn.Linear(40, 9)
    before = model.weight.detach().clone()
    optimizer = GLS(
        model, curvature="dense", power=power, normalize=normalize, curvature_every=2,
        backend=backend, max_change=None,
    )  # fmt: skip
    for step in range(12):
        inputs = torch.randn(30, 40)
        inputs[:, ::4] = 0
        optimizer.zero_grad()
        (1000 * (model(inputs) - step).square().mean()).backward()
        assert not model.weight.grad[:, ::4].any()
        optimizer.step()
    moved = model.weight.detach() != before
    assert not moved[:, ::4].any()
    assert moved[:, 1::4].all()


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


# What the first rows show of the inputs: nothing but the bias's one, or some numbers.
FEW = {
    "zeros": torch.zeros,
    "a constant": lambda rows, dim: F.pad(torch.ones(rows, 1), (0, dim - 1)),
    "three": lambda rows, dim: F.pad(torch.randn(rows, 3), (0, dim - 3)),
    "one row": lambda rows, dim: torch.randn(1, dim).expand(rows, dim),
    "three one-hot": lambda rows, dim: F.one_hot(torch.randint(3, (rows,)), dim),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", FEW)
def test_first_rows_may_show_fewer_inputs_than_there_are_directions(backend, kind, dtype):
    """As behind a layer of zeros, or of dead units: all of Sigma is in a few directions then."""
    for seed, (dim, outputs, rows) in enumerate(
        [(16, 10, 300), (20, 6, 1024), (20, 8, 1000), (100, 32, 512), (12, 12, 64)]
    ):
        torch.manual_seed(seed)
        layer = nn.Linear(dim, outputs).to(dtype)
        optimizer = GLS(layer, backend=backend, lr=1e-3)
        inputs = FEW[kind](rows, dim).to(dtype)
        layer(inputs).square().sum().backward()
        optimizer.step()
        assert layer.weight.isfinite().all()
        state = optimizer.state[layer.weight]
        found = state["basis"] @ state["core"] @ state["basis"].T
        sample = torch.cat([inputs, inputs.new_ones(rows, 1)], dim=1)
        # A 256th of the mean eigenvalue is added on the way and taken off again.
        assert_near(found, sample.T @ sample / rows, 2e-3)


@pytest.mark.parametrize("damping", [1e-2, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_little_damping_stands_few_inputs(backend, dtype, damping):
    """No direction that the first rows do not show has less than none of Sigma."""
    for shown in (0, 2, 8):
        torch.manual_seed(0)
        layer = nn.Linear(16, 8).to(dtype)
        optimizer = GLS(layer, backend=backend, damping=damping, curvature_every=1)
        for step in range(4):
            inputs = torch.randn(64, 16, dtype=dtype) * torch.logspace(0, 2, 16, dtype=dtype)
            if step == 0:
                inputs[:, shown:] = 0
            optimizer.zero_grad()
            layer(inputs).square().mean().backward()
            optimizer.step()
            state = optimizer.state[layer.weight]
            least = torch.linalg.eigvalsh(state["core"])[0]
            assert least >= -100 * torch.finfo(dtype).eps * state["trace"]
        assert layer.weight.isfinite().all()
