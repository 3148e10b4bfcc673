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


def lay_otherwise(average):
    if average.dim() < 2:
        return average
    return average.T.contiguous().T if average.is_contiguous() else average.contiguous()


@pytest.mark.parametrize("normalize", ["factored", "row", "spectral", "auto", "rms", "none"])
def test_momentum_of_turned_weights(normalize):
    """It lies as the update takes it; one that lies otherwise, as in older states, goes on too."""
    model = nn.Sequential(Conv1D(5, 8), nn.Tanh(), Conv1D(8, 3)).double()
    optimizer = GLS(model, normalize=normalize, **OPTIONS)
    train(model, optimizer, range(3))
    average = optimizer.state[model[0].weight]["exp_avg"]
    assert average.shape == model[0].weight.shape
    outputs_first = normalize == "spectral"
    assert (average.T if outputs_first else average).is_contiguous()
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["exp_avg"] = lay_otherwise(state["exp_avg"])
    twin = copy.deepcopy(model)
    other = GLS(twin, normalize=normalize, **OPTIONS)
    other.load_state_dict(saved)
    found = train(twin, other, range(3, 6))
    for actual, expected in zip(found, train(model, optimizer, range(3, 6)), strict=True):
        assert_near(actual, expected, SAME_STEPS)
    taken = other.state[twin[0].weight]["exp_avg"]
    assert not (taken.T if outputs_first else taken).is_contiguous()
