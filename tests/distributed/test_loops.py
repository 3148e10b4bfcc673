"""What a training loop does around a step gives on ranks what it gives in one process."""

import loop_cases
import pytest
from launch import check_case


@pytest.mark.parametrize("name", loop_cases.CASES)
def test_two_ranks(name):
    check_case("loop_cases", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", loop_cases.CASES)
def test_four_ranks(name):
    check_case("loop_cases", name, world_size=4)
