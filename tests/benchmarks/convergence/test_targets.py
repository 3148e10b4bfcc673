"""The way to a loss: interpolated, from the right run, and never reached."""

import math

import pytest

from benchmarks.convergence.targets import NEVER, Way, best_loss, share_of, way_to


def test_the_first_crossing_counts(curve_of):
    curve = curve_of([1.0, 0.6, 0.8, 0.2])
    assert way_to(curve, "train_loss", 0.8) == Way(150, 1.5)
    assert way_to(curve, "train_loss", 0.5) == pytest.approx((350, 3.5))
    assert way_to(curve, "validation_loss", 0.4) == Way(400, 4)
    assert way_to(curve, "train_loss", 1.5) == Way(100, 1)
    assert way_to(curve, "train_loss", 0.1) == NEVER
    # Nothing is known between a loss that is not finite and the next.
    assert way_to(curve_of([None, 0.5]), "train_loss", 0.5) == Way(200, 2)


def test_shares_are_of_the_baselines_own_way(curve_of):
    adam = curve_of([1.0, 0.5, 0.7])
    assert best_loss(adam, "train_loss") == 0.5
    assert share_of(adam, adam, "train_loss") == Way(1, 1)
    fast = curve_of([0.6, 0.4], seconds=3.0)
    assert share_of(fast, adam, "validation_loss") == pytest.approx((0.75, 2.25))
    assert share_of(curve_of([0.9]), adam, "train_loss").steps == math.inf
    assert share_of(fast, curve_of([None]), "train_loss") is None
