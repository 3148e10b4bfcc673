"""What a layer keeps for its update: steps, momentum, and mean squares as it is scaled by them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gls_fused.apply.fallback import forget_adam
from gls_fused.apply.spectral import kept_by, normalize_of
from gls_fused.capture.layer import Layer
from gls_fused.curvature.estimate import State
from gls_fused.distributed.sharding import everywhere, is_sharded, rows_here, zeros_beside

# What a layer keeps the mean squares of its directions as: on its weight, for "adam" on each
# parameter.
SQUARES: dict[str, tuple[str, ...]] = {
    "rms": ("exp_avg_sq",),
    "row": ("exp_avg_sq",),
    "factored": ("exp_avg_sq", "exp_avg_sq_columns"),
    "spectral": ("exp_avg_sq",),
    # As its layers may take either; those of "spectral" leave the columns alone.
    "auto": ("exp_avg_sq", "exp_avg_sq_columns"),
    "adam": ("exp_avg_sq",),
    "sgd": (),
    "none": (),
}


# Those whose steps are scaled by a mean square, which may grow.
GROWING = ("rms", "row", "factored", "adam")


def square_shapes(layer: Layer, group: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]]:
    """Of the mean squares that a layer keeps on its weight."""
    normalize = kept_by(layer, group)
    return _square_shapes(
        normalize, layer.outputs, layer.dim, layer.blocks, tuple(layer.weight.shape)
    )


@functools.cache
def _square_shapes(
    normalize: str, outputs: int, dim: int, blocks: int | None, weight: tuple[int, ...]
) -> Mapping[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "exp_avg_sq": (outputs,),
        "exp_avg_sq_columns": (dim,),
    }
    if normalize == "rms":
        shapes["exp_avg_sq"] = ()
    # Each matrix of a stack has its own.
    stack = () if blocks is None else (blocks,)
    shapes = {key: (*stack, *shape) for key, shape in shapes.items()}
    if normalize == "adam":
        shapes["exp_avg_sq"] = weight
    return {key: shapes[key] for key in SQUARES[normalize]}


def fill_layer_states(
    layer: Layer, params: Sequence[Tensor], states: Sequence[State], group: Mapping[str, Any]
) -> None:
    """Buffers for a layer's first update: one step and, for "rms", one square on its weight."""
    first, dtype, device = states[0], layer.statistics_dtype, layer.weight.device
    shapes = square_shapes(layer, group)
    # Somebody may have taken the mean squares away, or chosen another way to normalize.
    if "exp_avg_sq_columns" not in shapes:
        first.pop("exp_avg_sq_columns", None)
    fit = all(key in first and first[key].shape == shape for key, shape in shapes.items())
    normalize, before = normalize_of(layer, first, group), layer.scaled
    layer.scaled = normalize
    grows = group["max_growth"] is not None and normalize in GROWING
    if "step" in first and not (fit and (normalize == before or _are_written(first, normalize))):
        for state in states:
            forget_adam(state)
    if not grows or "step" not in first:
        first.pop("growth", None)
        first.pop("slow_sq", None)
    if "step" not in first:
        first["step"] = torch.zeros((), dtype=torch.float32, device=device)
        if group["normalize"] != "adam":
            first.update({key: zeros_of(layer, shape) for key, shape in shapes.items()})
            if is_sharded(layer.weight) and not layer.stacked and shapes.get("exp_avg_sq"):
                # One per output, of which each rank updates some.
                first["exp_avg_sq"] = zeros_beside(layer.weight, (layer.outputs,), dtype)
    if grows and "growth" not in first:
        first.update(empty_growth(layer))
    for state in states[1:]:
        # A bias that took Adam's steps while its weight was frozen averaged another quantity.
        if "step" in state:
            forget_adam(state)
    for param, state in zip(params, states, strict=True):
        if group["momentum"] and "exp_avg" not in state:
            state["exp_avg"] = _empty_average(layer, param, normalize)
        if group["normalize"] == "adam" and "exp_avg_sq" not in state:
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype)


def empty_growth(layer: Layer) -> State:
    """What a layer that may grow keeps before any growth is known."""
    growth, slow = (zeros_of(layer, layer.stack) for _ in range(2))
    rows_here(growth).fill_(1)
    return {"growth": growth, "slow_sq": slow}


def may_grow(layer: Layer, group: Mapping[str, Any]) -> bool:
    """Whether steps of the layer can be of a kind that grows, which rows have a part in."""
    return group["max_growth"] is not None and kept_by(layer, group) in ("auto", *GROWING)


def _are_written(first: State, normalize: str) -> bool:
    """Whether steps have written the mean squares that scale the next one.

    Orthogonal ones have not. This waits for the device, where a layer is scaled otherwise than in
    its last step or was loaded.
    """
    keys = SQUARES[normalize] if normalize in ("row", "factored") else ()
    return all(bool(everywhere(first[key]).any()) for key in keys)


def zeros_of(layer: Layer, shape: tuple[int, ...]) -> Tensor:
    """Zeros that a layer keeps on its weight; of a stack their first axis goes with its blocks."""
    if layer.stacked:
        return zeros_beside(layer.weight, shape, layer.statistics_dtype)
    return torch.zeros(shape, dtype=layer.statistics_dtype, device=layer.weight.device)


def _empty_average(layer: Layer, param: Tensor, normalize: str) -> Tensor:
    """Zeros shaped as a parameter, in memory with the outputs first where its update takes them so.

    Orthogonal steps do, and those of a CUDA device. Others take a weight as it lies, as does Adam's
    own update, which may follow on "adam".
    """
    dtype = layer.statistics_dtype
    as_it_lies = normalize == "adam" or (param.is_cpu and normalize != "spectral")
    whole = layer.turns_by_copy or is_sharded(param) or as_it_lies
    if param is not layer.weight or not layer.turned or whole:
        return torch.zeros_like(param, dtype=dtype)
    outputs_first = torch.zeros((*layer.stack, *layer.shape), dtype=dtype, device=param.device)
    axis = len(layer.stack)
    return outputs_first.transpose(axis, axis + 1)
