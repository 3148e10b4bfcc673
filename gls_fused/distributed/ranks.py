"""What ranks must agree on: the layers, and the sums over all ranks' rows, hence P.

P is one matrix for all ranks: the sums over a step's rows are added up over the ranks before they
enter the statistics. Everything else that GLS computes is linear in the gradients, which
DistributedDataParallel and fully_shard average.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


class Ranks:
    """The processes that share P.

    Args:
        group: a process group; None for the default one, if there is one at the time of a step.
    Raises:
        TypeError: `group` is not a process group that this process is a member of.
    """

    def __init__(self, group: Any = None) -> None:
        if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            raise TypeError(
                "process_group: expected a ProcessGroup with this process as a member, or None; "
                f"got {group!r}"
            )
        self.group = group
        self._agreed = False

    @property
    def size(self) -> int:
        """How many they are; 1 where torch.distributed is not initialised."""
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self.group)

    def sum(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The sum over the ranks of each of these flat tensors.

        One all-reduce, whatever their number (one for each dtype and device where they differ).
        """
        alike: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for index, part in enumerate(parts):
            alike.setdefault((part.dtype, part.device), []).append(index)
        joint = list(parts)
        for indices in alike.values():
            buffer = torch.cat([parts[index] for index in indices])
            dist.all_reduce(buffer, group=self.group)
            pieces = torch.split(buffer, [len(parts[index]) for index in indices])
            for index, piece in zip(indices, pieces, strict=True):
                joint[index] = piece
        return joint

    def agree(self, terms: Callable[[], Sequence[str]]) -> None:
        """Compare what each rank is about to do; once, and again after `disagree`.

        Args:
            terms: asked where they are compared.

        Raises:
            RuntimeError: on every rank, naming the first terms that differ.
        """
        if self._agreed:
            return
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, list(terms()), group=self.group)
        for rank, theirs in enumerate(everyone):
            if theirs != everyone[0]:
                ours, theirs = _first_difference(everyone[0], theirs)
                raise RuntimeError(
                    f"ranks must agree: rank 0 of the group has {ours}, rank {rank} has {theirs}"
                )
        self._agreed = True

    def disagree(self) -> None:
        """The terms may have changed."""
        self._agreed = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        # A process group is no data.
        return Ranks(self.group)

    def __reduce__(self) -> tuple[type[Ranks], tuple[None]]:
        # As DistributedDataParallel does it: who loads a pickle has the default group.
        return Ranks, (None,)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile, whose names it is known by.

    Raises:
        ValueError: the model is, or holds, a wrapper under which GLS cannot work.
    """
    for module in model.modules():
        if isinstance(module, DataParallel):
            raise ValueError(
                "model: nn.DataParallel copies the layers to threads, where GLS does not see their "
                "inputs; use nn.parallel.DistributedDataParallel"
            )
        fsdp = sys.modules.get("torch.distributed.fsdp")
        if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
            raise ValueError(
                "model: FullyShardedDataParallel flattens the weights that GLS needs as matrices; "
                "use torch.distributed.fsdp.fully_shard"
            )
    while True:
        compiled = sys.modules.get("torch._dynamo.eval_frame")
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif compiled is not None and isinstance(model, compiled.OptimizedModule):
            model = model._modules["_orig_mod"]
        else:
            return model


def _first_difference(ours: list[str], theirs: list[str]) -> tuple[str, str]:
    for pair in zip(ours, theirs, strict=False):
        if pair[0] != pair[1]:
            return repr(pair[0]), repr(pair[1])
    return f"{len(ours)} terms", f"{len(theirs)} terms"
