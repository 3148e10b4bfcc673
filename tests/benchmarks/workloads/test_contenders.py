"""What is timed: that contenders see the same, and how their state is counted."""

import torch
from tiny import TINY
from torch import nn

from benchmarks.workloads.contenders import CONTENDERS, Trainer, state_bytes
from benchmarks.workloads.shapes import synthesise


def test_state_is_counted_by_memory_once():
    model = nn.Linear(8, 4)
    adam = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 8)).sum().backward()
    adam.step()
    # Two averages per element and a step per parameter, in float32.
    assert state_bytes(adam) == 4 * (2 * 36 + 2)
    average = adam.state[model.weight]["exp_avg"]
    adam.state[model.weight]["again"] = average.view(-1)[:2]
    assert state_bytes(adam) == 4 * (2 * 36 + 2)
    assert state_bytes(torch.optim.SGD(model.parameters())) == 0


def test_trainers_of_one_seed_see_the_same():
    data = synthesise((3, 32, 32), 96)
    first, second = (Trainer(TINY, data, CONTENDERS[name].build, 32) for name in ("sgd", "adam"))
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)
    first.next_steps(1)
    second.next_steps(1)
    assert torch.equal(first.loss, second.loss)
