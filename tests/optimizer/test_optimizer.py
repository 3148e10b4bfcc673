"""GLS as a member of torch.optim: groups, state, capture and its removal, fallback to Adam."""

import copy
import io
import pickle

import pytest
import torch
from nets import OPTIONS, assert_equal, loss_of, make_batch, make_net, snapshot, train
from tolerances import PRODUCT, SAME_STEPS, assert_near
from torch import nn
from torch.nn import functional as F

from gls_fused import GLS


def take_steps(model, optimizer, kind, steps, first=0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, make_batch(kind, 9, step)).backward()
        optimizer.step()


def test_closure_is_evaluated_with_gradients():
    model = make_net("mlp")
    optimizer = GLS(model)
    before = snapshot(model)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, make_batch("mlp", 9, 0))
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() > closure().item()
    assert all(not torch.equal(p, q) for p, q in zip(snapshot(model), before, strict=True))


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)])
def test_scheduler_sets_the_rate(lr):
    model = make_net("mlp")
    optimizer = GLS(model, lr=lr, momentum=0.0, normalize="none", damping=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.0)
    take_steps(model, optimizer, "mlp", 1)
    scheduler.step()
    before = snapshot(model)
    take_steps(model, optimizer, "mlp", 1, first=1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.0, "site": "backward"},
        {"normalize": "adam", "site": "step"},
        {"normalize": "sgd"},
        {"normalize": "row", "site": "step"},
        {"normalize": "factored", "power": 0.75, "max_change": 0.01},
        {"curvature": "dense"},
    ],
    ids=str,
)
def test_resumes_bit_for_bit(kind, options, dtype):
    options = {"rank": 4, "curvature_every": 2, **options}

    def run(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            inputs, targets = make_batch(kind, 9, step)
            loss_of(model, (inputs.to(dtype), targets.to(dtype))).backward()
            optimizer.step()

    whole = make_net(kind).to(dtype)
    run(whole, GLS(whole, **options), range(9))

    model = make_net(kind).to(dtype)
    optimizer = GLS(model, **options)
    run(model, optimizer, range(4))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model = make_net(kind).to(dtype)
    optimizer = GLS(model, **options)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    statistics = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    assert {value.dtype for value in statistics} == {torch.float32}
    run(model, optimizer, range(4, 9))
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(p, q)


def test_may_step_in_inference_mode():
    found = []
    for inside in (False, True):
        model = make_net("mlp")
        optimizer = GLS(model, **OPTIONS)
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, make_batch("mlp", 5, step)).backward()
            with torch.inference_mode(inside):
                optimizer.step()
        found.append(snapshot(model))
    assert_equal(*found)


def test_may_be_built_in_inference_mode():
    models = [make_net("mlp") for _ in range(2)]
    with torch.inference_mode():
        optimizers = [GLS(models[0], **OPTIONS)]
    optimizers.append(GLS(models[1], **OPTIONS))
    assert_equal(*(train(*pair, range(4)) for pair in zip(models, optimizers, strict=True)))


def test_groups_have_their_own_options():
    model = make_net("mlp")
    middle = [model.first, model.second]
    optimizer = GLS(
        [
            {"params": model.stem, "lr": 0.5},
            {"params": middle, "rank": 2, "curvature": "subspace"},
            {"params": list(model.head.parameters())},
        ],
        rank=3,
    )
    take_steps(model, optimizer, "mlp", 3)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1e-3, 1e-3]
    assert optimizer.state[model.stem.weight]["basis"].shape == (7, 3)
    assert optimizer.state[model.first.weight]["basis"].shape == (9, 2)
    assert "basis" not in optimizer.state[model.head.weight]
    assert "2 parameters given without their model: Adam" in optimizer.report()


def test_group_added_later_starts_its_own_statistics():
    model = make_net("mlp")
    optimizer = GLS([{"params": [model.stem, model.first, model.second]}])
    take_steps(model, optimizer, "mlp", 3)
    head = copy.deepcopy(model.head)
    take_steps(model, optimizer, "mlp", 1)
    assert torch.equal(model.head.weight, head.weight)
    optimizer.add_param_group({"params": model.head})
    take_steps(model, optimizer, "mlp", 2)
    assert optimizer.state[model.head.weight]["rows"] == 9
    assert not torch.equal(model.head.weight, head.weight)


class Assorted(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.norm = nn.LayerNorm(8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.covered = nn.Linear(8, 8)
        self.unembed = nn.Linear(8, 12, bias=False)
        self.unembed.weight = self.embed.weight

    def forward(self, tokens):
        hidden = self.norm(self.embed(tokens))
        hidden = hidden + self.attend(hidden, hidden, hidden, need_weights=False)[0]
        hidden = self.covered(self.parametrized(hidden))
        image = hidden[:, :4, :, None].expand(-1, -1, -1, 8)
        return self.unembed(hidden).mean() + self.depthwise(image).square().mean()


def test_report_says_what_falls_back_and_why():
    model = Assorted()
    optimizer = GLS(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(12).view(2, 6)).backward()
        optimizer.step()
    report = repr(optimizer)
    for line in [
        "covered: GLS (Linear 9 -> 8, 12 rows, rank 8, site step, backend native, factored)",
        "unembed: GLS (Linear 8 -> 12, 12 rows, rank 8, site step, backend native, tied to embed,"
        " factored)",
        "2 norms, biases and other vectors: Adam",
        "attend.in_proj: GLS (MultiheadAttention 9 -> 24, 12 rows, rank 9, site step, "
        "backend native, factored)",
        "depthwise: GLS (Conv2d 10 -> 4, 288 rows, rank 4, site step, backend native, factored)",
    ]:
        assert (
            line.replace("native", GLS(nn.Linear(1, 1)).report().splitlines()[0].split()[-1][:-1])
            in report
        )
    assert "parametrized.parametrizations.weight.original0: Adam (the lengths" in report


def test_uninitialised_module_falls_back():
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    optimizer = GLS(model)
    assert "0.weight: Adam (not initialised yet" in optimizer.report()
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 5)).sum().backward()
        optimizer.step()
    assert "exp_avg_sq" in optimizer.state[model[0].weight]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_other_parameters_take_adams_update(momentum):
    torch.manual_seed(0)
    ours = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3)).double().requires_grad_(False)
    ours[0].requires_grad_(True)
    theirs = copy.deepcopy(ours)
    options = {"lr": 0.02, "eps": 1e-6, "weight_decay": 0.1}
    gls = GLS(ours, momentum=momentum, beta2=0.8, **options)
    adam = torch.optim.AdamW(theirs.parameters(), betas=(momentum, 0.8), fused=True, **options)
    for step in range(5):
        for model, optimizer in ((ours, gls), (theirs, adam)):
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(7, 6).double()).square().sum().backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_near(p, q, SAME_STEPS)


@pytest.mark.parametrize("leave", ["detach", "with"])
def test_removal_leaves_the_model_as_it_was(leave):
    model = make_net("cnn")
    modules = dict(model.named_modules())
    before = {name: dict(module.__dict__) for name, module in modules.items()}
    if leave == "with":
        with GLS(model) as optimizer:
            take_steps(model, optimizer, "cnn", 2)
    else:
        optimizer = GLS(model)
        take_steps(model, optimizer, "cnn", 2)
        optimizer.detach()
    for name, module in modules.items():
        assert module.__dict__.keys() == before[name].keys()
        assert "forward" not in module.__dict__
    with pytest.raises(RuntimeError, match="no longer captured"):
        optimizer.step()


def test_later_optimizer_takes_the_model_over():
    model = make_net("mlp")
    earlier, later = GLS(model), GLS(model)
    take_steps(model, later, "mlp", 2)
    with pytest.raises(RuntimeError, match=r"'stem' is no longer captured"):
        earlier.step()
    earlier.detach()
    take_steps(model, later, "mlp", 1)
    assert later.state[model.stem.weight]["rows"] == 9


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copy_of_a_captured_model_is_a_model_of_its_own(how):
    model = make_net("cnn")
    optimizer = GLS(model)
    twin = how(model)
    with torch.no_grad():
        for param in twin.parameters():
            param.zero_()
    inputs, _ = make_batch("cnn", 3, 0)
    assert not twin(inputs).any()
    assert model(inputs).any()
    twin(inputs).sum().backward()
    assert all(layer.sums is None for layer in optimizer._preconditioner.layers)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"dilation": 2, "bias": False},
        {"padding": "same"},
        {"padding": "same", "kernel_size": (2, 3)},
        {"padding": "valid"},
        {"padding": 2, "padding_mode": "reflect"},
        {"padding": (1, 2), "padding_mode": "replicate"},
        {"padding": 1, "padding_mode": "circular"},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["batch", "single", "channels_last"])
# torch's own remark on the uncaptured module.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_captured_convolution_computes_the_same(options, layout):
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 5, **{"kernel_size": 3, **options}).double()
    captured = copy.deepcopy(plain)
    shape = (3, 9, 8) if layout == "single" else (4, 3, 9, 8)
    images = torch.randn(shape, dtype=torch.float64)
    if layout == "channels_last":
        images = images.to(memory_format=torch.channels_last)
        captured.to(memory_format=torch.channels_last)
    optimizer = GLS(captured)
    results = []
    for module in (plain, captured):
        inputs = images.clone().requires_grad_()
        output = module(inputs)
        output.square().sum().backward()
        results.append([output, inputs.grad, *(p.grad for p in module.parameters())])
    for expected, actual in zip(*results, strict=True):
        assert_near(actual, expected, PRODUCT[torch.float64])
    optimizer.step()
    assert optimizer.state[captured.weight]["rows"] > 0


@pytest.mark.parametrize("leading", [(), (7,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_captured_linear_computes_the_same(leading, bias):
    torch.manual_seed(0)
    plain = nn.Linear(5, 4, bias=bias).double()
    captured = copy.deepcopy(plain)
    optimizer = GLS(captured)
    values = torch.randn(*leading, 5, dtype=torch.float64)
    results = []
    for module in (plain, captured):
        inputs = values.clone().requires_grad_()
        output = module(inputs)
        output.square().sum().backward()
        results.append([output, inputs.grad, *(p.grad for p in module.parameters())])
    for expected, actual in zip(*results, strict=True):
        assert_near(actual, expected, PRODUCT[torch.float64])
    optimizer.step()
    assert optimizer.state[captured.weight]["rows"] == values.numel() // 5


def test_only_a_backward_counts_rows():
    model = make_net("mlp")
    optimizer = GLS(model)
    batch = make_batch("mlp", 9, 0)
    with torch.no_grad():
        loss_of(model, batch)
    loss_of(model.eval(), batch)
    model.train()
    loss_of(model, batch).backward()
    optimizer.step()
    assert optimizer.state[model.stem.weight]["rows"] == 9


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_double_backward(backend):
    model = make_net("mlp")
    batch = make_batch("mlp", 9, 0)
    optimizer = GLS(model, site="step", backend=backend)
    take_steps(model, optimizer, "mlp", 1)
    penalty = torch.autograd.grad(loss_of(model, batch), model.stem.weight, create_graph=True)[0]
    optimizer.zero_grad()
    penalty.square().sum().backward()
    assert model.stem.weight.grad.any()
    optimizer = GLS(model, site="backward", backend=backend)
    take_steps(model, optimizer, "mlp", 1)
    with pytest.raises(
        RuntimeError, match=r"layer '(stem|head)'.*create_graph=True.*site=\"step\""
    ):
        torch.autograd.grad(loss_of(model, batch), model.stem.weight, create_graph=True)


def test_autocast_computes_as_without_capture():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    captured = copy.deepcopy(plain)
    GLS(captured)
    inputs = torch.randn(5, 6)
    outputs = []
    for module in (plain, captured):
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(module(inputs))
        outputs[-1].float().square().sum().backward()
    assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
    assert torch.equal(*outputs)
    for p, q in zip(plain.parameters(), captured.parameters(), strict=True):
        assert q.grad.dtype == torch.float32
        assert_near(q.grad, p.grad, PRODUCT[torch.bfloat16])


def test_weight_decay_is_decoupled():
    model = nn.Linear(4, 3)
    optimizer = GLS(model, lr=0.1, weight_decay=0.5)
    before = model.weight.detach().clone()
    (model(torch.randn(6, 4)) * 0).sum().backward()
    optimizer.step()
    assert_near(model.weight, before * 0.95, PRODUCT[torch.float32])


def test_functional_use_of_a_weight_falls_back():
    model = nn.Linear(4, 3)
    optimizer = GLS(model)
    F.linear(torch.randn(6, 4), model.weight).sum().backward()
    before = model.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.weight, before)
    assert "basis" not in optimizer.state[model.weight]
