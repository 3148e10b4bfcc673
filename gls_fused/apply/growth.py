"""What `max_growth` allows: longer steps in layers whose directions grow.

The rate is then growth lr, growth = sqrt(a / u): a the bias-corrected mean of v over the layer, u
the same of many more steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gls_fused.distributed.sharding import rows_here


def measure_growths_(
    backend: ModuleType,
    squares: Sequence[Tensor],
    growths: Sequence[Tensor],
    slows: Sequence[Tensor],
    steps: Sequence[Tensor],
    options: Mapping[str, Any],
    skip: Tensor | None,
    shards: tuple[Any, int] | None,
) -> None:
    """See `reference.measure_growths_`; every `curvature_every` steps of the layers' group.

    Args:
        squares: v of each layer that has taken a step, by matrix.
        options: of the group.
        shards: the mesh, and its dimension, over which each v is spread; None where it is not.
    """
    if shards is not None:
        here = [rows_here(each) for each in squares]
        means = [v.sum() / max(1, each.numel()) for v, each in zip(here, squares, strict=True)]
        joint = torch.stack(means)
        dist.all_reduce(joint, group=shards[0].get_group(shards[1]))
        squares = joint.unbind()
    backend.measure_growths_(
        squares,
        growths,
        slows,
        steps,
        beta2=options["beta2"],
        every=options["curvature_every"],
        most=options["max_growth"],
        skip=skip,
    )
