"""What `max_growth` allows: longer steps in layers whose directions grow.

The rate is then growth lr, growth = sqrt(a / u): a the bias-corrected mean of v over the layer, u
the same of many more steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gls_fused.capture.layer import Layer
from gls_fused.curvature.estimate import State
from gls_fused.distributed.sharding import is_sharded, rows_here
from gls_fused.reference import measure_growth


@torch.no_grad()
def measure_growths_(
    layers: Sequence[Layer],
    states: Mapping[Tensor, State],
    options: Mapping[str, Any],
    skip: Tensor | None,
) -> None:
    """See `reference.measure_growth`, of layers whose states have a "growth", in place.

    In steps that gather, after the update. Under fully_shard it is a collective.

    Args:
        options: of the group of the layers' weights.
        skip: 0-d bool; where it is true nothing changes.
    """
    if options["max_growth"] is None or (skip is not None and skip.is_cpu and skip):
        return
    together: dict[Any, list[Layer]] = {}
    for layer in layers:
        state = states[layer.weight]
        if "growth" in state:
            squares = state["exp_avg_sq"]
            shards = layer.shards if is_sharded(squares) and not layer.stacked else None
            together.setdefault((shards, squares.dtype, squares.device), []).append(layer)
    for (shards, *_), alike in together.items():
        own = [states[layer.weight] for layer in alike]
        _measure_together_(alike, own, options, skip, shards)


def _measure_together_(
    layers: Sequence[Layer],
    states: Sequence[State],
    options: Mapping[str, Any],
    skip: Tensor | None,
    shards: tuple[Any, int] | None,
) -> None:
    squares: list[Tensor] = []
    counts: list[int] = []
    steps: list[Tensor] = []
    for layer, state in zip(layers, states, strict=True):
        found, here = state["exp_avg_sq"], rows_here(state["exp_avg_sq"])
        matrices = [here] if layer.blocks is None else here.unbind()
        squares += [each if each.numel() else each.new_zeros(1) for each in matrices]
        counts += [max(1, found.numel() // (layer.blocks or 1))] * len(matrices)
        steps += [state["step"]] * len(matrices)
    if not squares:
        return
    # Of numbers that are none below 0 the sum.
    sums = torch._foreach_norm(squares, 1)
    means = torch.stack(torch._foreach_div(sums, counts))
    if shards is not None:
        dist.all_reduce(means, group=shards[0].get_group(shards[1]))
    kept = [[rows_here(state[key]).view(-1) for state in states] for key in ("growth", "slow_sq")]
    found = measure_growth(
        means, torch.cat(kept[1]), torch.stack(steps), beta2=options["beta2"],
        every=options["curvature_every"], most=options["max_growth"],
    )  # fmt: skip
    for tensors, values in zip(kept, found, strict=True):
        if skip is not None:
            values = torch.where(skip.to(values.device), torch.cat(tensors), values)
        torch._foreach_copy_(tensors, torch.split(values, [len(tensor) for tensor in tensors]))
