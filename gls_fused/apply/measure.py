"""What is measured of layers every `curvature_every` steps, after the update.

The root mean squares of weights, of which `max_change` is a share. And what `max_growth` allows,
longer steps in layers whose directions grow: the rate is growth lr, growth = sqrt(a / u), a the
bias-corrected mean of v over the layer, u the same of many more steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gls_fused.apply.buffers import SQUARES
from gls_fused.apply.kept import Alike
from gls_fused.apply.matrices import Steps, by_matrix, of_each_matrix
from gls_fused.capture.layer import Layer
from gls_fused.curvature.estimate import State
from gls_fused.distributed.sharding import everywhere, is_sharded, rows_here
from gls_fused.scaling import where_flag


class _Weights(NamedTuple):
    """What `reference.measure_weights_` takes."""

    weights: list[Tensor]
    results: list[Tensor]
    least: list[float]


class _Growths(NamedTuple):
    """What `reference.measure_growths_` takes."""

    squares: Sequence[Tensor]
    growths: Sequence[Tensor]
    slows: Sequence[Tensor]
    steps: Sequence[Tensor]


# Backend, device and flag of a call.
_Call = tuple[ModuleType, torch.device, Tensor | None]


def measure_(
    layers: Sequence[Layer],
    grown: Iterable[Alike],
    states: Mapping[Tensor, State],
    options: Mapping[str, Any],
    skip: Tensor | None = None,
) -> None:
    """See `reference.measure_weights_` and `reference.measure_growths_`.

    A weight's is at least 1 / sqrt(3 d), the usual start.

    Args:
        layers: whose weights are measured.
        grown: layers that have taken a step; of those that are due growth is measured.
        options: of the group.
        skip: 0-d bool; where it is true what there is stays.
    """
    weights = _weights_of(layers, states, skip)
    growing = {name: options[key] for name, key in GROWING.items()}
    for alike in grown:
        # Others do not grow, or have all their matrices on other ranks.
        found = _growths_of(alike) if alike.slows else None
        if found is None or not found.growths:
            continue
        backend, device = alike.layers[0].backend, alike.params[0].device
        flag = None if skip is None else skip.to(device, non_blocking=True)
        own = weights.pop((backend, device, skip), None)
        if own is not None and hasattr(backend, "measure_layers_"):
            backend.measure_layers_(*own, *found, **growing, skip=flag)
            continue
        if own is not None:
            backend.measure_weights_(*own, flag)
        backend.measure_growths_(*found, **growing, skip=flag)
    for (backend, device, unless), own in weights.items():
        flag = None if unless is None else unless.to(device, non_blocking=True)
        backend.measure_weights_(*own, flag)


# Arguments of `reference.measure_growths_`, and the options that they are.
GROWING = {"beta2": "beta2", "every": "curvature_every", "most": "max_growth"}


def _weights_of(
    layers: Sequence[Layer], states: Mapping[Tensor, State], skip: Tensor | None
) -> dict[_Call, _Weights]:
    """By call; those of weights that are spread over ranks are known already."""
    calls: dict[_Call, _Weights] = {}
    for layer in layers:
        state, weight = states[layer.weight], layer.weight.detach()
        least = (3 * layer.dim) ** -0.5
        kept = state.get("weight_rms")
        # Where there is none yet, nothing can stay.
        unless = None if kept is None else skip
        if kept is None:
            kept = torch.zeros(layer.stack, dtype=layer.statistics_dtype, device=weight.device)
            state["weight_rms"] = kept
        if is_sharded(weight):
            size = max(1, weight.numel() // (layer.blocks or 1))
            rms = (everywhere(_norms_of(layer)) / size**0.5).clamp(min=least)
            kept.copy_(rms if unless is None else where_flag(unless, kept, rms))
            continue
        own = calls.setdefault((layer.backend, weight.device, unless), _Weights([], [], []))
        matrices = [weight] if layer.blocks is None else weight.unbind()
        own.weights.extend(matrices)
        own.results.extend(kept.view(-1).unbind())
        own.least.extend([least] * len(matrices))
    return calls


def _norms_of(layer: Layer) -> Tensor:
    """Of the weight, 0-d; of each matrix of a stack, [blocks]; of a sharded one, sharded."""
    axes = None if layer.blocks is None else (1, 2)
    norms: Tensor = torch.linalg.vector_norm(layer.weight, dim=axes, dtype=layer.statistics_dtype)
    return norms


def _growths_of(alike: Alike) -> _Growths:
    """Of the layers that are due."""
    due = [layer.growth_due for layer in alike.layers]
    layers, states, steps = (
        list(compress(own, due)) for own in (alike.layers, alike.firsts, alike.steps)
    )
    key = SQUARES[alike.normalize][0]
    squares = by_matrix(layers, [1] * len(layers), [state[key] for state in states])
    if squares and is_sharded(squares[0]) and layers[0].shards is not None:
        mesh, dim = layers[0].shards
        here = [rows_here(each) for each in squares]
        means = [v.sum() / max(1, each.numel()) for v, each in zip(here, squares, strict=True)]
        joint = torch.stack(means)
        dist.all_reduce(joint, group=mesh.get_group(dim))
        squares = list(joint.unbind())
    matrices = of_each_matrix(alike.layers, due)
    growths, slows = (list(compress(own, matrices)) for own in (alike.growths, alike.slows))
    return _Growths(squares, growths, slows, Steps(layers, steps).by_matrix)
