"""normalize="spectral" and "auto": which layers take an orthogonal step, and of what."""

import copy

import pytest
import torch
from nets import assert_equal, loss_of, make_batch, make_net, train
from tolerances import SAME_STEPS, assert_near, relative_error
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from gls_fused import GLS
from gls_fused.apply.spectral import MOST_SHARE, factor_share, normalize_of

OPTIONS = {"curvature_every": 2, "rank": 4, "lr": 0.01}


class Last(nn.Module):
    """The outputs of a recurrent layer."""

    def forward(self, inputs):
        return inputs[0]


def step(model, optimizer, inputs, steps=4):
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


def scales(optimizer):
    """By layer, in the model's order."""
    group, states = optimizer.param_groups[0], optimizer.state
    layers = optimizer._preconditioner.layers
    return {layer.name: normalize_of(layer, states[layer.weight], group) for layer in layers}


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_step_of_a_weight_is_orthogonal(backend, kind):
    """Each singular value of it is .6 sqrt(max(m, k)) lr, within what five steps leave."""
    model = make_net(kind)
    optimizer = GLS(model, normalize="spectral", max_change=None, backend=backend, **OPTIONS)
    before = [layer.weight.detach().clone() for layer in (model.first, model.second)]
    loss_of(model, make_batch(kind, 12, 0)).backward()
    optimizer.step()
    for layer, old in zip((model.first, model.second), before, strict=True):
        moved = (old - layer.weight.detach()).flatten(1)
        values = torch.linalg.svdvals(moved) / (0.01 * 0.6 * max(moved.shape) ** 0.5)
        # But for those of which the gradient of so few rows has next to nothing.
        assert values.median() > 0.87
        assert values.max() < 1.13
        assert moved.square().mean().sqrt() == pytest.approx(0.01 * 0.6, rel=0.15)


@pytest.mark.parametrize("normalize", ["spectral", "auto"])
def test_grouped_convolution_keeps_a_scale(normalize):
    model = make_net("grouped")
    optimizer = GLS(model, normalize=normalize, spectral_head=True, **OPTIONS)
    train(model, optimizer, range(2), "grouped")
    assert scales(optimizer)["first"] == scales(optimizer)["second"] == "factored"
    assert normalize == "auto" or scales(optimizer)["stem"] == "spectral"


def test_last_layer_keeps_a_scale_unless_its_group_says_otherwise():
    inputs = torch.randn(12, 6).double()
    for chosen, head in (({}, "factored"), ({"spectral_head": True}, "spectral")):
        model = make_net("mlp")
        optimizer = GLS(model, normalize="spectral", **chosen, **OPTIONS)
        step(model, optimizer, inputs)
        assert list(scales(optimizer).values()) == ["spectral"] * 3 + [head]
        assert ("exp_avg_sq_columns" in optimizer.state[model.head.weight]) == (head == "factored")
    model = make_net("mlp")
    groups = [
        {"params": model.stem},
        {"params": [model.first, model.second], "normalize": "factored"},
        {"params": model.head, "spectral_head": True},
    ]
    optimizer = GLS(groups, normalize="spectral", **OPTIONS)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, optimizer, inputs, steps=1)
    kept = {n for n, p in model.named_parameters() if "exp_avg_sq_columns" in optimizer.state[p]}
    assert kept == {"first.weight", "second.weight"}
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


def test_layer_that_is_added_later_is_the_last():
    model = make_net("mlp")
    optimizer = GLS([{"params": model.stem}], normalize="spectral", **OPTIONS)
    assert [layer.last for layer in optimizer._preconditioner.layers] == [True]
    optimizer.add_param_group({"params": [model.first, model.head]})
    assert [layer.last for layer in optimizer._preconditioner.layers] == [False, False, True]
    twin = copy.deepcopy(optimizer)
    assert [layer.last for layer in twin._preconditioner.layers] == [False, False, True]


def make_normalized(bias=True):
    torch.manual_seed(0)
    first, second = (nn.Linear(32, 32, bias=bias) for _ in range(2))
    layers = first, nn.LayerNorm(32), second, nn.LayerNorm(32), nn.Linear(32, 10)
    return nn.Sequential(*layers)


def train_normalized(model, optimizer, steps):
    for number in steps:
        inputs = torch.randn(512, 32, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        (model(inputs) - inputs[:, :10].sin()).square().mean().backward()
        optimizer.step()


def test_the_last_layer_is_the_models_and_not_the_one_added_last():
    model = make_normalized()
    model[:4].requires_grad_(False)
    optimizer = GLS(model[4].parameters(), model=model)
    train_normalized(model, optimizer, range(3))
    model.requires_grad_(True)
    optimizer.add_param_group({"params": list(model[:4].parameters())})
    train_normalized(model, optimizer, range(3, 5))
    assert scales(optimizer) == {"4": "factored", "0": "spectral", "2": "spectral"}
    assert scales(copy.deepcopy([model, optimizer])[1]) == scales(optimizer)
    # The last is gone, from the model too.
    model[4] = nn.Identity()
    del optimizer.param_groups[0]
    optimizer.zero_grad()
    assert scales(optimizer) == {"0": "spectral", "2": "factored"}


@pytest.mark.parametrize("reloaded", [False, True])
@pytest.mark.parametrize(
    ("before", "change"),
    [
        ("auto", {"spectral_share": 0.0}),
        ("auto", {"split": 4}),
        ("auto", {"normalize": "factored"}),
        ("auto", {"normalize": "row"}),
        ("spectral", {"normalize": "row"}),
        ("spectral", {"normalize": "factored"}),
        ("factored", {"normalize": "row"}),
    ],
)
def test_scales_that_follow_orthogonal_steps_begin_anew(backend, before, change, reloaded):
    """Of mean squares that no step has written the first steps would be some times too long."""
    model = make_normalized(bias=False)
    optimizer = GLS(model, lr=1.0, max_change=0.01, normalize=before, backend=backend)
    train_normalized(model, optimizer, range(11))
    assert scales(optimizer)["0"] == ("factored" if before == "factored" else "spectral")
    optimizer.param_groups[0].update(change)
    if reloaded:
        optimizer.load_state_dict(optimizer.state_dict())
    for number in range(11, 14):
        start = model[0].weight.detach().clone()
        train_normalized(model, optimizer, [number])
        moved = (model[0].weight - start).square().mean().sqrt() / start.square().mean().sqrt()
        assert moved < 1.1 * 0.01
        assert scales(optimizer)["0"] == change.get("normalize", "factored")


def test_split_weight_steps_as_its_matrices_do(backend):
    """Queries and keys in one weight, or in two: one P, a factor for each."""
    torch.manual_seed(0)
    joint = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 2)).double()
    apart = nn.ModuleList([nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(8, 2)]).double()
    with torch.no_grad():
        for half, part in enumerate(apart[:2]):
            part.weight.copy_(joint[0].weight[4 * half : 4 * half + 4])
            part.bias.copy_(joint[0].bias[4 * half : 4 * half + 4])
        apart[2].load_state_dict(joint[1].state_dict())
    options = {"normalize": "spectral", "backend": backend, "max_change": None, **OPTIONS}
    optimizers = GLS(joint, split=2, **options), GLS(apart, **options)
    for number in range(5):
        inputs = torch.randn(9, 5, generator=torch.Generator().manual_seed(number)).double()
        hidden = torch.cat([apart[0](inputs), apart[1](inputs)], dim=1)
        for outputs, optimizer in zip((joint(inputs), apart[2](hidden)), optimizers, strict=True):
            optimizer.zero_grad()
            outputs.square().mean().backward()
            optimizer.step()
    whole = torch.cat([apart[0].weight, apart[1].weight])
    assert_near(joint[0].weight, whole, SAME_STEPS)
    assert_near(joint[0].bias, torch.cat([apart[0].bias, apart[1].bias]), SAME_STEPS)
    assert_near(joint[1].weight, apart[2].weight, SAME_STEPS)
    unsplit = GLS(copy.deepcopy(joint), **options)
    assert unsplit.param_groups[0]["split"] == 1


def test_split_that_does_not_divide_the_outputs_is_refused():
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 2))
    with pytest.raises(
        ValueError, match=r"split: expected a divisor of the 8 outputs of layer '0'"
    ):
        GLS(model, normalize="spectral", split=3)
    assert type(model[0]) is nn.Linear


def test_auto_goes_by_the_rows_of_the_first_step():
    """The factor of [16, 16] takes 5 (4 + 2) 16^3 flops, forward and backward 6 n 16^2: 80 / n."""
    for rows, share, chosen in (
        (240, MOST_SHARE, "factored"),
        (250, MOST_SHARE, "spectral"),
        (159, 0.5, "factored"),
        (161, 0.5, "spectral"),
        (10**4, 0, "factored"),
        (8, 1e9, "spectral"),
    ):
        assert (80 / rows > share) == (chosen == "factored")
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.LayerNorm(16), nn.Linear(16, 4))
        optimizer = GLS(model, normalize="auto", spectral_share=share, **OPTIONS)
        step(model, optimizer, torch.randn(rows, 16))
        # Later steps, of fewer or more rows, do not change it.
        step(model, optimizer, torch.randn(rows // 2, 16))
        step(model, optimizer, torch.randn(2 * rows, 16))
        assert scales(optimizer) == {"0": chosen, "2": "factored"}
        twin = GLS(model, normalize="auto", **OPTIONS)
        twin.load_state_dict(optimizer.state_dict())
        assert scales(twin) == scales(optimizer)


@pytest.mark.parametrize(
    ("stride", "kernel", "padding"), [(1, 3, 1), (2, 2, 0), (2, 4, 1), (4, 4, 0)]
)
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_share_is_of_the_flops_that_torch_counts(kind, stride, kernel, padding):
    """No kernel multiplies the zeros between the pixels of a transposed convolution."""
    layer = kind(16, 24, kernel, stride, padding)
    model = nn.Sequential(layer, nn.BatchNorm2d(24), nn.Conv2d(24, 4, 1))
    images = torch.randn(4, 16, 16, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counted:
        layer(images).sum().backward()
    optimizer = GLS(model, normalize="spectral")
    step(model, optimizer, images.detach())
    short, long = sorted((24, 16 * kernel**2))
    factor = 5 * (4 * short**2 * long + 2 * short**3)
    share = factor_share(
        optimizer._preconditioner.layers[0], optimizer.state[layer.weight]["rows"], 1
    )
    assert share == pytest.approx(factor / counted.get_total_flops(), rel=1e-6)


def test_auto_leaves_narrow_and_gated_weights_their_scales():
    """As of low-rank adapters; and "spectral" the gates alone, which are no one matrix."""
    model = nn.Sequential(
        nn.Linear(32, 15),
        nn.Linear(15, 32),
        nn.Linear(32, 16),
        nn.GRU(16, 16),
        Last(),
        nn.Linear(16, 9),
        nn.LayerNorm(9),
    )
    narrow = {"0": "factored", "1": "factored"}
    others = {"2": "spectral", "3.weight_ih_l0": "factored", "3.weight_hh_l0": "factored"}
    for normalize in ("auto", "spectral"):
        twin = copy.deepcopy(model)
        optimizer = GLS(twin, normalize=normalize, **OPTIONS)
        step(twin, optimizer, torch.randn(60, 9, 32))
        expected = narrow if normalize == "auto" else dict.fromkeys(narrow, "spectral")
        assert scales(optimizer) == {**expected, **others, "5": "factored"}


class Plain(nn.Module):
    def forward(self, inputs):
        return inputs / (1 + inputs.norm())


class FunctionalNorm(nn.Module):
    def forward(self, inputs):
        return F.rms_norm(inputs, inputs.shape[-1:])


def prenorm(inputs):
    return inputs * inputs.square().mean(-1, keepdim=True).rsqrt()


class OwnNorm(nn.Module):
    """By a function of its own, from a method."""

    def forward(self, inputs):
        return self.scale(inputs)

    def scale(self, inputs):
        return prenorm(inputs)


class NormalizedInputs(nn.Module):
    def forward(self, inputs):
        return inputs


@pytest.mark.parametrize(
    ("module", "chosen"),
    [
        (nn.Tanh(), "factored"),
        (Plain(), "factored"),
        (NormalizedInputs(), "factored"),
        (nn.LPPool1d(2, 1), "factored"),
        (nn.LayerNorm(16), "spectral"),
        (nn.BatchNorm1d(16), "spectral"),
        (FunctionalNorm(), "spectral"),
        (OwnNorm(), "spectral"),
    ],
)
def test_auto_gives_points_orthogonal_steps_where_something_normalises(module, chosen):
    model = nn.Sequential(nn.Linear(16, 16), module, nn.Linear(16, 4))
    optimizer = GLS(model, **OPTIONS)
    step(model, optimizer, torch.randn(300, 16))
    assert scales(optimizer) == {"0": chosen, "2": "factored"}
    image = nn.Sequential(
        nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3), nn.Tanh(), nn.Conv2d(16, 4, 1)
    )
    optimizer = GLS(image, **OPTIONS)
    step(image, optimizer, torch.randn(9, 16, 9, 9))
    assert scales(optimizer) == {"0": "factored", "1": "spectral", "3": "factored"}


@pytest.mark.parametrize("seed", [0, 1])
def test_coordinate_network_trains_ahead_of_adamw(seed):
    """A field over the plane, all of it in every step: many rows, and no noise."""
    losses = {}
    for name in ("adamw", "gls"):
        torch.manual_seed(seed)
        points = torch.rand(1024, 2)
        features = 2 * torch.pi * points @ (4 * torch.randn(2, 16))
        inputs = torch.cat([features.sin(), features.cos()], 1)
        field = torch.sin(9 * points[:, :1]) * torch.cos(7 * points[:, 1:])
        layers = [nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)]
        model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(64, 1))
        adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
        optimizer = GLS(model, lr=1e-3) if name == "gls" else adamw
        for _ in range(60):
            optimizer.zero_grad()
            loss = (model(inputs) - field).square().mean()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
    assert losses["gls"] < losses["adamw"]


@pytest.mark.parametrize("momentum", [0.9, 0.5, 0.0])
@pytest.mark.parametrize("normalize", ["row", "rms"])
def test_bound_holds_for_a_gradient_that_grows_at_once(normalize, momentum):
    """The average then grows before the mean square does."""
    torch.manual_seed(0)
    model, inputs = nn.Linear(64, 32), torch.randn(256, 64)
    options = {"lr": 1.0, "momentum": momentum, "normalize": normalize, "max_change": 0.01}
    optimizer = GLS(model, **options)
    sought = torch.randn(256, 32)
    for number in range(120):
        before = model.weight.detach().clone()
        optimizer.zero_grad()
        loss = (model(inputs) - sought).square().mean()
        (loss * (1e4 if number == 119 else 1)).backward()
        optimizer.step()
    least = max(before.square().mean().sqrt(), 1 / (3 * 64) ** 0.5)
    assert (model.weight - before).square().mean().sqrt() < 0.0105 * least


@pytest.mark.parametrize("normalize", ["spectral", "auto"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_resumed_training_is_the_same_bit_for_bit(kind, normalize):
    model = make_net(kind)
    optimizer = GLS(model, normalize=normalize, **OPTIONS)
    train(model, optimizer, range(5), kind)
    twin_model = copy.deepcopy(model)
    twin = GLS(twin_model, normalize=normalize, **OPTIONS)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = train(model, optimizer, range(5, 9), kind)
    assert_equal(train(twin_model, twin, range(5, 9), kind), expected)


def test_bound_holds_for_spectral_steps():
    model = make_net("mlp")
    optimizer = GLS(model, normalize="spectral", **{**OPTIONS, "lr": 100.0, "max_change": 0.01})
    before = copy.deepcopy(model)
    loss_of(model, make_batch("mlp", 12, 0)).backward()
    optimizer.step()
    for ours, old in zip(model.parameters(), before.parameters(), strict=True):
        if ours.ndim > 1:
            assert relative_error(ours, old) < 0.012


def test_nothing_moves_where_the_step_is_skipped():
    model = make_net("mlp").float()
    optimizer = GLS(model, normalize="spectral", **OPTIONS)
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(6, 6)).sum().backward()
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.ones(())
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
