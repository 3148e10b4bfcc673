"""Schedules: the shape of a rate over a run, and that optimizers follow it."""

import pytest
import torch
from torch import nn

from benchmarks.workloads.optimizers import Together
from benchmarks.workloads.schedule import CONSTANT, Schedule, follow


def test_rates_rise_and_fall():
    linear = Schedule("linear", warmup=2)
    assert [linear.factor(step, 6) for step in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    cosine = Schedule("cosine")
    assert [cosine.factor(step, 4) for step in range(4)] == pytest.approx(
        [1, 0.8535534, 0.5, 0.1464466]
    )
    assert [Schedule("constant", 3).factor(step, 9) for step in range(4)] == pytest.approx(
        [1 / 3, 2 / 3, 1, 1]
    )


def test_every_group_follows_and_a_constant_rate_is_left_alone():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    both = Together(
        [torch.optim.SGD(first.parameters(), lr=0.1), torch.optim.SGD(second.parameters(), lr=0.2)]
    )
    set_rates = follow(Schedule("linear"), both, 4)
    set_rates(2)
    assert [group["lr"] for group in both.param_groups] == [0.05, 0.1]
    set_rates(0)
    assert [group["lr"] for group in both.param_groups] == [0.1, 0.2]
    # What steps has no groups, as a constant rate needs none.
    follow(CONSTANT, object(), 4)(2)
