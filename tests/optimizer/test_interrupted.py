"""Errors and interrupts inside of GLS's own work, as where memory runs out, leave no trace."""

import gc
import inspect
import io
import sys

import pytest
import torch
from nets import assert_equal, snapshot
from torch import nn

from gls_fused import GLS, attach, preconditioner
from gls_fused.capture.layer import Layer
from gls_fused.capture.modules import is_captured
from gls_fused.curvature import precision

FULL = torch.OutOfMemoryError("no memory")


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def train(model, optimizer, seeds):
    for seed in seeds:
        inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()
    return snapshot(model)


def fail_at(call, monkeypatch, owner, name):
    """Have the n-th call of a function raise; those before and after it are its own."""
    count, plain = [0], getattr(owner, name)

    def fail(*args, **kwargs):
        count[0] += 1
        if count[0] == call:
            raise FULL
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize("build", [GLS, attach])
def test_a_model_is_plain_where_its_capture_failed(build, monkeypatch):
    model = make_model()
    fail_at(2, monkeypatch, Layer, "begin")
    with pytest.raises(torch.OutOfMemoryError):
        build(model)
    gc.collect()
    assert not any(is_captured(type(module)) for module in model)
    assert not any("gls" in key for part in (*model, *model.parameters()) for key in vars(part))


def test_a_group_that_could_not_be_covered_can_be_added_again(monkeypatch):
    found = []
    for fails in (False, True):
        model = make_model()
        optimizer = GLS(list(model[0].parameters()), model=model)
        train(model, optimizer, range(2))
        group = {"params": list(model[2].parameters())}
        if fails:
            fail_at(1, monkeypatch, Layer, "begin")
            with pytest.raises(torch.OutOfMemoryError):
                optimizer.add_param_group(group)
            assert len(optimizer.param_groups) == 1
        optimizer.add_param_group(group)
        found.append((train(model, optimizer, range(2, 6)), optimizer.report()))
    assert_equal(found[1][0], found[0][0])
    assert found[1][1] == found[0][1]


@pytest.mark.parametrize("curvature", ["subspace", "dense"])
def test_a_first_step_that_failed_leaves_nothing_of_the_statistics(curvature, monkeypatch):
    model = make_model()
    optimizer = GLS(model, curvature=curvature)
    fail_at(1, monkeypatch, preconditioner, "settle")
    with pytest.raises(torch.OutOfMemoryError):
        train(model, optimizer, [0])
    assert "no rows yet" in optimizer.report()
    assert optimizer.diagnostics() == {}
    GLS(make_model(), curvature=curvature).load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(3))
    assert "6 rows" in optimizer.report()


@pytest.fixture
def tf32():
    before = [owner.fp32_precision for owner in precision._OWNERS]
    for owner in precision._OWNERS:
        owner.fp32_precision = "tf32"
    yield
    for owner, value in zip(precision._OWNERS, before, strict=True):
        owner.fp32_precision = value


def test_an_interrupt_leaves_torchs_precision_as_it_was(tf32):
    """At each line of what sets it."""
    function = precision.without_tf32.__wrapped__
    source, first = inspect.getsourcelines(function)
    places = {first + place for place, line in enumerate(source) if line.strip() == "yield"}
    lines = {line for *_, line in function.__code__.co_lines() if line}
    interrupted, code = 0, function.__code__
    for line in sorted(line for line in lines if first + 1 < line <= min(places)):

        def trace(frame, event, _, line=line):
            if event == "line" and frame.f_lineno == line:
                raise KeyboardInterrupt
            return trace

        earlier = sys.gettrace()
        sys.settrace(lambda frame, *_, trace=trace: trace if frame.f_code is code else None)
        try:
            with precision.without_tf32():
                pass
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(earlier)
        assert [owner.fp32_precision for owner in precision._OWNERS] == ["tf32"] * 2
        assert precision._Inside.count == 0
    assert interrupted > 5


@pytest.mark.parametrize(
    ("name", "value"),
    [("spectral_share", None), ("split", 0), ("normalize", "l2"), ("beta2", 1.0), ("lr", "x")],
)
@pytest.mark.parametrize("ask", ["report", "diagnostics", "__repr__", "state_dict"])
def test_what_is_asked_of_a_bad_option_names_it(ask, name, value):
    model = make_model()
    optimizer = GLS(model)
    train(model, optimizer, range(2))
    optimizer.param_groups[0][name] = value
    with pytest.raises((ValueError, TypeError), match=rf"^{name}: expected .*, got '?{value}"):
        getattr(optimizer, ask)()
    optimizer.param_groups[0][name] = optimizer.defaults[name]
    state = io.BytesIO()
    torch.save(optimizer.state_dict(), state)
