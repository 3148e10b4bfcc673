"""GLS under DistributedDataParallel equals GLS in one process on the joint batch."""

import ddp_cases
import pytest
import torch
from launch import check_case
from torch import nn

from gls_fused import GLS, attach


@pytest.mark.parametrize("name", ddp_cases.CASES)
def test_two_ranks(name):
    check_case("ddp_cases", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ddp_cases.CASES)
def test_four_ranks(name):
    check_case("ddp_cases", name, world_size=4)


@pytest.mark.parametrize("build", [GLS, attach])
def test_data_parallel_is_refused(build):
    with pytest.raises(ValueError, match=r"nn\.DataParallel .* use .*DistributedDataParallel"):
        build(nn.DataParallel(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"nn\.DataParallel"):
        build(nn.Sequential(nn.Linear(2, 2), nn.DataParallel(nn.Linear(2, 2))))


@pytest.mark.parametrize("group", ["gloo", torch.distributed.GroupMember.NON_GROUP_MEMBER])
def test_process_group_is_checked(group):
    with pytest.raises(TypeError, match="process_group: expected a ProcessGroup"):
        GLS(nn.Linear(2, 2), process_group=group)
    with pytest.raises(TypeError, match="process_group: expected a ProcessGroup"):
        attach(nn.Linear(2, 2), process_group=group)
