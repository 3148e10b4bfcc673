"""The search of learning rates."""

import math

import pytest

from benchmarks.workloads.search import next_half_decade, search_rate, search_settings


@pytest.mark.parametrize(
    ("value", "up", "expected"),
    [
        (1.0, True, 3.0),
        (0.3, True, 1.0),
        (0.003, True, 0.01),
        (0.2, True, 0.3),
        (0.1, False, 0.03),
        (3e-4, False, 1e-4),
        (0.4, False, 0.3),
    ],
)
def test_grids_grow_by_half_decades(value, up, expected):
    assert next_half_decade(value, up=up) == expected


def test_a_search_extends_its_grid_at_an_edge():
    asked = []

    def evaluate(lr):
        asked.append(lr)
        return abs(math.log10(lr) + 4)

    assert search_rate((1e-3, 3e-3), evaluate) == 1e-4
    assert asked == [1e-3, 3e-3, 3e-4, 1e-4]


def test_everyone_has_the_same_tries_and_the_grid_grows_where_its_best_is_an_edge():
    asked = []

    def evaluate(lr, decay):
        asked.append((lr, decay))
        # The best is at 1e-4 with a weight decay of .1.
        return abs(math.log10(lr) + 4) + abs(decay - 0.1)

    assert search_settings((1e-3, 3e-3), (0.0, 0.01, 0.1), 8, evaluate) == (1e-4, 0.1)
    assert len(asked) == len(set(asked)) == 8
    assert asked[:5] == [(1e-3, 0), (3e-3, 0), (3e-4, 0), (1e-4, 0), (3e-5, 0)]
    assert asked[5:7] == [(1e-4, 0.01), (1e-4, 0.1)]


@pytest.mark.parametrize("tries", [2, 5])
def test_a_grid_of_one_rate_leaves_the_decays_to_search(tries):
    asked = []

    def evaluate(lr, decay):
        asked.append((lr, decay))
        return abs(decay - 0.01)

    assert search_settings((0.3,), (0.0, 0.01, 0.1), tries, evaluate) == (0.3, 0.01)
    assert asked == [(0.3, 0.0), (0.3, 0.01), (0.3, 0.1)][:tries]


def test_a_search_goes_on_where_all_diverge():
    asked = []
    search_settings((1.0, 3.0), (0.0, 0.1), 6, lambda *pair: asked.append(pair) or math.inf)
    assert len(set(asked)) == 6
    assert min(lr for lr, _ in asked) < 0.1
