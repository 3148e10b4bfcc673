"""The way to a loss: interpolated, from the right run, and never reached."""

import math

import pytest

from benchmarks.convergence.targets import (
    NEVER,
    Point,
    Way,
    best_loss,
    curves_of,
    share_of,
    way_to,
)


def points(losses, seconds=1.0):
    """After every hundred steps, each of so many seconds."""
    return [Point(100 * i, seconds * i, loss) for i, loss in enumerate(losses, start=1)]


def test_the_first_crossing_counts():
    curve = points([1.0, 0.6, 0.8, 0.2])
    assert way_to(curve, 0.8) == Way(150, 1.5)
    assert way_to(curve, 0.5) == pytest.approx((350, 3.5))
    assert way_to(curve, 1.5) == Way(100, 1)
    assert way_to(curve, 0.1) == NEVER
    # Nothing is known between a loss that is not finite and the next.
    assert way_to(points([None, 0.5]), 0.5) == Way(200, 2)


def test_shares_are_of_the_baselines_own_way():
    adam = points([1.0, 0.5, 0.7])
    assert best_loss(adam) == 0.5
    assert share_of(adam, adam) == Way(1, 1)
    assert share_of(points([0.6, 0.4], seconds=3.0), adam) == pytest.approx((0.75, 2.25))
    assert share_of(points([0.9]), adam).steps == math.inf
    assert share_of(points([0.6]), points([None])) is None


def test_validation_losses_of_epochs_count_beside_the_evaluations(run_of, curve_of):
    """An evaluation and an epoch's end that are one step count once."""
    runs = {("mlp", "adam"): {0: run_of([0.5, 0.4, 0.3])}}
    evaluations = curve_of([0.9, 0.7], seconds=5.0, epochs=3)
    found = curves_of(runs, evaluations, {"mlp": 50})["mlp", "adam"][0]
    assert found["train_loss"] == [Point(100, 5, 0.9), Point(200, 10, 0.7)]
    assert found["validation_loss"] == [
        Point(50, 1, 1.0), Point(100, 5, 1.8), Point(150, 3, 0.6), Point(200, 10, 1.4),
    ]  # fmt: skip
