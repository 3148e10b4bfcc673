"""What the cases share: training on a rank's part of each batch, or in one process on all of it."""

import functools

import torch
import torch.distributed as dist
from nets import loss_of, make_batch
from tolerances import SAME_STEPS, assert_near
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

OPTIONS = {"rank": 4, "curvature_every": 3, "lr": 0.01, "damping": 0.1}
STEPS = 20
STATISTICS = ("basis", "core", "trace", "core_inverse", "shift", "gram", "matrix")


@functools.cache
def alone():
    """A group of this process only: what is trained with it communicates with nobody."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return groups[dist.get_rank()]


def part_of(batch, sizes):
    """This rank's part of a batch that is split into parts of these sizes."""
    return tuple(x.split(sizes)[dist.get_rank()] for x in batch)


def even(n):
    return [n // dist.get_world_size()] * dist.get_world_size()


def uneven():
    """Together no more rows than a sketch takes all of."""
    return [3, 5, 2, 4][: dist.get_world_size()]


def train_on_part(model, optimizer, kind, sizes, steps=range(STEPS), average=None):
    """With the loss that makes averaging over the ranks the mean over the joint batch."""
    weight = sizes[dist.get_rank()] * len(sizes) / sum(sizes)
    for step in steps:
        optimizer.zero_grad()
        batch = part_of(make_batch(kind, sum(sizes), step), sizes)
        (loss_of(model, batch) * weight).backward()
        if average is not None:
            average(model)
        optimizer.step()


def train_on_all(model, optimizer, kind, n, steps=range(STEPS)):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, make_batch(kind, n, step)).backward()
        optimizer.step()


def whole(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same_weights(model, expected):
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert_near(whole(p), q, SAME_STEPS)


def assert_same_bits(tensor):
    """On all ranks."""
    everyone = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, tensor.contiguous())
    assert all(torch.equal(other, tensor) for other in everyone)


def assert_one_preconditioner(states):
    """U, M, t and what is made of them are the same bits on all ranks."""
    found = 0
    for state in states:
        for name in STATISTICS:
            if name in state:
                found += 1
                assert_same_bits(state[name])
    assert found


class Traffic(TorchDispatchMode):
    """The elements of every all-reduce, those sent in exchanges, all other collectives' names."""

    def __init__(self):
        super().__init__()
        self.reduced, self.exchanged, self.others = [], [], []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "c10d":
            if op is torch.ops.c10d.allreduce_.default:
                self.reduced.append(sum(tensor.numel() for tensor in args[0]))
            elif op is torch.ops.c10d.alltoall_base_.default:
                self.exchanged.append(args[1].numel())
            else:
                self.others.append(str(op))
        elif op.namespace == "_c10d_functional":
            self.others.append(str(op))
        return op(*args, **(kwargs or {}))
