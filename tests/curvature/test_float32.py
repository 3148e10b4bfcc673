"""How near float32 comes to float64 where inputs are on unlike scales: see docs/limits.md."""

import pytest
import torch
from tolerances import relative_error
from torch import nn

from gls_fused import GLS


@pytest.mark.parametrize(
    ("curvature", "damping", "most"),
    [
        ("subspace", 0.3, 0.005),
        ("subspace", 0.01, 0.03),
        ("dense", 0.3, 1e-5),
        ("dense", 0.01, 1e-4),
    ],
)
def test_least_squares_steps_of_float32(backend, curvature, damping, most):
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]
    scales = torch.logspace(0, -2, 64)
    batches = [
        (torch.randn(500, 64, generator=generator) * scales @ turn,
         torch.randn(500, 64, generator=generator))
        for _ in range(40)
    ]  # fmt: skip
    moved = []
    for dtype in (torch.float32, torch.float64):
        layer = nn.Linear(64, 64, bias=False, dtype=dtype)
        nn.init.zeros_(layer.weight)
        optimizer = GLS(
            *(layer, 1e-3), power=1, normalize="none", max_change=None, curvature_every=1,
            curvature=curvature, damping=damping, site="step", backend=backend,
        )  # fmt: skip
        for inputs, gradients in batches:
            optimizer.zero_grad()
            (layer(inputs.to(dtype)) * gradients.to(dtype)).sum().backward()
            optimizer.step()
        moved.append(layer.weight.detach())
    assert relative_error(*moved) < most
