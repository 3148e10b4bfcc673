"""Adam's update of parameters that no layer owns."""

import copy

import pytest
import torch
from tolerances import PRODUCT, SAME_STEPS, assert_near
from torch import nn

from gls_fused import GLS


class Own(nn.Module):
    """Parameters that no layer owns, but for a head."""

    def __init__(self, covered):
        super().__init__()
        self.images = nn.Parameter(torch.randn(4, 3, 2, 2))
        self.table = nn.Parameter(torch.randn(5, 3))
        # Neither dense in memory.
        self.some = nn.Parameter(torch.randn(5, 6)[:, ::2])
        self.head = nn.Linear(3, 2) if covered else None

    def forward(self, step):
        rows = torch.sin(self.table + self.some + step) + self.images.mean((0, 2, 3))
        return (rows if self.head is None else self.head(rows)).square().mean()


def lay_out_otherwise(model):
    """Parameters in another order in memory, and no longer as their averages."""
    model.images.data = model.images.data.to(memory_format=torch.channels_last)
    model.table.data = model.table.data.t().contiguous().t()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("covered", [True, False])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_parameters_gradients_and_averages_may_lie_unlike(backend, momentum, covered, dtype):
    torch.manual_seed(0)
    first = Own(covered).to(dtype)
    found = []
    for otherwise in (False, True):
        model = copy.deepcopy(first)
        options = {"momentum": momentum, "weight_decay": 0.1, "low_precision": "master"}
        optimizer = GLS(model, lr=0.05, backend=backend, **options)
        for step in range(6):
            if otherwise and step == 2:
                lay_out_otherwise(model)
            optimizer.zero_grad()
            model(step).backward()
            if otherwise and step % 2:
                # As torch.autograd.grad may give it.
                model.table.grad = model.table.grad.t().contiguous().t()
                model.images.grad = model.images.grad.contiguous()
            optimizer.step()
        found.append(list(model.parameters()))
    tolerance = SAME_STEPS if dtype is torch.float64 else PRODUCT[dtype]
    for param, expected in zip(*reversed(found), strict=True):
        assert_near(param, expected, tolerance)
