"""The search of learning rates."""

import math

import pytest

from benchmarks.workloads.search import next_half_decade, search_rate


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
