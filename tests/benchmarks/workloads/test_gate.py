"""The gate before any figure: that it passes, and refuses a wrong op."""

import copy

import pytest
import torch
from tiny import TINY
from torch import nn

from benchmarks.workloads.gate import LEAST_ALLOWED, GateError, check_gls
from benchmarks.workloads.shapes import synthesise
from benchmarks.workloads.tasks import Task
from gls_fused.backends import factors
from gls_fused.backends.dispatch import resolve_backend


def test_the_gate_passes_and_refuses_a_corrupted_op(monkeypatch):
    data = synthesise((3, 32, 32), 256)
    for options in ({}, {"momentum": 0.0}):
        verdict = check_gls(TINY, data, 32, **options)
        assert verdict.double < 1e-12
        assert 0 < verdict.single <= verdict.allowed
    backend = resolve_backend("auto", {"cpu"})
    if backend is resolve_backend("reference", {"cpu"}):
        pytest.skip("the native backend is not available")
    for op, corrupt in (
        ("update_layers_", lambda update: lambda *a, **k: update(*a, **{**k, "lr": 1.0001e-3})),
        ("invert_cores", lambda invert: lambda *a: [(1.01 * c, s) for c, s in invert(*a)]),
        (
            "refresh_subspaces",
            lambda _: lambda cores, sketches: list(zip(sketches, cores, strict=True)),
        ),
        ("update_layers_", lambda update: lambda *a, **k: update(*a[:5], [None] * len(a[4]), **k)),
        ("update_layers_", lambda _: lambda params, *a, **k: params[0].fill_(float("nan"))),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(backend, op, corrupt(getattr(backend, op)))
            with pytest.raises(GateError, match="nothing is reported"):
                check_gls(TINY, data, 32)


def test_orthogonal_factors_may_be_as_coarse_as_they_are_on_a_gpu(monkeypatch):
    """Emulated on the CPU: both sides' products in bfloat16."""
    monkeypatch.setattr(
        factors,
        "factor_dtype",
        lambda x: x.dtype if x.dtype == torch.float64 else torch.bfloat16,
    )
    layers = nn.Sequential(
        nn.Flatten(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 10)
    )
    task = Task("square", "Square", True, lambda _: copy.deepcopy(layers))
    # So many rows that a hidden layer of width 16 takes orthogonal steps.
    verdict = check_gls(task, synthesise((1, 4, 4), 1024), 256)
    assert verdict.allowed > LEAST_ALLOWED
    assert verdict.double < 1e-12
