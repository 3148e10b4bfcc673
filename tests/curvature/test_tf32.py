"""What TF32 products of P do to training, and that the curvature has none.

Emulated here, on the CPU, as none of it needs a GPU.

The operands of the products of X P = X / lambda' + X U C U' are cut to TF32's 10 bits, which is
what tensor cores do with float32 ("tf32"), or split in two, of which three products are made
("tf32x3").
Inputs are centred, or three standard deviations off: then the mean's direction is damped most, and
D is a difference of large numbers along it.
"""

import threading

import pytest
import torch
from nets import loss_of, make_batch, make_net
from tolerances import PRODUCT, assert_near

from gls_fused import GLS, reference
from gls_fused.curvature import precision

STEPS = 30
MULTIPLY = reference.multiply_inverse


def cut(x, rounding=0):
    """float32 of 10 explicit bits; rounding 0x1000 takes the nearest."""
    return ((x.contiguous().view(torch.int32) + rounding) & ~0x1FFF).view(torch.float32)


def multiply_tf32(a, b):
    return cut(a) @ cut(b)


def multiply_tf32x3(a, b):
    large_a, large_b = cut(a, 0x1000), cut(b, 0x1000)
    small_a, small_b = cut(a - large_a, 0x1000), cut(b - large_b, 0x1000)
    return large_a @ large_b + (large_a @ small_b + small_a @ large_b)


def with_products(multiply):
    def multiply_inverse(matrix, inverse):
        basis, core_inverse, shift = inverse
        return matrix / shift + multiply(multiply(multiply(matrix, basis), core_inverse), basis.T)

    return multiply_inverse


def train(monkeypatch, kind, offset, multiply_inverse=MULTIPLY, dtype=torch.float32, seed=0):
    """The loss on 64 samples after every step towards a teacher, with GLS's defaults."""
    monkeypatch.setattr(reference, "multiply_inverse", multiply_inverse)
    model, teacher = make_net(kind).to(dtype), make_net(kind).to(dtype)
    with torch.no_grad():
        for param in teacher.parameters():
            noise = torch.randn(param.shape, generator=torch.Generator().manual_seed(param.numel()))
            param.add_(0.5 * noise.to(dtype))
    optimizer = GLS(model, lr=1e-2, rank=4, curvature_every=2, backend="reference")
    held = make_batch(kind, 64, seed=-1)[0].to(dtype) + offset
    losses = []
    for step in range(STEPS):
        inputs = make_batch(kind, 16, seed=step + STEPS * seed)[0].to(dtype) + offset
        optimizer.zero_grad()
        loss_of(model, (inputs, teacher(inputs).detach())).backward()
        optimizer.step()
        with torch.no_grad():
            losses.append(loss_of(model, (held, teacher(held))).double())
    return torch.stack(losses)


@pytest.mark.parametrize("offset", [0.0, 3.0])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_loss_curves(monkeypatch, kind, offset):
    """tf32x3 is no further from float32 than float32 is from float64; tf32 moves the curve by less
    than a quarter of what other batches of the same data do."""
    single = train(monkeypatch, kind, offset)

    def distance(**options):
        return float((train(monkeypatch, kind, offset, **options) - single).abs().mean())

    assert single[-1] < 0.8 * single[0]
    own = distance(dtype=torch.float64)
    other_batches = min(distance(seed=seed) for seed in (1, 2))
    split = distance(multiply_inverse=with_products(multiply_tf32x3))
    short = distance(multiply_inverse=with_products(multiply_tf32))
    # That P's products are replaced at all, the last line shows.
    assert split <= own
    assert own < short <= other_batches / 4


@pytest.fixture
def allowed():
    """The precision of float32 products, which is bfloat16's on CPUs that have it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(before)


def precisions():
    """Of float32 products, by device."""
    return {owner.fp32_precision for owner in precision._OWNERS}


def test_statistics_are_float32s_own_whatever_the_user_allows(monkeypatch, allowed):
    seen = {}

    def watched(name, op):
        def run(*arguments, **options):
            seen.setdefault(name, set()).update(precisions())
            return op(*arguments, **options)

        return run

    names = ["sketch_rows", "sum_gram", "blend_subspaces", "refresh_subspaces"]
    names += ["invert_cores", "invert_gram"]
    for name in names:
        monkeypatch.setattr(reference, name, watched(name, getattr(reference, name)))
    for curvature in ("subspace", "dense"):
        model = make_net("cnn")
        optimizer = GLS(model, curvature=curvature, curvature_every=1, backend="reference")
        for step in range(2):
            optimizer.zero_grad()
            loss_of(model, make_batch("cnn", 5, step)).backward()
            optimizer.step()
    assert seen.keys() == set(names)
    assert set.union(*seen.values()) == {"ieee"}
    assert torch.get_float32_matmul_precision() == allowed
    assert "ieee" not in precisions()


def test_sketches_are_float32s_own_on_every_backend(allowed, backend):
    """Also on CPUs whose products in "medium" are bfloat16's, three digits off."""
    model = torch.nn.Linear(300, 64, bias=False)
    optimizer = GLS(model, backend=backend)
    (layer,) = optimizer._preconditioner.layers
    rows = torch.randn(500, 300, generator=torch.Generator().manual_seed(0))
    model(rows).sum().backward()
    core, sketch, trace = reference.sketch_rows(
        rows.double(), layer.test_matrix.double(), ones=False
    )
    exact = torch.cat([torch.tensor([500.0, trace]), core.flatten(), sketch.T.flatten()])
    assert_near(layer.sums, exact, PRODUCT[torch.float32])


def test_threads_leave_the_users_setting(allowed):
    """Who comes in second finds what the first one has set, and leaves after it."""
    inside, leave = threading.Event(), threading.Event()
    before = precisions()

    def first():
        with precision.without_tf32():
            inside.set()
            assert leave.wait(60)

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(60)
    with precision.without_tf32():
        leave.set()
        thread.join()
        assert precisions() == {"ieee"}
    assert precisions() == before != {"ieee"}
