"""GLS under DistributedDataParallel equals GLS in one process on the joint batch."""

import pickle

import ddp_cases
import pytest
import torch
import torch.distributed as dist
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


def test_pickle_leaves_the_process_group_out():
    """Who loads it has the default one."""
    group = dist.ProcessGroup(dist.HashStore(), 0, 1)
    model = nn.Linear(2, 2)
    optimizer = GLS(model, process_group=group)
    _, loaded = pickle.loads(pickle.dumps((model, optimizer)))
    assert optimizer._preconditioner.ranks.group is group
    assert loaded._preconditioner.ranks.group is None


@pytest.mark.parametrize("group", ["gloo", torch.distributed.GroupMember.NON_GROUP_MEMBER])
def test_process_group_is_checked(group):
    with pytest.raises(TypeError, match="process_group: expected a ProcessGroup"):
        GLS(nn.Linear(2, 2), process_group=group)
    with pytest.raises(TypeError, match="process_group: expected a ProcessGroup"):
        attach(nn.Linear(2, 2), process_group=group)
