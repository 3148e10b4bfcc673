"""Muon in float32, for CPUs that emulate bfloat16: it is torch's up to the rounding of bfloat16."""

import pytest
import torch
from torch import nn

from benchmarks.workloads.optimizers import OPTIMIZERS, Float32Muon

# bfloat16 has 8 bits; five iterations of three products, each of which rounds.
BFLOAT16_ERROR = 0.03


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_float32_muon_takes_the_step_of_torchs(shape):
    steps = []
    for muon in (torch.optim.Muon, Float32Muon):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.zeros(shape))
        optimizer = muon([weight], lr=1.0, adjust_lr_fn="match_rms_adamw")
        for _ in range(3):
            weight.grad = torch.randn(shape)
            optimizer.step()
        steps.append(weight.detach())
    assert steps[1].norm() > 1
    assert (steps[0] - steps[1]).norm() < BFLOAT16_ERROR * steps[0].norm()


@pytest.mark.parametrize("native", [True, False])
def test_iteration_is_float32_only_where_bfloat16_takes_longer(monkeypatch, native):
    monkeypatch.setattr(
        torch.cpu,
        "get_capabilities",
        lambda: {"amx_bf16": native, "avx512_bf16": True},
        raising=False,
    )
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    muon, _ = OPTIMIZERS["muon"].build(model, 1e-3, {}).optimizers
    assert type(muon) is (torch.optim.Muon if native else Float32Muon)
