"""A whole run of GLS in the interpreter, against the reference, and who gets the backend."""

import pytest
import torch
from nets import loss_of, make_batch, make_net, snapshot
from tolerances import relative_error

from gls_fused import GLS, available_backends, reference
from gls_fused.backends.dispatch import resolve_backend

STEPS = 10


def train(kind, backend, dtype=torch.float32, *, compiles=False, **options):
    model = make_net(kind).to(dtype)
    optimizer = GLS(model, lr=1e-2, rank=4, curvature_every=2, backend=backend, **options)
    if compiles:
        torch._dynamo.reset()
        model = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in range(STEPS):
        batch = [x.to(dtype) for x in make_batch(kind, 12, seed=step)]
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    return torch.cat([p.double().flatten() for p in snapshot(model)])


@pytest.mark.parametrize("normalize", ["rms", "adam", "sgd", "none"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_ten_steps(kind, normalize):
    """No further from the float64 trajectory than a few times the reference in float32 is."""
    start = torch.cat([p.double().flatten() for p in snapshot(make_net(kind))])
    exact = train(kind, "reference", torch.float64, normalize=normalize) - start
    single = train(kind, "reference", normalize=normalize) - start
    found = train(kind, "triton", normalize=normalize) - start
    allowed = max(5 * relative_error(single, exact), 1e-4)
    assert relative_error(found, exact) <= allowed
    assert exact.norm() > 0.01


@pytest.mark.parametrize("site", ["step", "backward"])
def test_both_sites(site):
    found = train("mlp", "triton", site=site)
    assert relative_error(found, train("mlp", "reference", site=site)) <= 1e-4


@pytest.mark.parametrize(
    ("kind", "site"),
    [
        ("mlp", "step"),
        pytest.param("mlp", "backward", marks=pytest.mark.slow),
        pytest.param("cnn", "auto", marks=pytest.mark.slow),
    ],
)
def test_each_backend_reads_what_the_other_wrote(kind, site):
    """Mixed, ops of one run are of both."""
    if (why := available_backends()["native"]) is not None:
        pytest.skip(why)
    found = train(kind, "mixed", site=site)
    assert relative_error(found, train(kind, "reference", site=site)) <= 1e-4


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("site", ["step", "backward"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_compiled_model(kind, site):
    """The kernels are ops of the compiled graphs."""
    compiled = train(kind, "triton", site=site, compiles=True)
    assert torch.equal(compiled, train(kind, "triton", site=site))


def test_interpreted_backend_is_for_who_asks():
    assert available_backends()["triton"] is None
    assert resolve_backend("triton", ["cpu"]).__name__ == "gls_fused.backends.triton"
    for devices in (["cpu"], []):
        assert resolve_backend("auto", devices).__name__ != "gls_fused.backends.triton"
    assert resolve_backend("auto", ["cuda"]).__name__ == "gls_fused.backends.triton"
    assert resolve_backend("auto", ["meta"]) is reference


def test_report_says_whose_ops_are_whose():
    if (why := available_backends()["native"]) is not None:
        pytest.skip(why)
    optimizer = GLS(make_net("mlp"), backend="mixed")
    assert "backend triton, native for " in optimizer.report()
