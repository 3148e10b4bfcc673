"""The gate before any figure: that it passes, and refuses a wrong op."""

import pytest
from tiny import TINY

from benchmarks.workloads.gate import GateError, check_gls
from benchmarks.workloads.shapes import synthesise
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
