"""What a layer keeps for its update."""

import copy

import pytest
import torch
from nets import OPTIONS, Conv1D
from tolerances import SAME_STEPS, assert_near
from torch import nn

from gls_fused import GLS


def train(model, optimizer, steps):
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(12, 5, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    return [param.detach().clone() for param in model.parameters()]


@pytest.mark.parametrize("normalize", ["factored", "spectral", "rms", "none"])
def test_momentum_of_turned_weights_lies_outputs_first(normalize):
    """As the update takes it; and one that lies otherwise, as earlier states', goes on as well."""
    model = nn.Sequential(Conv1D(5, 8), nn.Tanh(), Conv1D(8, 3)).double()
    optimizer = GLS(model, normalize=normalize, **OPTIONS)
    train(model, optimizer, range(3))
    average = optimizer.state[model[0].weight]["exp_avg"]
    assert average.shape == model[0].weight.shape
    assert average.T.is_contiguous()
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["exp_avg"] = state["exp_avg"].contiguous()
    twin = copy.deepcopy(model)
    other = GLS(twin, normalize=normalize, **OPTIONS)
    other.load_state_dict(saved)
    found = train(twin, other, range(3, 6))
    for actual, expected in zip(found, train(model, optimizer, range(3, 6)), strict=True):
        assert_near(actual, expected, SAME_STEPS)
    assert not other.state[twin[0].weight]["exp_avg"].T.is_contiguous()
