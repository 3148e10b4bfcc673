"""What step() keeps from one step to the next never outlives what it was made of."""

import copy

import pytest
import torch
from nets import KINDS, OPTIONS, assert_equal, loss_of, make_batch, make_net
from torch import nn

from gls_fused import GLS
from gls_fused.apply.fallback import Others


def other_scale(model, optimizer):
    optimizer.param_groups[0]["normalize"] = "rms"


def no_momentum(model, optimizer):
    optimizer.param_groups[0]["momentum"] = 0.0


def a_bound(model, optimizer):
    optimizer.param_groups[0].update(max_change=0.01, lr=0.3)


def frozen_bias(model, optimizer):
    model.first.bias.requires_grad_(False)


def frozen_weight(model, optimizer):
    model.first.weight.requires_grad_(False)


def cleared_state(model, optimizer):
    optimizer.state.clear()


def state_of_one_layer_gone(model, optimizer):
    del optimizer.state[model.second.weight]


def cloned_tensors(model, optimizer):
    for state in optimizer.state.values():
        for key, value in state.items():
            state[key] = value.clone() if isinstance(value, torch.Tensor) else value


def copied_dicts(model, optimizer):
    for param, state in optimizer.state.items():
        optimizer.state[param] = {k: v * 0.5 if k == "exp_avg" else v for k, v in state.items()}


def swapped_averages(model, optimizer):
    first, second = (optimizer.state[p.bias] for p in (model.first, model.second))
    first["exp_avg"], second["exp_avg"] = second["exp_avg"] + 1, first["exp_avg"] + 1


def loaded_state(model, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def double(model, optimizer):
    model.to(torch.float64)


def single(model, optimizer):
    model.to(torch.float32)


def sixteen_bits(model, optimizer):
    model.to(torch.bfloat16)


def sixteen_bits_and_a_master(model, optimizer):
    model.to(torch.bfloat16)
    optimizer.param_groups[0]["low_precision"] = "master"


def bias_in_a_group_of_its_own(model, optimizer):
    bias = model.first.bias
    group = optimizer.param_groups[0]
    group["params"] = [param for param in group["params"] if param is not bias]
    optimizer.add_param_group({"params": [bias], "lr": 0.05})


def left_out(model, optimizer):
    group = optimizer.param_groups[0]
    group["params"] = [param for param in group["params"] if param is not model.second.weight]


CHANGES = [
    other_scale, no_momentum, a_bound, frozen_bias, frozen_weight, cleared_state,
    state_of_one_layer_gone, cloned_tensors, copied_dicts, swapped_averages, loaded_state, double,
    single, sixteen_bits, sixteen_bits_and_a_master, bias_in_a_group_of_its_own, left_out,
]  # fmt: skip


# The averages of 16 bits are those of float32, so that only the parameters tell.
FROM_SINGLE = [double, sixteen_bits, sixteen_bits_and_a_master]


def run(kind, change, when, *, keeps):
    model = make_net(kind).float() if change in FROM_SINGLE else make_net(kind)
    optimizer = GLS(model, **{**OPTIONS, "max_change": None, "normalize": "factored"})
    for step in range(8):
        if step == when:
            change(model, optimizer)
        if not keeps:
            optimizer._followed.drop()
        optimizer.zero_grad()
        inputs, labels = make_batch(kind, 12, step)
        inputs = inputs.to(next(model.parameters()).dtype)
        loss_of(model, (inputs, labels)).backward()
        optimizer.step()
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("when", [4, 5], ids=["before a step that gathers", "before another"])
@pytest.mark.parametrize("kind", KINDS)
def test_changes_between_steps_are_seen(kind, when, change):
    kept, anew = (run(kind, change, when, keeps=keeps) for keeps in (True, False))
    assert_equal(kept, anew)
    assert any(
        not torch.equal(ours, theirs.to(ours))
        for ours, theirs in zip(kept, run(kind, lambda *_: None, when, keeps=True), strict=True)
    ) or change in (cloned_tensors, loaded_state)


@pytest.mark.parametrize("policy", ["nearest", "stochastic", "master"])
def test_one_layer_of_two_is_cast(policy):
    """Its averages stay as they are, and it can no longer step together with the other."""
    found = []
    for keeps in (True, False):
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        optimizer = GLS(model, low_precision=policy, site="step", **OPTIONS)
        for step in range(6):
            if step == 3:
                model[0].to(torch.bfloat16)
            if not keeps:
                optimizer._followed.drop()
            optimizer.zero_grad()
            for layer in model:
                layer(torch.randn(6, 4).to(layer.weight.dtype)).square().sum().backward()
            optimizer.step()
        found.append([param.detach() for param in model.parameters()])
    assert_equal(*found)


class Scaled(nn.Module):
    """Parameters that no layer owns, of one and of two axes, between layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)
        self.norm, self.table = nn.LayerNorm(6), nn.Parameter(torch.randn(4, 6))

    def forward(self, x, place):
        hidden = self.norm(self.first(x))
        return self.second(hidden if place is None else hidden + self.table[place].to(hidden))


def table_of_double(model, optimizer):
    model.table.data = model.table.data.double()


def table_by_columns(model, optimizer):
    model.table.data = model.table.data.t().contiguous().t()


def negated_gradient(model, optimizer):
    def negate(param):
        param.grad = torch._neg_view(param.grad.neg())

    model.norm.bias.register_post_accumulate_grad_hook(negate)


def negated_parameter(model, optimizer):
    model.norm.bias.data = torch._neg_view(model.norm.bias.data.neg())


def gradient_of_16_bits(model, optimizer):
    model.norm.bias.grad = None
    model.norm.bias.grad_dtype = torch.bfloat16


def tensor_rate(model, optimizer):
    optimizer.param_groups[0]["lr"] = torch.tensor(0.02)


def averages_of_others(model, optimizer):
    state = optimizer.state[model.norm.weight]
    state["exp_avg"] = state["exp_avg"] + 1


def overflow(model, optimizer):
    optimizer.found_inf = torch.tensor(1.0)


def nothing(model, optimizer):
    pass


OF_OTHERS = [
    table_of_double, table_by_columns, negated_gradient, negated_parameter, tensor_rate, overflow,
    averages_of_others, no_momentum, cleared_state, cloned_tensors, loaded_state, double, nothing,
]  # fmt: skip
# Gradients of another dtype came with torch 2.10.
OF_OTHERS += [gradient_of_16_bits] if hasattr(nn.Parameter, "grad_dtype") else []


@pytest.mark.parametrize("change", OF_OTHERS, ids=lambda change: change.__name__)
def test_changes_of_parameters_that_no_layer_owns_are_seen(change, monkeypatch):
    taken, plain = [], Others.step_
    monkeypatch.setattr(Others, "step_", lambda *args: taken.append(plain(*args)) or taken[-1])
    found = []
    for keeps in (True, False):
        model = Scaled()
        optimizer = GLS(model, **OPTIONS)
        if not keeps:
            assert taken[2:4] == [True, True]
            assert change is not nothing or taken[2:] == [True, True, False, False, False, True]
            monkeypatch.setattr(Others, "step_", lambda *_: False)
        for step in range(8):
            if step == 4:
                change(model, optimizer)
            optimizer.zero_grad()
            inputs = torch.randn(7, 5, generator=torch.Generator().manual_seed(step))
            # In one step the table has no gradient, and in the next one the norm's bias.
            place = None if step == 4 else step % 4
            model(inputs.to(model.first.weight.dtype), place).square().sum().backward()
            if step == 5:
                model.norm.bias.grad = None
            optimizer.step()
            optimizer.found_inf = None
        found.append([param.detach() for param in model.parameters()])
    assert_equal(*found)


def test_gradients_that_come_and_go():
    """A layer without one takes no step, and steps again when it has one."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    optimizer = GLS(model, curvature_every=1)
    for used in (0, 1, 1, 0, 0, 1):
        before = [layer.weight.detach().clone() for layer in model]
        optimizer.zero_grad()
        model[used](torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        moved = [
            not torch.equal(old, layer.weight) for old, layer in zip(before, model, strict=True)
        ]
        assert moved == [used == 0, used == 1]


def test_nothing_is_sorted_again_while_nothing_changes(monkeypatch):
    from gls_fused.apply import kept

    model = make_net("mlp")
    optimizer = GLS(model, **OPTIONS)
    made = []
    plain = kept.Alike.__init__

    def counted(self, *arguments):
        made.append(step)
        plain(self, *arguments)

    monkeypatch.setattr(kept.Alike, "__init__", counted)
    for step in range(25):
        optimizer.zero_grad()
        loss_of(model, make_batch("mlp", 12, step)).backward()
        optimizer.step()
    # The first step fills the states.
    assert set(made) <= {0, 1}
