"""Real models: how much of them has a P, how they train beside AdamW, how they resume."""

import copy
import functools
import os
import warnings
from dataclasses import dataclass

import pytest
import small_models
import torch
from nets import assert_equal, assert_same_state, snapshot

from gls_fused import GLS

os.environ.setdefault("HF_HUB_OFFLINE", "1")
STEPS, CUT = 20, 10
RATE = 1e-3


@dataclass(frozen=True)
class Case:
    """What is expected of a model.

    Attributes:
        package: that it needs.
        share: of the trained parameters, in layers with a P once it trains; at least.
    """

    package: str
    share: float
    slow: bool = False


CASES = {
    "gpt2": Case("transformers", 0.97),
    "llama": Case("transformers", 0.90),
    "mixtral": Case("transformers", 0.95),
    "bert": Case("transformers", 0.95),
    "t5": Case("transformers", 0.98),
    "vit_torchvision": Case("torchvision", 0.95),
    "vit_timm": Case("timm", 0.95),
    "swin_torchvision": Case("torchvision", 0.95),
    "swin_timm": Case("timm", 0.95, slow=True),
    "resnext": Case("timm", 0.97),
    "efficientnet": Case("torchvision", 0.94),
    "unet": Case("torch", 0.98),
    "gcn": Case("torch_geometric", 0.95),
    "lora": Case("peft", 1.0),
    "dora": Case("peft", 0.91),
    "transformer": Case("torch", 0.94),
    "lstm": Case("torch", 0.93),
}


def of_each():
    """Parametrizes a test by the models."""
    params = []
    for name, case in CASES.items():
        marks = [pytest.mark.slow] if case.slow else []
        params.append(pytest.param(name, marks=marks))
    return pytest.mark.parametrize("name", params)


def build(name, seed=0):
    """A model and its loss."""
    pytest.importorskip(CASES[name].package)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        # What packages deprecate is not ours to mend.
        warnings.simplefilter("ignore")
        return getattr(small_models, name)()


def train(model, loss_of, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


@functools.cache
def trained(name):
    """Model, optimizer and last loss of a run with GLS, and the states at its cut."""
    model, loss_of = build(name)
    optimizer = GLS(model, lr=RATE)
    train(model, loss_of, optimizer, CUT)
    states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, loss_of, optimizer, STEPS - CUT)
    loss = loss_of(model).item()
    return model, optimizer, loss, states


@of_each()
def test_share_with_a_preconditioner(name):
    model, optimizer, _, _ = trained(name)
    wanted = {param for param in model.parameters() if param.requires_grad}
    layers = optimizer._preconditioner.layers
    found = {param for layer in layers for param in layer.params}
    reported = {uncovered.param for uncovered in optimizer._membership.uncovered}
    assert wanted <= found ^ reported
    # A layer that is found and not called has no P.
    covered = wanted & {
        param for layer in layers if layer.inverse is not None for param in layer.params
    }
    share = sum(p.numel() for p in covered) / sum(p.numel() for p in wanted)
    assert share >= CASES[name].share


@of_each()
def test_twenty_steps_on_one_batch_are_no_worse_than_adamws(name):
    model, loss_of = build(name)
    start = loss_of(model).item()
    train(model, loss_of, torch.optim.AdamW(model.parameters(), lr=RATE), STEPS)
    loss = loss_of(model).item()
    assert loss < start
    assert trained(name)[2] <= loss


@of_each()
def test_resumes_bit_for_bit(name):
    whole, its_optimizer, _, (weights, state) = trained(name)
    model, loss_of = build(name, seed=1)
    optimizer = GLS(model, lr=RATE)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    train(model, loss_of, optimizer, STEPS - CUT)
    assert_equal(snapshot(model), snapshot(whole))
    assert_same_state(optimizer.state_dict(), its_optimizer.state_dict())
