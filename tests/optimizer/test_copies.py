"""Copies and pickles of an optimizer, with the model that it trains."""

import copy
import gc
import pickle

import pytest
import torch
from nets import assert_equal, assert_same_state, make_net, make_trained, snapshot, train

from gls_fused import GLS, attach


def through_pickle(objects):
    return pickle.loads(pickle.dumps(objects))


@pytest.mark.parametrize("how", [copy.deepcopy, through_pickle])
@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_copy_with_its_model_trains_alike_and_apart(how, order, kind):
    model, optimizer = make_trained(kind=kind)
    if order == "model first":
        twin, copied = how((model, optimizer))
    else:
        copied, twin = how((optimizer, model))
    before = snapshot(model)
    found = train(twin, copied, range(4, 8), kind)
    assert_equal(snapshot(model), before)
    assert_equal(found, train(model, optimizer, range(4, 8), kind))
    assert_same_state(copied.state_dict(), optimizer.state_dict())
    copied.detach()
    assert type(twin.stem) is twin.stem.__class__
    train(model, optimizer, [8], kind)


def test_copy_of_a_detached_optimizer_is_detached():
    _, optimizer = make_trained()
    optimizer.detach()
    copied = copy.deepcopy(optimizer)
    with pytest.raises(RuntimeError, match="no longer captured"):
        copied.step()


def test_shallow_copy_shares_everything_and_may_go():
    alone = make_trained()
    model, optimizer = make_trained()
    copied = copy.copy(optimizer)
    train(model, optimizer, [4])
    train(model, copied, [5])
    del copied
    gc.collect()
    assert_equal(train(model, optimizer, [6]), train(*alone, range(4, 7)))
    assert_same_state(optimizer.state_dict(), alone[1].state_dict())


def test_pickle_without_layers_is_refused():
    """As the base class alone would have made it."""
    _, optimizer = make_trained()
    bare = torch.optim.Optimizer.__getstate__(optimizer)
    with pytest.raises(ValueError, match="layers"):
        GLS.__new__(GLS).__setstate__(bare)


def test_pickle_of_before_takes_further_groups():
    """Whose options are those that the optimizer was made with, and what has been added since."""
    _, optimizer = make_trained()
    state = copy.deepcopy(optimizer.__getstate__())
    for options in (state["defaults"], *state["param_groups"]):
        del options["max_growth"]
    for group in state["param_groups"]:
        group["version"] = 5
    found = GLS.__new__(GLS)
    found.__setstate__(state)
    found.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "lr": 0.5})
    assert [group["max_growth"] for group in found.param_groups] == [None] * 2


@pytest.mark.parametrize("how", [copy.deepcopy, through_pickle])
def test_copy_of_an_attachment_follows_the_copied_optimizer(how):
    model = make_net("mlp")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    handle = attach(model, optimizer, rank=4, curvature_every=2)
    train(model, optimizer, range(4))
    twin, copied, twin_handle = how((model, optimizer, handle))
    found = train(twin, copied, range(4, 8))
    assert_equal(found, train(model, optimizer, range(4, 8)))
    assert twin_handle.state_dict()["step"] == handle.state_dict()["step"] == 8
    twin_handle.detach()
    assert type(twin.stem) is twin.stem.__class__
