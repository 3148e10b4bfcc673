"""A state in torch.distributed.checkpoint."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from nets import OPTIONS, assert_equal, loss_of, make_batch, make_net, snapshot, train
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from gls_fused import GLS, attach


class Mixed(nn.Module):
    """Layers, and parameters that take Adam's update."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = make_net("mlp")
        self.norm = nn.LayerNorm(3, dtype=torch.float64)

    def forward(self, inputs):
        return self.norm(self.net(inputs))


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.0},
        {"normalize": "adam", "site": "step"},
        {"normalize": "none", "momentum": 0.0},
        {"curvature": "dense"},
        {"low_precision": "master"},
        {"lr": torch.tensor(0.01)},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoint(tmp_path, options, flatten):
    """In one process; a fresh optimizer makes room for a state by a step at rate 0."""
    options = {**OPTIONS, **options}
    dtype = torch.bfloat16 if "low_precision" in options else torch.float64
    how = StateDictOptions(flatten_optimizer_state_dict=flatten)

    def make():
        model = Mixed().to(dtype)
        return model, GLS(model, **options)

    def go(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            inputs, targets = make_batch("mlp", 9, step)
            loss_of(model, (inputs.to(dtype), targets.to(dtype))).backward()
            optimizer.step()
        return snapshot(model)

    model, optimizer = make()
    go(model, optimizer, range(4))
    saved = {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=how),
    }
    dcp.save(saved, checkpoint_id=tmp_path)
    expected = go(model, optimizer, range(4, 9))

    model, optimizer = make()
    start = snapshot(model)
    found = {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=how),
    }
    assert_equal(snapshot(model), start)
    dcp.load(found, checkpoint_id=tmp_path)
    model.load_state_dict(found["model"])
    set_optimizer_state_dict(model, optimizer, found["optimizer"], options=how)
    assert_equal(go(model, optimizer, range(4, 9)), expected)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_room_for_a_state_fits_whatever_steps_auto_takes(tmp_path):
    """Which it is depends on the rows of a batch, which are not known yet."""

    def make():
        torch.manual_seed(0)
        parts = [part for _ in range(2) for part in (nn.LayerNorm(32), nn.Linear(32, 32))]
        model = nn.Sequential(*parts, nn.Linear(32, 3))
        return model, GLS(model, curvature_every=2)

    def go(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            inputs = torch.randn(2048, 32, generator=generator)
            (model(inputs) - inputs[:, :3]).square().mean().backward()
            optimizer.step()
        return snapshot(model)

    model, optimizer = make()
    go(model, optimizer, range(4))
    assert "spectral" in optimizer.report()
    saved = get_optimizer_state_dict(model, optimizer)
    dcp.save({"model": model.state_dict(), "optimizer": saved}, checkpoint_id=tmp_path)
    expected = go(model, optimizer, range(4, 8))
    assert not any("growth" in optimizer.state[model[i].weight] for i in (1, 3))

    model, optimizer = make()
    found = {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.load(found, checkpoint_id=tmp_path)
    model.load_state_dict(found["model"])
    set_optimizer_state_dict(model, optimizer, found["optimizer"])
    assert_equal(go(model, optimizer, range(4, 8)), expected)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_layer_used_elsewhere_is_loaded_as_parameters(tmp_path):
    """With Adam's state, for which a checkpoint has all that a fresh optimizer makes room for."""

    def make():
        model = make_net("mlp")
        own = list(model.head.parameters())
        # The head's forward is never called.
        model.head.forward = lambda x: nn.functional.linear(x, *own)
        groups = [{"params": [model.stem, model.first, model.second]}, {"params": own}]
        return model, GLS(groups, **OPTIONS)

    model, optimizer = make()
    train(model, optimizer, range(4))
    saved = get_optimizer_state_dict(model, optimizer)
    dcp.save({"model": model.state_dict(), "optimizer": saved}, checkpoint_id=tmp_path)
    expected = train(model, optimizer, range(4, 8))

    model, optimizer = make()
    found = {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.load(found, checkpoint_id=tmp_path)
    model.load_state_dict(found["model"])
    set_optimizer_state_dict(model, optimizer, found["optimizer"])
    assert_equal(train(model, optimizer, range(4, 8)), expected)


def test_room_for_a_state_does_not_disturb_training():
    """Asking a fresh optimizer for its state, as to save it, and then training."""
    model, plain = make_net("mlp"), make_net("mlp")
    optimizer = GLS(model, **OPTIONS)
    get_optimizer_state_dict(model, optimizer)
    assert "no rows yet" in optimizer.report()
    assert_equal(train(model, optimizer, range(5)), train(plain, GLS(plain, **OPTIONS), range(5)))


def test_room_for_a_state_does_not_disturb_a_layer_without_rows():
    """Its weight is used without its module, so that it takes Adam's update."""
    found = []
    for asked in (True, False):
        torch.manual_seed(0)
        layer = nn.Linear(4, 3)
        optimizer = GLS(layer)
        if asked:
            get_optimizer_state_dict(layer, optimizer)
        for step in range(3):
            optimizer.zero_grad()
            outputs = nn.functional.linear(torch.ones(2, 4), layer.weight, layer.bias)
            (outputs.sum() * (step + 1)).backward()
            optimizer.step()
        found.append(snapshot(layer))
    assert_equal(*found)


def in_two_groups(model):
    """As decay is for matrices alone."""
    params = list(model.parameters())
    matrices = {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1}
    return [matrices, {"params": [p for p in params if p.ndim < 2]}]


# Of a state that is flat and whole torch's own loading fails, for AdamW too.
@pytest.mark.parametrize(("full", "flatten"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("options", [{}, {"low_precision": "master"}], ids=str)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_bias_in_another_group_than_its_weight(tmp_path, options, full, flatten):
    dtype = torch.bfloat16 if options else torch.float64
    how = StateDictOptions(flatten_optimizer_state_dict=flatten, full_state_dict=full)
    runs = []
    for resumes in (False, True):
        model = Mixed().to(dtype)
        optimizer = GLS(in_two_groups(model), model=model, **{**OPTIONS, **options})
        for step in range(8):
            if resumes and step == 5:
                saved = get_optimizer_state_dict(model, optimizer, options=how)
                dcp.save({"optimizer": saved}, checkpoint_id=tmp_path)
                optimizer.detach()
                # Where there are gradients torch makes no room for a state.
                model.zero_grad()
                optimizer = GLS(in_two_groups(model), model=model, **{**OPTIONS, **options})
                found = get_optimizer_state_dict(model, optimizer, options=how)
                dcp.load({"optimizer": found}, checkpoint_id=tmp_path)
                set_optimizer_state_dict(model, optimizer, found, options=how)
            optimizer.zero_grad()
            inputs, targets = make_batch("mlp", 9, step)
            loss_of(model, (inputs.to(dtype), targets.to(dtype))).backward()
            optimizer.step()
        runs.append(snapshot(model))
    assert_equal(*runs)


@pytest.mark.parametrize("first", ["attachment", "optimizer"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_attachment_and_optimizer_are_loaded_in_any_order(first):
    """A step that makes room for a state is none of the run's."""
    runs = []
    for resumes in (False, True):
        model = Mixed()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        attachment = attach(model, optimizer, rank=4, curvature_every=2)
        for step in range(8):
            if resumes and step == 5:
                saved = get_optimizer_state_dict(model, optimizer), attachment.state_dict()
                attachment.detach()
                model.zero_grad()
                optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
                attachment = attach(model, optimizer, rank=4, curvature_every=2)
                if first == "attachment":
                    attachment.load_state_dict(saved[1])
                set_optimizer_state_dict(model, optimizer, saved[0])
                if first == "optimizer":
                    attachment.load_state_dict(saved[1])
            optimizer.zero_grad()
            loss_of(model, make_batch("mlp", 9, step)).backward()
            optimizer.step()
        runs.append(snapshot(model))
    assert_equal(*runs)
