"""diagnostics(): numbers that the state implies, by layer."""

import copy

import pytest
import torch
from nets import KINDS, loss_of, make_batch, make_net
from tolerances import PRODUCT
from torch import nn

from gls_fused import GLS, attach

NEAR = {"rel": 10 * PRODUCT[torch.float64]}


def train(model, optimizer, kind, steps=5):
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, make_batch(kind, 12, step)).backward()
        optimizer.step()


def by_layer(found):
    layers = {}
    for key, value in found.items():
        assert type(value) is float
        layer, _, name = key.rpartition("/")
        layers.setdefault(layer, {})[name] = value
    return layers


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_rows(kind):
    """beta = 0: the statistics are of the last batch alone, here in all of its directions."""
    model = make_net(kind)
    optimizer = GLS(
        model, rank=100, power=1, normalize="rms", max_change=None, damping=0.7,
        beta=0.0, beta2=0.0, curvature_every=1, site="backward",
    )  # fmt: skip
    train(model, optimizer, kind)
    found = by_layer(optimizer.diagnostics())
    assert list(found) == ["stem", "first", "second", "head"]
    # p.grad holds D at the backward site.
    for name, values in found.items():
        layer = getattr(model, name)
        direction = torch.cat([layer.weight.grad.flatten(), layer.bias.grad])
        assert values["update_rms"] == pytest.approx(
            direction.square().mean().sqrt().item(), **NEAR
        )
        assert values["captured"] == pytest.approx(1.0, rel=1e-9)
        # Of a linear layer a row an image; a convolution has more than enough.
        if name == "head":
            assert values["samples"] == pytest.approx(12, **NEAR)
        dim = min(layer.weight[0].numel() + 1, values["samples"])
        assert values["damping"] == pytest.approx(0.7 * values["trace"] / dim, **NEAR)
    if kind == "mlp":
        inputs, _ = make_batch(kind, 12, 4)
        trace = (inputs.square().sum() / len(inputs)).item() + 1
        assert found["stem"]["trace"] == pytest.approx(trace, **NEAR)


def test_share_captured_by_few_directions():
    """Of rows with eigenvalues 9, 1, 0 and a rank of 1."""
    model = nn.Linear(3, 2, bias=False).double()
    optimizer = GLS(model, rank=1, curvature_every=1, beta=0.0)
    rows = torch.tensor([[3.0, 0, 0], [0, 1, 0], [-3, 0, 0], [0, -1, 0]]).double() * 2**0.5
    for _ in range(40):
        model(rows).square().sum().backward()
        optimizer.step()
    values = by_layer(optimizer.diagnostics())["Linear"]
    assert values["captured"] == pytest.approx(0.9, **NEAR)
    assert values["trace"] == pytest.approx(10.0, **NEAR)


def test_dense_curvature_captures_all():
    model = make_net("mlp")
    optimizer = GLS(model, curvature="dense")
    train(model, optimizer, "mlp")
    assert all(values["captured"] == 1 for values in by_layer(optimizer.diagnostics()).values())


@pytest.mark.parametrize(
    ("normalize", "has"),
    [
        ("rms", True),
        ("row", True),
        ("factored", True),
        ("adam", True),
        ("sgd", False),
        ("none", False),
    ],
)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_root_mean_square_where_it_is_kept(normalize, has, momentum):
    model = make_net("mlp")
    options = {"normalize": normalize, "momentum": momentum, "lr": 1e-4}
    optimizer = GLS(model, **options)
    train(model, optimizer, "mlp")
    for values in by_layer(optimizer.diagnostics()).values():
        assert ("update_rms" in values) == has
        assert ("lr_share" in values) == has


def test_share_of_lr_that_the_bound_leaves():
    """max_change times the weight's root mean square, over growth lr; 1 where that is more."""
    for lr, max_change in ((0.5, 0.1), (1e-3, 0.1), (1e-3, None)):
        model = make_net("mlp")
        optimizer = GLS(model, lr=lr, max_change=max_change, curvature_every=1)
        train(model, optimizer, "mlp")
        for name, values in by_layer(optimizer.diagnostics()).items():
            weight = getattr(model, name).weight.detach()
            rms = max(weight.square().mean().sqrt().item(), (3 * (weight[0].numel() + 1)) ** -0.5)
            share = min(1, 0.1 * rms / (lr * values["growth"]))
            expected = None if max_change is None else pytest.approx(share, **NEAR)
            assert values.get("lr_share") == expected


def test_orthogonal_steps_have_their_own_share_of_lr():
    """Their root mean square is .2; of a mean square there is only the biases', if any."""
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16)).double()
    optimizer = GLS(model, lr=0.5, normalize="spectral")
    model(torch.randn(20, 16).double()).square().sum().backward()
    measured = model[0].weight.detach().square().mean().sqrt().clamp(min=48**-0.5).item()
    optimizer.step()
    found = by_layer(optimizer.diagnostics())
    assert "update_rms" not in found["0"]
    assert found["0"]["lr_share"] == pytest.approx(0.1 * measured / 0.6 / 0.5, rel=0.2)
    assert {"update_rms", "lr_share"} <= found["1"].keys()


@pytest.mark.parametrize("normalize", ["auto", "factored", "spectral", "none", "sgd"])
def test_how_often_the_bound_held(normalize):
    """A mean of yes and no over the steps that gather, every second here, from the first one on."""
    model = make_net("mlp")
    optimizer = GLS(model, lr=1e9, normalize=normalize, curvature_every=2, beta=0.75)
    expected = 1.0
    for step, lr in enumerate((1e9, 1e-12, 1e-12, 1e9, 1e9, 1e-12)):
        optimizer.param_groups[0]["lr"] = lr
        train(model, optimizer, "mlp", steps=1)
        if step % 2 == 0:
            expected += (float(lr > 1) - expected) * 0.25
        found = by_layer(optimizer.diagnostics())
        for values in found.values():
            assert values["held"] == pytest.approx(expected, rel=1e-12)
    assert found
    resumed = GLS(copy.deepcopy(model), normalize=normalize)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.diagnostics() == optimizer.diagnostics()


def test_a_skipped_step_does_not_count_for_the_bound():
    model = make_net("mlp")
    optimizer = GLS(model, lr=1e-12, curvature_every=1)
    train(model, optimizer, "mlp", steps=1)
    optimizer.param_groups[0]["lr"] = 1e9
    optimizer.found_inf = torch.ones(())
    train(model, optimizer, "mlp", steps=1)
    assert all(values["held"] == 0 for values in by_layer(optimizer.diagnostics()).values())


def test_root_mean_square_is_the_same_per_layer_and_per_element():
    """At lr so small that both models see the same gradients."""
    found = []
    for normalize in ("rms", "adam"):
        model = make_net("mlp")
        optimizer = GLS(model, normalize=normalize, lr=1e-30)
        train(model, optimizer, "mlp")
        found.append([v["update_rms"] for v in by_layer(optimizer.diagnostics()).values()])
    assert found[0] == pytest.approx(found[1], **NEAR)


def test_root_mean_square_of_one_direction_again_and_again():
    """The average of equal values is that value, however few they are."""
    model = make_net("mlp")
    optimizer = GLS(model, beta2=0.9, lr=1e-30, site="backward", curvature_every=100)
    for _ in range(3):
        train(model, optimizer, "mlp", steps=1)
    for name, values in by_layer(optimizer.diagnostics()).items():
        layer = getattr(model, name)
        direction = torch.cat([layer.weight.grad.flatten(), layer.bias.grad])
        size = direction.square().mean().sqrt().item()
        assert values["update_rms"] == pytest.approx(size, **NEAR)


def test_groups_have_names_of_their_own():
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    optimizer = GLS([{"params": model[0]}, {"params": model[1], "damping": 2.0}])
    model[1](model[0](torch.randn(4, 3))).sum().backward()
    optimizer.step()
    found = by_layer(optimizer.diagnostics())
    assert list(found) == ["group0/Linear", "group1/Linear"]
    values = found["group1/Linear"]
    assert values["damping"] == pytest.approx(2 * values["trace"] / 4, rel=PRODUCT[torch.float32])


def test_layers_without_statistics_are_left_out():
    model = make_net("mlp")
    optimizer = GLS(model)
    assert optimizer.diagnostics() == {}
    model.stem.requires_grad_(False)
    train(model, optimizer, "mlp", steps=1)
    assert set(by_layer(optimizer.diagnostics())) == {"first", "second", "head"}


def test_reading_changes_nothing():
    states = []
    for reads in (False, True):
        model = make_net("mlp")
        optimizer = GLS(model, curvature_every=2)
        for _ in range(4):
            train(model, optimizer, "mlp", steps=1)
            if reads:
                optimizer.diagnostics()
        states.append(optimizer.state_dict()["state"])
    for plain, read in zip(*(state.values() for state in states), strict=True):
        assert list(plain) == list(read)
        for key, value in plain.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(read[key]))


def test_attachment_has_them_too():
    model = make_net("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    handle = attach(model, optimizer, damping=0.5)
    train(model, optimizer, "mlp")
    found = by_layer(handle.diagnostics())
    assert list(found) == ["stem", "first", "second", "head"]
    for values in found.values():
        assert list(values) == ["trace", "captured", "samples", "damping"]
        assert 0 < values["captured"] <= 1 + 1e-12
