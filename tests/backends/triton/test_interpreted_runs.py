"""A whole run of GLS in the interpreter, against the reference, and who gets the backend."""

import functools
import inspect
import itertools

import pytest
import torch
from aot import MODULES
from nets import loss_of, make_batch, make_net, snapshot
from tolerances import relative_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from gls_fused import GLS, available_backends, reference
from gls_fused.backends import triton
from gls_fused.backends.dispatch import build_info, resolve_backend

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


def each(quick, others):
    """Quick ones, and others that are of the same kind, each of which takes many seconds."""
    return [*quick, *(pytest.param(*values, marks=pytest.mark.slow) for values in others)]


@pytest.mark.parametrize(
    ("kind", "normalize"),
    each(
        [("cnn", "rms"), ("cnn", "none"), ("mlp", "adam"), ("mlp", "sgd")],
        [("mlp", "rms"), ("mlp", "none"), ("cnn", "adam"), ("cnn", "sgd")],
    ),
)
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
@pytest.mark.parametrize(
    ("kind", "site"),
    each([("cnn", "step"), ("mlp", "backward")], [("mlp", "step"), ("cnn", "backward")]),
)
def test_compiled_model(kind, site):
    """The kernels are ops of the compiled graphs."""
    compiled = train(kind, "triton", site=site, compiles=True)
    assert torch.equal(compiled, train(kind, "triton", site=site))


def test_interpreted_backend_is_for_who_asks():
    assert available_backends()["triton"] is None
    assert resolve_backend("triton", ["cpu"]).__name__ == "gls_fused.backends.triton"
    for devices in (["cpu"], []):
        assert resolve_backend("auto", devices).__name__ != "gls_fused.backends.triton"
    # With the C++ kernels built for CUDA there is a choice for every op.
    has_native = available_backends()["native"] is None and build_info()["cuda"]
    name = "mixed" if has_native else "triton"
    assert resolve_backend("auto", ["cuda"]).__name__ == f"gls_fused.backends.{name}"
    assert resolve_backend("auto", ["meta"]) is reference


def test_report_says_whose_ops_are_whose():
    if (why := available_backends()["native"]) is not None:
        pytest.skip(why)
    optimizer = GLS(make_net("mlp"), backend="mixed")
    assert "backend triton, native for " in optimizer.report()


class CountedOps(TorchDispatchMode):
    """Names of torch's ops that are launches on a GPU, but for tables that are uploaded."""

    # The tests fill new memory with NaN; the number of the next sample is filled in, too.
    others = ("empty", "new_empty", "lift_fresh", "detach", "profiler", "promote_types", "fill_")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op._schema.name.removeprefix("aten::")
        if not (op.is_view or name.startswith(self.others)):
            self.names.append(name)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [2, 4])
def test_launches_of_a_step(monkeypatch, layers, dtype):
    """Of layers of two ranks and a norm: four, and two a layer and four more where it gathers.

    In 16 bits layers and norm are copied and rounded, which is three more of each.
    """
    launches = []

    def record(kernel, *arguments, do, **named):
        launches.append(kernel)
        # What the interpreter does is no launch.
        with _disable_current_modes():
            do(kernel, *arguments, **named)

    for module in MODULES:
        monkeypatch.setattr(module, "launch", functools.partial(record, do=module.launch))
    widths = [4, 17, 5, 6, 4][: layers + 1]
    parts = [nn.Linear(*pair) for pair in itertools.pairwise(widths)]
    model = nn.Sequential(*parts, nn.LayerNorm(widths[-1])).to(dtype)
    options = {"site": "step", "curvature_every": 2, "normalize": "factored"}
    optimizer = GLS(model, backend="triton", **options)
    counts = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(torch.randn(6, 4, dtype=dtype)).square().mean()
        launches.clear()
        loss.backward()
        gathered = len(launches)
        # Which a CPU alone keeps.
        for alike in itertools.chain.from_iterable(
            k.alike for k in optimizer._followed.kept.values()
        ):
            alike._rates = None
        with CountedOps() as ops:
            optimizer.step()
        counts.append((gathered, len(launches) - gathered, ops.names))
    # Torch's two make the bounds of the layers' rates; four more count where they hold.
    bounds, held = ["stack", "mul_"], ["mul", "lt", "_to_copy", "_foreach_lerp_"]
    low = dtype == torch.bfloat16
    # Of parameters and of gradients; roundings are launches of ours.
    copies = ["_foreach_copy_"] * 2 * low
    assert counts[3] == (0, 4 + 2 * low, [*copies, *bounds, *copies])
    assert counts[4] == (2 * layers, 8 + 2 * low, [*copies, *bounds, *held, *copies])


def test_ops_have_the_reference_signatures():
    own = {"commit_subspaces_", "commits", "measure_layers_", "sum_images", "sum_rows"}
    for name in set(triton.__all__) - own - {"TAKES_OTHERS", "update_spectral_layers_"}:
        found, expected = (inspect.signature(getattr(m, name)) for m in (triton, reference))
        assert found.parameters == expected.parameters, name
