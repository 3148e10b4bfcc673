"""Modules whose attributes, class or forward somebody changes, before a capture and after."""

import copy

import pytest
import torch
from nets import snapshot
from tolerances import SAME_STEPS, assert_near
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import gls_fused
from gls_fused import GLS

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

# Each step's statistics are of its own rows alone.
OPTIONS = {"lr": 0.01, "rank": 4, "curvature_every": 1, "beta": 0.0, "normalize": "factored"}


# ---- geometry of convolutions --------------------------------------------------------------------


def dilate(conv):
    """Strides become dilation, as a backbone for segmentation has them changed."""
    conv.stride, conv.dilation, conv.padding = (1, 1), (2, 2), (2, 2)


def wrap_around(conv):
    conv.padding_mode = "circular"


def unpad(conv):
    conv.padding = (0, 1)


def pad_as_same(conv):
    conv.padding, conv.stride, conv.dilation = "same", (1, 1), (3, 1)


def whole_numbers(conv):
    conv.stride, conv.padding, conv.dilation = 1, 2, 2


def other_kernel(conv):
    conv.weight = nn.Parameter(torch.randn(*conv.weight.shape[:2], 2, 2).to(conv.weight))


def upsample(conv):
    conv.stride, conv.padding, conv.dilation = (3, 1), (0, 1), (1, 2)
    conv.output_padding = (1, 0)


def whole_upsampling(conv):
    conv.stride, conv.output_padding, conv.dilation = 2, 1, 1


# A weight of few patches has P on them, where the site is the backward.
SHAPES = {"many patches": (3, 5, 7), "few patches": (64, 600, 3)}
CONV = (dilate, wrap_around, unpad, pad_as_same, whole_numbers)
TRANSPOSED = (upsample, whole_upsampling)
CHANGES = [
    *((nn.Conv2d, shape, change) for shape in SHAPES for change in CONV),
    *((nn.ConvTranspose2d, "many patches", change) for change in TRANSPOSED),
]  # fmt: skip


def name_of(value):
    return getattr(value, "__name__", str(value))


def make(kind, shape):
    torch.manual_seed(0)
    inputs, outputs, _ = SHAPES[shape]
    return nn.Sequential(kind(inputs, outputs, 3, padding=1)).double()


def images_of(shape, seed):
    torch.manual_seed(seed + 10)
    inputs, _, size = SHAPES[shape]
    return torch.randn(2, inputs, size, size + 1, dtype=torch.float64)


def rows_of(module, images):
    """Its patches with a one: gradients of one output at a time by the weight and bias."""
    weight = module.weight.detach().clone().requires_grad_()
    found = []
    transposed = isinstance(module, nn.ConvTranspose2d)
    outputs = _plain(module, images, weight)
    for image in outputs:
        for entry in image[0].flatten():
            (row,) = torch.autograd.grad(entry, weight, retain_graph=True)
            row = row[:, 0] if transposed else row[0]
            found.append(torch.cat([row.flatten(), row.new_ones(1)]))
    return torch.stack(found)


def _plain(module, images, weight):
    parameters = {"weight": weight, "bias": module.bias.detach()}
    return torch.func.functional_call(copy.deepcopy(module), parameters, (images,))


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("kind", "shape", "change"), CHANGES, ids=name_of)
def test_geometry_that_is_assigned(kind, shape, change, when, compiles):
    """Outputs, gradients and rows are those of the module as it is."""
    model = make(kind, shape)
    if when == "before":
        change(model[0])
    optimizer = GLS(model, **OPTIONS)
    run = torch.compile(model, backend="aot_eager") if compiles else model
    for step in range(3):
        if step == 1 and when == "after":
            change(model[0])
        plain = copy.deepcopy(model)
        images = images_of(shape, step)
        optimizer.zero_grad()
        outputs, expected = run(images), plain(images)
        assert_near(outputs, expected, SAME_STEPS)
        outputs.square().sum().backward()
        expected.square().sum().backward()
        if optimizer._preconditioner.site_of(optimizer._preconditioner.layers[0]) == "step":
            assert_near(model[0].weight.grad, plain[0].weight.grad, SAME_STEPS)
        optimizer.step()
        rows = rows_of(plain[0], images)
        state = optimizer.state[model[0].weight]
        assert state["rows"] == len(rows) or step
        assert_near(state["trace"], rows.square().sum() / len(rows), SAME_STEPS)


def test_one_module_with_two_dilations_in_a_step(backend):
    model = make(nn.Conv2d, "many patches")
    optimizer = GLS(model, backend=backend, **OPTIONS)
    for step in range(3):
        optimizer.zero_grad()
        images, rows = images_of("many patches", step), []
        for dilation in (1, 2):
            model[0].dilation = model[0].padding = (dilation, dilation)
            rows.append(rows_of(model[0], images))
            model(images).square().sum().backward()
        optimizer.step()
        rows = torch.cat(rows)
        trace = optimizer.state[model[0].weight]["trace"]
        assert_near(trace, rows.square().sum() / len(rows), SAME_STEPS)


@pytest.mark.parametrize("site", ["step", "backward"])
def test_weight_of_another_kernel_size(backend, site):
    found = []
    for assigned in (True, False):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 5, 2, padding=1).double()
        if assigned:
            own = conv
            conv = nn.Conv2d(3, 5, 4, padding=1).double()
            conv.weight, conv.bias = own.weight, own.bias
        optimizer = GLS(conv, backend=backend, site=site, **OPTIONS)
        for step in range(3):
            optimizer.zero_grad()
            conv(images_of("many patches", step)).square().mean().backward()
            optimizer.step()
        found.append(snapshot(conv))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


# ---- classes and their forward -------------------------------------------------------------------


def parameter_of(module, name):
    if module._parameters.get(name) is None:
        raise AttributeError(name)
    return module._parameters[name]


class Twice(nn.Linear):
    def forward(self, inputs):
        return 2 * F.linear(inputs, self.weight, self.bias)


class Scaled(nn.Linear):
    """Its weight is not the parameter."""

    @property
    def weight(self):
        return 3 * parameter_of(self, "weight")

    @weight.setter
    def weight(self, value):
        self.register_parameter("weight", value)


class Shifted(nn.Linear):
    """Its bias is not the parameter."""

    @property
    def bias(self):
        return parameter_of(self, "bias") + 1

    @bias.setter
    def bias(self, value):
        self.register_parameter("bias", value)


def exchange(module, monkeypatch):
    module.__class__ = Twice


def patch_class(module, monkeypatch):
    monkeypatch.setattr(nn.Linear, "forward", Twice.forward)


def tile(module, monkeypatch):
    """What makes images without seams."""

    def forward(self, images, weight, bias):
        return F.conv2d(F.pad(images, (1,) * 4, "circular"), weight, bias)

    module._conv_forward = forward.__get__(module)


FORWARDS = [
    (nn.Linear, (6, 8), (4, 6), exchange),
    (nn.Linear, (6, 8), (4, 6), patch_class),
    (nn.Conv2d, (3, 5, 3, 1, 1), (2, 3, 6, 6), tile),
    (nn.Conv2d, (64, 600, 3, 1, 1), (1, 64, 3, 3), tile),
]


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("kind", "sizes", "shape", "change"), FORWARDS, ids=["class", "patched", "conv", "few patches"]
)
def test_forward_that_is_replaced(kind, sizes, shape, change, when, compiles, monkeypatch):
    """The module computes what it is told to; what GLS knows nothing of takes Adam's update."""
    torch.manual_seed(0)
    model = nn.Sequential(kind(*sizes)).double()
    with monkeypatch.context() as patches:
        if when == "before":
            change(model[0], patches)
        optimizer = GLS(model, **OPTIONS)
        run = torch.compile(model, backend="aot_eager") if compiles else model
        for step in range(6):
            if step == 2 and when == "after":
                change(model[0], patches)
            inputs = torch.randn(*shape, dtype=torch.float64)
            plain = copy.deepcopy(model)
            optimizer.zero_grad()
            outputs = run(inputs)
            assert_near(outputs, plain(inputs), SAME_STEPS)
            outputs.square().sum().backward()
            optimizer.step()
        line = optimizer.report().splitlines()[0]
        assert "Adam" in line if when == "before" else "none for 4 steps" in line
    optimizer.detach()


def test_promised_directions_of_a_forward_that_is_replaced(monkeypatch):
    model = nn.Sequential(nn.Linear(6, 8))
    optimizer = GLS(model, site="backward", **OPTIONS)
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    monkeypatch.setattr(nn.Linear, "forward", Twice.forward)
    with pytest.raises(RuntimeError, match=r"layer '0': its forward is replaced.*site=\"step\""):
        model(torch.randn(4, 6))


@pytest.mark.parametrize("kind", [Scaled, Shifted])
def test_parameters_that_a_class_computes_from(kind):
    torch.manual_seed(0)
    model = nn.Sequential(kind(6, 4), nn.Linear(4, 2))
    for param in model[0]._parameters.values():
        nn.init.normal_(param)
    plain = copy.deepcopy(model)
    optimizer = GLS(model)
    inputs = torch.randn(5, 6)
    assert torch.equal(model(inputs), plain(inputs))
    lines = optimizer.report()
    assert f"0.weight: Adam ({__name__}.{kind.__name__} computes its weight or bias)" in lines
    assert "1: GLS" in lines


def pruned_in_training(site):
    """A model of which a weight is computed from the third step on, and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    optimizer = GLS(model, **{**OPTIONS, "curvature_every": 2}, site=site)
    for step in range(6):
        if step == 2:
            prune.l1_unstructured(model[2], "weight", 0.3)
        optimizer.zero_grad()
        model(torch.randn(5, 6, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def test_weight_that_is_pruned_in_training():
    model, optimizer = pruned_in_training("auto")
    for found, wanted in zip(snapshot(model), snapshot(pruned_in_training("step")[0]), strict=True):
        assert_near(found, wanted, SAME_STEPS)
    lines = optimizer.report().splitlines()
    assert "site backward" in lines[0]
    assert "site step" in lines[1]


def test_promised_directions_of_a_pruned_weight():
    with pytest.raises(
        RuntimeError, match=r"layer '2': its weight is now computed .*site=\"step\""
    ):
        pruned_in_training("backward")


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.mark.parametrize("attached", [False, True])
def test_promised_directions_of_a_weight_that_is_parametrized(attached):
    """Nothing moves: without P its gradient would pass for a direction."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    if attached:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gls_fused.attach(model, optimizer)
    else:
        optimizer = GLS(model, **OPTIONS, site="backward")

    def train():
        optimizer.zero_grad()
        model(torch.randn(5, 6, dtype=torch.float64)).square().sum().backward()
        optimizer.step()

    train()
    parametrize.register_parametrization(model[2], "weight", Halved())
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"layer '2': its module's class .*site=\"step\""):
        train()
    for found, wanted in zip(snapshot(model), before, strict=True):
        assert torch.equal(found, wanted)
    # Once it is gone the layer is as it was.
    parametrize.remove_parametrizations(model[2], "weight", leave_parametrized=False)
    train()
    assert not torch.equal(snapshot(model)[0], before[0])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(12, 6), nn.Linear(6, 12, bias=False)

    def forward(self, words):
        return self.head(self.table(words))


def test_weight_that_another_has_taken_the_place_of():
    """The report and the diagnostics leave out what no module has any more."""
    model = Tied()
    optimizer = GLS(model, **OPTIONS)
    for step in range(4):
        if step == 2:
            assert "head: GLS" in optimizer.report()
            model.head.weight = model.table.weight
        optimizer.zero_grad()
        F.cross_entropy(model(torch.arange(12)), torch.arange(12)).backward()
        optimizer.step()
    lines = optimizer.report().splitlines()
    assert lines[0] == "head: not in use (its module has another weight now)"
    assert lines[-1] == "share covered: 0.0% of 72 parameters"
    assert not optimizer.diagnostics()


# ---- parameters of other shapes and dtypes -------------------------------------------------------


class BiasedExperts(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 6, 5))
        self.w_bias = nn.Parameter(torch.zeros(bias))

    def forward(self, inputs):
        return torch.einsum("nk,emk->enm", inputs, self.w) + self.w_bias


gls_fused.register(BiasedExperts, "experts")


class RowBiased(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5))
        self.bias = nn.Parameter(torch.zeros(1, 6))

    def forward(self, inputs):
        return inputs @ self.weight.t() + self.bias


gls_fused.register(RowBiased, "linear")


def single():
    linear = nn.Linear(5, 6)
    linear.bias = nn.Parameter(torch.zeros(1))
    return linear


BIASES = {
    "one row of each expert": lambda: BiasedExperts((3, 1, 6)),
    "one for all experts": lambda: BiasedExperts((6,)),
    "a row": RowBiased,
    "one number": single,
}


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("site", ["step", "backward"])
@pytest.mark.parametrize("kind", BIASES)
def test_bias_that_is_spread_over_the_outputs(backend, kind, site, compiles):
    """It takes Adam's update, and the weight the steps of a layer without a bias."""
    if compiles and "expert" in kind and site == "backward":
        pytest.skip("a limit: experts of compiled graphs have P at the step")
    found = []
    for apart in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 5), BIASES[kind]()).double()
        weight, bias = list(model[1].parameters())
        if apart:
            # The gradient of the bias is the sum of the outputs', whose own part this is.
            bias.requires_grad_(False)
        optimizer = GLS(model, site=site, backend=backend, **OPTIONS)
        run = torch.compile(model, backend="aot_eager") if compiles else model
        for step in range(4):
            optimizer.zero_grad()
            torch.manual_seed(step)
            (run(torch.randn(7, 5, dtype=torch.float64)) * torch.linspace(0, 1, 6)).sum().backward()
            optimizer.step()
        assert bool(bias.any()) is not apart
        assert apart or optimizer.state[bias]["exp_avg_sq"].shape == bias.shape
        found.append(weight.detach().clone())
    # The loss is linear in the outputs, so that the bias does not matter to the weight.
    assert_near(*found, SAME_STEPS)


@pytest.mark.parametrize("make", [lambda: nn.Conv1d(3, 4, 2), lambda: nn.Linear(6, 4)])
@pytest.mark.parametrize("site", ["step", "backward"])
def test_weight_of_16_bits_beside_a_bias_of_32(backend, make, site):
    """Under autocast; both move, and by about what they move by in 32 bits."""
    found = []
    for low in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(make())
        if low:
            model[0].weight.data = model[0].weight.data.bfloat16()
        optimizer = GLS(model, site=site, backend=backend, **{**OPTIONS, "normalize": "none"})
        before = snapshot(model)
        for step in range(3):
            torch.manual_seed(step)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(torch.randn(2, 3, 6)).float().square().sum()
            loss.backward()
            assert model[0].bias.grad.dtype is torch.float32
            optimizer.step()
        found.append([after - old for after, old in zip(snapshot(model), before, strict=True)])
    assert_near(found[0][1], found[1][1], 0.05)


@pytest.mark.parametrize("index", [[-1, 0, -1, 1], [2, -3, 2, -2]])
def test_experts_counted_from_the_end(backend, index):
    class Chosen(BiasedExperts):
        def forward(self, inputs):
            return torch.bmm(self.w[torch.tensor(self.index)], inputs[:, :, None])

    gls_fused.register(Chosen, "experts")
    found = []
    for chosen in (index, [2, 0, 2, 1]):
        torch.manual_seed(0)
        model = Chosen((3, 6)).double()
        model.index = chosen
        optimizer = GLS(model, backend=backend, **OPTIONS)
        for step in range(3):
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(4, 5, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
        found.append(model.w.detach())
    assert torch.equal(*found)
