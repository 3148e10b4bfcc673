"""What is asked of all tensors at once: by the native module, and where it is not there."""

import pytest
import torch

from gls_fused import host


@pytest.fixture(params=[True, False], ids=["native", "python"])
def native(request, monkeypatch):
    if request.param and host.native_module() is None:
        pytest.skip("the native module is not available")
    if not request.param:
        monkeypatch.setattr(host, "native_module", lambda: None)
    return request.param


def make_states():
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    states = {param: {"step": torch.ones(()), "rows": 1000 + i} for i, param in enumerate(params)}
    return params, states


def replace_state(params, states):
    states[params[0]] = dict(states[params[0]])


def replace_value(params, states):
    states[params[1]]["step"] = states[params[1]]["step"].clone()


def add_value(params, states):
    states[params[0]]["more"] = None


def remove_value(params, states):
    del states[params[1]]["rows"]


def add_state(params, states):
    states[torch.nn.Parameter(torch.ones(1))] = {}


def remove_state(params, states):
    del states[params[1]]


@pytest.mark.parametrize(
    "change",
    [replace_state, replace_value, add_value, remove_value, add_state, remove_state],
)
def test_what_states_hold(native, change):
    params, states = make_states()
    known = host.held_by(states)
    assert host.holds(states, known)
    change(params, states)
    assert not host.holds(states, known)
    assert host.holds(states, host.held_by(states))


def test_a_state_that_is_no_dict(native):
    class Other:
        def values(self):
            return [1]

    states = {torch.nn.Parameter(torch.ones(1)): Other()}
    assert host.holds(states, host.held_by(states))


def test_a_sparse_gradient_is_found(native):
    params, _ = make_states()
    assert not host.has_sparse_gradient(params)
    params[0].grad = torch.ones(2)
    assert not host.has_sparse_gradient(params)
    params[1].grad = torch.ones(2).to_sparse()
    assert host.has_sparse_gradient(params)


def test_a_frozen_gradient_is_found(native):
    params, _ = make_states()
    params[0].grad = torch.ones(2)
    params[1].requires_grad_(False)
    assert not host.has_frozen_gradient(params)
    params[1].grad = torch.zeros(2)
    assert host.has_frozen_gradient(params)
