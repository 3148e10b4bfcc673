"""What a captured module computes and counts, its copies, and what removal leaves."""

import copy
import io
import pickle

import pytest
import torch
from nets import KINDS, assert_equal, gradients, loss_of, make_batch, make_net, snapshot
from tolerances import PRODUCT, SAME_STEPS, SOLVE, assert_near, relative_error
from torch import nn
from torch.nn import functional as F

from gls_fused import GLS
from gls_fused.capture.rows import take_sample

EVERY_STEP = {"rank": 4, "curvature_every": 1}


def train(model, optimizer, kind, steps, start=0):
    for step in range(start, start + steps):
        loss_of(model, make_batch(kind, 5, step)).backward()
        optimizer.step()
        optimizer.zero_grad()


# ---- outputs and gradients -----------------------------------------------------------------------


def compare_with_plain(model, inputs, **options):
    """Outputs, their strides, and all gradients at step 0, with and without capture."""
    found = []
    for captured in (False, True):
        model.zero_grad()
        given = inputs.detach().requires_grad_()
        optimizer = GLS(model, **options) if captured else None
        outputs = model(given)
        weights = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype)
        (outputs * weights.view(outputs.shape)).sum().backward()
        found.append([outputs, given.grad, *gradients(model)])
        if optimizer is not None:
            optimizer.detach()
    plain, ours = found
    assert ours[0].stride() == plain[0].stride()
    for actual, expected in zip(ours, plain, strict=True):
        assert actual.dtype == expected.dtype
        assert_near(actual, expected, PRODUCT[expected.dtype])


@pytest.mark.parametrize("site", ["step", "backward"])
@pytest.mark.parametrize("padding", [0, (2, 1), "same", "valid"])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
# torch's own remark on the uncaptured module.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_padding_of_convolutions(backend, mode, padding, site):
    torch.manual_seed(0)
    kernels = [(3, 3), (2, 3), (2,), (3,), (2, 3, 1)]
    for kernel, dilation in [*((kernel, 1) for kernel in kernels), ((3, 2), 2), ((3, 2, 1), 2)]:
        dims = len(kernel)
        own = (2, 1, 1)[:dims] if isinstance(padding, tuple) else padding
        options = {"padding": own, "padding_mode": mode, "dilation": dilation}
        model = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](2, 3, kernel, **options).double()
        for leading in ((2, 2), (2,)):
            images = torch.randn(*leading, *(7, 6, 5)[:dims], dtype=torch.float64)
            compare_with_plain(model, images, site=site, backend=backend)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride", [1, (2, 3)])
@pytest.mark.parametrize("dilation", [1, (1, 2)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_geometry_of_convolutions(backend, stride, dilation, bias, layout):
    torch.manual_seed(0)
    options = {"stride": stride, "dilation": dilation, "bias": bias, "padding": 1}
    model = nn.Conv2d(4, 3, (3, 2), **options).double()
    images = torch.randn(2, 4, 8, 7, dtype=torch.float64)
    if layout == "channels_last":
        model = model.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        images = images.transpose(2, 3)
    compare_with_plain(model, images, backend=backend)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (5,), (1,), (0,), (2, 5), (2, 0), (2, 3, 5)])
def test_leading_dimensions_of_linear(backend, shape, bias):
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=bias).double()
    compare_with_plain(model, torch.randn(*shape, 4, dtype=torch.float64), backend=backend)


def test_strided_inputs_of_linear(backend):
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    for inputs in (
        torch.randn(4, 5).T,
        torch.randn(4, 5, 2).permute(2, 1, 0),
        torch.randn(2, 4, 5).mT,
        torch.randn(4).expand(3, 4),
        torch.randn(10, 4)[::2],
        torch.randn(5, 8)[:, ::2],
    ):
        compare_with_plain(model, inputs.double(), backend=backend)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 5, 4)])
def test_output_of_linear_modified_in_place(backend, shape, bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=bias), nn.ReLU(inplace=True)).double()
    compare_with_plain(model, torch.randn(shape, dtype=torch.float64), backend=backend)


@pytest.mark.parametrize("shape", [(2, 5, 5), (3, 2, 5, 5)])
def test_output_of_convolution_modified_in_place(backend, shape):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(inplace=True)).double()
    compare_with_plain(model, torch.randn(shape, dtype=torch.float64), backend=backend)


@pytest.mark.parametrize("kind", KINDS)
def test_strided_output_gradients(backend, kind):
    """Gradients that arrive expanded (from a sum) or transposed."""
    model = make_net(kind)
    inputs, _ = make_batch(kind, 5, 0)
    transform = torch.randn(5, 5, dtype=torch.float64)
    for reduce in (torch.sum, lambda y: (y.T @ transform).sum(), lambda y: y[::2, 1].sum()):
        expected = torch.autograd.grad(reduce(model(inputs)), list(model.parameters()))
        with GLS(model, backend=backend):
            found = torch.autograd.grad(reduce(model(inputs)), list(model.parameters()))
        for actual, wanted in zip(found, expected, strict=True):
            assert_near(actual, wanted, PRODUCT[torch.float64])


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_penalty_at_the_step_site(backend, kind):
    """A second derivative, the same as without capture."""
    found = []
    for captured in (False, True):
        model = make_net(kind)
        optimizer = GLS(model, site="step", backend=backend) if captured else None
        inputs, targets = make_batch(kind, 5, 1)
        inputs.requires_grad_()
        loss = loss_of(model, (inputs, targets))
        (gradient,) = torch.autograd.grad(loss, inputs, create_graph=True)
        (loss + gradient.square().sum()).backward()
        found.append(gradients(model))
        if optimizer is not None:
            optimizer.step()
    for actual, expected in zip(*reversed(found), strict=True):
        assert_near(actual, expected, SAME_STEPS)


@pytest.mark.parametrize("site", ["step", "backward"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_under_autocast(backend, kind, site):
    """The first step's values are those without capture; the parameters stay in float32."""
    found = []
    for captured in (False, True):
        model = make_net(kind).float()
        inputs, targets = (x.float() for x in make_batch(kind, 5, 0))
        options = {"site": site, "backend": backend, **EVERY_STEP}
        optimizer = GLS(model, **options) if captured else torch.optim.SGD(model.parameters())
        for step in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                outputs = model(inputs)
            F.mse_loss(outputs.float(), targets).backward()
            if step == 0:
                found.append([outputs, *gradients(model)])
            optimizer.step()
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    for actual, expected in zip(*reversed(found), strict=True):
        assert actual.dtype == expected.dtype
        assert_near(actual, expected, PRODUCT[torch.bfloat16])


@pytest.mark.parametrize("curvature", ["dense", "subspace"])
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_a_backward_under_autocast(backend, kind, curvature):
    """They are those of one outside, in float32."""
    found = []
    for inside in (False, True):
        model = make_net(kind).float()
        optimizer = GLS(model, curvature=curvature, backend=backend, **EVERY_STEP)
        inputs, targets = (x.float() for x in make_batch(kind, 5, 0))
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.mse_loss(model(inputs).float(), targets)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        optimizer.step()
        key = "gram" if curvature == "dense" else "core"
        found.append([optimizer.state[p][key] for p in model.parameters() if p.ndim > 1])
    for outside, inside in zip(*found, strict=True):
        assert_near(inside, outside, PRODUCT[torch.float32])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("curvature", [{"curvature": "dense"}, {"rank": 100}])
@pytest.mark.parametrize("site", ["step", "backward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_of_any_dtype(backend, kind, dtype, site, curvature, momentum):
    """Close to float64, as close as the rounding of the weights at each step allows."""
    found = []
    options = {"lr": 0.05, "site": site, "backend": backend, "momentum": momentum, **curvature}
    options |= {"power": 1, "normalize": "rms", "max_change": None}
    # The core of a subspace comes from a solve at the start, and one more per commit before the
    # last step, in float32 at least.
    tolerance = 3 * PRODUCT[dtype] + 2 * SOLVE[torch.float32] * ("rank" in curvature)
    for chosen in (torch.float64, dtype):
        model = make_net(kind).to(dtype).to(chosen)
        start = snapshot(model)
        optimizer = GLS(model, curvature_every=1, **options)
        for step in range(3):
            inputs, targets = (x.to(dtype).to(chosen) for x in make_batch(kind, 5, step))
            loss_of(model, (inputs, targets)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(p.dtype == chosen for p in model.parameters())
        found.append(snapshot(model))
    for actual, expected, before in zip(found[1], found[0], start, strict=True):
        assert_near(actual, expected, tolerance)
        assert relative_error(before, expected) > tolerance


def test_functional_call_uses_the_given_weights():
    model = make_net("mlp")
    inputs, _ = make_batch("mlp", 5, 0)
    other = {name: p.detach() + 1 for name, p in model.named_parameters()}
    expected = torch.func.functional_call(model, other, inputs)
    with GLS(model):
        assert_near(torch.func.functional_call(model, other, inputs), expected, SAME_STEPS)


def test_hooks_of_the_module_still_run():
    model = nn.Linear(3, 2)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.register_forward_hook(lambda *_: calls.append("after"))
    with GLS(model):
        model(torch.randn(4, 3)).sum().backward()
        model(input=torch.randn(4, 3))
    assert calls == ["before", "after"] * 2


# ---- rows ----------------------------------------------------------------------------------------


def rows_of_first_step(optimizer, model):
    optimizer.step()
    layers = (model.stem, model.first, model.second, model.head)
    return [optimizer.state[layer.weight]["rows"] for layer in layers]


def test_rows_of_calls_and_micro_batches_add_up(backend):
    model = make_net("mlp")
    model.repeats = 2
    optimizer = GLS(model, backend=backend)
    for n in (5, 3):
        loss_of(model, make_batch("mlp", n, n)).backward()
    assert rows_of_first_step(optimizer, model) == [8, 16, 8, 8]


@pytest.mark.parametrize("recompute", ["reentrant", "saved"])
def test_rows_count_once_under_checkpointing(backend, recompute):
    model = make_net("mlp", recompute=recompute)
    optimizer = GLS(model, backend=backend)
    loss_of(model, make_batch("mlp", 5, 0)).backward()
    assert rows_of_first_step(optimizer, model) == [5] * 4


@pytest.mark.parametrize("images", [3, 16, 17, 40])
@pytest.mark.parametrize("curvature", ["dense", "subspace"])
def test_few_images_of_a_batch_count(backend, curvature, images):
    model = nn.Conv2d(2, 3, 3)
    optimizer = GLS(model, curvature=curvature, backend=backend)
    model(torch.randn(images, 2, 5, 6)).sum().backward()
    optimizer.step()
    assert optimizer.state[model.weight]["rows"] == images * 3 * 4


@pytest.mark.parametrize("count", [1024, 1025, 3000])
@pytest.mark.parametrize("curvature", ["dense", "subspace"])
def test_some_rows_stand_for_all(backend, curvature, count):
    """Weighted by how many each stands for, beside a backward pass in which all count."""
    model = nn.Linear(3, 4).double()
    optimizer = GLS(model, rank=4, curvature=curvature, backend=backend)
    many, few = (torch.randn(n, 3, dtype=torch.float64) * n for n in (count, 7))
    for rows in (many, few):
        model(rows).sum().backward()
    optimizer.step()
    sample, weight = take_sample(many, 1024, 0)
    weights = torch.tensor([weight] * len(sample) + [1] * len(few)).double()
    rows = torch.cat([torch.cat([sample, few]), torch.ones(len(weights), 1)], 1)
    sigma = rows.T @ (rows * weights[:, None]) / weights.sum()
    state = optimizer.state[model.weight]
    assert state["rows"] == count + 7
    if curvature == "subspace":
        found = state["basis"] @ state["core"] @ state["basis"].T
    else:
        found = state["gram"]
    assert_near(found, sigma, SOLVE[torch.float64])


def test_rows_do_not_count_in_inference_mode(backend):
    model = make_net("mlp")
    optimizer = GLS(model, backend=backend)
    with torch.inference_mode():
        model(make_batch("mlp", 7, 1)[0])
    loss_of(model, make_batch("mlp", 5, 0)).backward()
    assert rows_of_first_step(optimizer, model) == [5] * 4


# ---- copies and removal --------------------------------------------------------------------------


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "make_copy",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_a_file],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("trained", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_copy_is_plain_and_can_be_trained(backend, kind, trained, make_copy):
    """Its gradients are true ones; a GLS of its own captures it, and copies of it."""
    model = make_net(kind)
    optimizer = GLS(model, site="backward", backend=backend, **EVERY_STEP)
    train(model, optimizer, kind, trained)
    twin, plain = make_copy(model), make_net(kind)
    plain.load_state_dict(model.state_dict())
    for candidate in (twin, plain):
        loss_of(candidate, make_batch(kind, 5, 7)).backward()
    assert_equal(gradients(twin), gradients(plain))
    before = snapshot(model)
    own = GLS(copy.deepcopy(twin), backend=backend)
    assert "Adam" not in own.report()
    own = GLS(twin, backend=backend)
    train(twin, own, kind, 2)
    assert_equal(snapshot(model), before)
    train(model, optimizer, kind, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_detach_leaves_every_attribute(kind):
    model = make_net(kind)
    inputs, _ = make_batch(kind, 5, 0)
    before = [(module, dict(vars(module))) for module in model.modules()]
    outputs = model(inputs)
    classes = [type(module) for module in model.modules()]
    with GLS(model):
        assert [type(module) for module in model.modules()] != classes
        assert [module.__class__ for module in model.modules()] == classes
    assert [type(module) for module in model.modules()] == classes
    for module, attributes in before:
        assert list(vars(module)) == list(attributes)
        assert all(vars(module)[key] is value for key, value in attributes.items())
    assert torch.equal(model(inputs), outputs)
    assert model(inputs).grad_fn.name() == outputs.grad_fn.name()


def test_detach_after_an_exception():
    model = make_net("mlp")

    def leave_badly():
        with GLS(model):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        leave_badly()
    assert all(type(module) in (nn.Linear, type(model)) for module in model.modules())


def test_step_of_a_replaced_optimizer_moves_nothing():
    model = make_net("mlp")
    first = GLS(model)
    train(model, first, "mlp", 2)
    second = GLS(model)
    loss_of(model, make_batch("mlp", 5, 0)).backward()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="another one was built on the same model"):
        first.step()
    assert_equal(snapshot(model), before)
    second.step()
    second.detach()
    assert all(type(module) in (nn.Linear, type(model)) for module in model.modules())
