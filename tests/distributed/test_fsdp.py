"""GLS under fully_shard equals GLS in one process on the joint batch."""

import fsdp_cases
import pytest
from launch import check_case


@pytest.mark.parametrize("name", fsdp_cases.CASES)
def test_two_ranks(name):
    check_case("fsdp_cases", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", fsdp_cases.CASES)
def test_four_ranks(name):
    check_case("fsdp_cases", name, world_size=4)
