"""Orthogonal steps of layers whose rows are spread over ranks, as fully_shard leaves them.

A factor needs the whole matrix. Each rank computes those of some layers: a layer's rows go to one
rank, and each rank gets its rows of the factor back.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gls_fused.distributed.sharding import chunk_of, rows_here, shards_of
from gls_fused.reference import UpdatesOf


def update_spectral_shards_(
    backend: ModuleType,
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *others: Any,
    layer_sizes: Sequence[int],
    **options: Any,
) -> None:
    """`reference.update_spectral_layers_` for layers that are sharded over the same ranks.

    Args:
        params: DTensors, as are gradients, exp_avgs and exp_avg_sqs.
    """
    shards = shards_of(params[0])
    assert shards is not None
    group = shards[0].get_group(shards[1])
    firsts = itertools.accumulate(layer_sizes[:-1], initial=0)
    outputs = [len(params[first]) for first in firsts]

    def updates_of(averages: Sequence[Tensor], split: int) -> list[Tensor]:
        return spread_updates(averages, outputs, group, split, backend.orthogonal_updates)

    here = (
        [rows_here(tensor) for tensor in tensors]
        for tensors in (params, gradients, exp_avgs, exp_avg_sqs)
    )
    backend.update_spectral_layers_(
        *here, *others, layer_sizes=layer_sizes, updates_of=updates_of, **options
    )


def spread_updates(
    parts: Sequence[Tensor], outputs: Sequence[int], group: Any, split: int, updates_of: UpdatesOf
) -> list[Tensor]:
    """This rank's rows of the orthogonal updates of matrices whose rows are spread over ranks.

    Two exchanges, there and back: in each a rank sends its rows of the matrices of others, and gets
    the rows of its own.

    Args:
        parts: this rank's rows of each matrix, [*, k], all of one dtype.
        outputs: the rows of each matrix in all, which ranks have as torch.chunk deals them out.
        updates_of: see `gls_fused.reference.orthogonal_updates`.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    widths = [part.shape[1] for part in parts]
    owners = choose_owners(list(zip(outputs, widths, strict=True)), ranks)
    mine = [i for i, owner in enumerate(owners) if owner == rank]
    # By the rank that they go to.
    order = sorted(range(len(parts)), key=lambda i: owners[i])
    sizes = [parts[i].numel() for i in order]
    sent = [sum(parts[i].numel() for i in order if owners[i] == each) for each in range(ranks)]
    lent = [[len(chunk_of(outputs[i], ranks, each)) for i in mine] for each in range(ranks)]
    lent_sizes = [[n * widths[i] for n, i in zip(rows, mine, strict=True)] for rows in lent]
    received = [sum(each) for each in lent_sizes]

    flat = torch.cat([parts[i].reshape(-1) for i in order])
    found = flat.new_empty(sum(received))
    dist.all_to_all_single(found, flat, received, sent, group=group)
    pieces = torch.split(found, [size for each in lent_sizes for size in each])
    matrices = [
        torch.cat(pieces[place :: len(mine)]).view(-1, widths[i]) for place, i in enumerate(mine)
    ]
    updates = updates_of(matrices, split)
    by_layer = [
        torch.split(update, [rows[place] for rows in lent]) for place, update in enumerate(updates)
    ]
    back = [rows[each].reshape(-1) for each in range(ranks) for rows in by_layer]
    dist.all_to_all_single(flat, torch.cat(back) if back else found, sent, received, group=group)
    results = dict(zip(order, torch.split(flat, sizes), strict=True))
    return [results[i].view_as(part) for i, part in enumerate(parts)]


def choose_owners(shapes: Sequence[tuple[int, int]], ranks: int) -> list[int]:
    """Which rank computes the factor of each matrix: the costliest first, to who has least to do.

    The same on every rank, as it depends on the shapes alone.
    """
    costs = [min(shape) ** 2 * (2 * max(shape) + min(shape)) for shape in shapes]
    owners, loads = [0] * len(shapes), [0] * ranks
    for i in sorted(range(len(shapes)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners
