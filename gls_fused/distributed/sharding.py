"""Layers whose rows are spread over ranks, as torch.distributed.fsdp.fully_shard leaves them.

Weight and bias are DTensors then, sharded over the outputs. P acts on columns, so each rank takes
its rows of D = D0 P by itself; only the norms of a whole layer ("rms", "sgd") and of its columns
("factored") need all ranks, and orthogonal factors, which are in `factors`. Of a weight [inputs,
outputs] a rank has columns, which it exchanges for rows before the update and gets back after it;
where it has groups besides, each rank has all of it for that.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gls_fused.reference import (
    Inverse,
    Normalize,
    inverse_root,
    kept_where,
    layer_directions,
    layer_slices,
    move_layer_,
    rate_within,
    scales_of_axes,
    squares_by_row,
)


def knows_shards() -> bool:
    """Whether there may be DTensors: importing them takes half a second, and who has one has it.

    Nor are there any without a process group.
    """
    known = "torch.distributed.tensor" in sys.modules
    return known and dist.is_available() and dist.is_initialized()


def reshard(model: nn.Module | None) -> None:
    """Have fully_shard's modules hold their shards, which are the optimizer's parameters.

    After a forward without gradients the outermost holds what it has gathered; it will gather that
    again.
    """
    module = sys.modules.get("torch.distributed.fsdp")
    if model is None or module is None or not knows_shards():
        return
    for part in model.modules():
        if isinstance(part, module.FSDPModule):
            part.reshard()


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def rows_here(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory; all of it where it is not sharded."""
    local: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return local


def gradient_here(param: Any) -> Tensor:
    """The gradient of this rank's part of a parameter that has one."""
    gradient = param.grad
    if is_sharded(gradient) and gradient.placements != param.placements:
        gradient = gradient.redistribute(placements=param.placements)
    return rows_here(gradient)


def everywhere(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank; what is not sharded is returned as it is."""
    found: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return found


def shards_of(weight: Any) -> tuple[Any, int] | None:
    """Device mesh and its dimension over which the rows of a weight are spread, or None.

    Not the process group: one that somebody still holds when Python ends brings its threads down
    with it.
    """
    if not is_sharded(weight):
        return None
    return weight.device_mesh, _sharded_dimensions(weight)[0]


def part_here(weight: Any) -> slice:
    """Which entries of a weight's first axis this rank has, as torch.chunk deals them out; or all.

    Args:
        weight: sharded over its first axis, or not at all.
    """
    shards = shards_of(weight)
    if shards is None:
        return slice(None)
    mesh, dimension = shards
    chunk = chunk_of(len(weight), mesh.size(dimension), mesh.get_local_rank(dimension))
    return slice(chunk.start, chunk.stop)


def chunk_of(rows: int, ranks: int, rank: int) -> range:
    """Which of so many rows a rank has, where torch.chunk deals them out."""
    chunk = -(-rows // ranks)
    first = min(rows, rank * chunk)
    return range(first, min(rows, first + chunk))


def spread_over_first(tensor: Any) -> Tensor:
    """A DTensor that is spread over its second axis, spread over its first: an all-to-all."""
    from torch.distributed.tensor import Shard

    placements = [Shard(0) if each.is_shard() else each for each in tensor.placements]
    found: Tensor = tensor.redistribute(placements=placements)
    return found


def whole_on_each(tensor: Any) -> Any:
    """A DTensor, all of it on every rank: an all-gather."""
    from torch.distributed.tensor import Replicate

    return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)


def spread_like(whole: Any, tensor: Any) -> Tensor:
    """A DTensor that every rank has all of, spread as another one is: nothing is sent."""
    found: Tensor = whole.redistribute(placements=tensor.placements)
    return found


def zeros_beside(weight: Any, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros whose first axis is the weight's, and spread over the same ranks where that is."""
    if not is_sharded(weight):
        return torch.zeros(shape, dtype=dtype, device=weight.device)
    from torch.distributed.tensor import zeros

    mesh, placements = weight.device_mesh, weight.placements
    return zeros(*shape, dtype=dtype, device_mesh=mesh, placements=placements)


def sharding_problem(weight: Any, bias: Any) -> str | None:
    """Why GLS cannot work on a layer sharded like that, or None if it can."""
    if not is_sharded(weight) and not is_sharded(bias):
        return None
    if not is_sharded(weight) or (bias is not None and not is_sharded(bias)):
        return "its weight and bias are not sharded alike"
    if bias is not None and (bias.device_mesh, bias.placements) != (
        weight.device_mesh,
        weight.placements,
    ):
        return "its weight and bias are not sharded alike"
    dimensions = _sharded_dimensions(weight)
    if len(dimensions) != 1 or not weight.placements[dimensions[0]].is_shard(0):
        return f"it is placed as {weight.placements}, not sharded over its first axis alone"
    return None


def update_shards_(
    backend: ModuleType,
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    inverses: Sequence[Inverse | None],
    *,
    layer_sizes: Sequence[int],
    normalize: Normalize,
    lr: float | Tensor,
    momentum: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    skip: Tensor | None = None,
    rates: Tensor | None = None,
) -> None:
    """`reference.update_layers_` for layers that are sharded over the same ranks.

    "none", "adam" and "row" are the backend's own update of a rank's rows. "rms" and "sgd" take one
    all-reduce of one or two numbers per layer, "factored" one of d + 1.

    Args:
        params: DTensors, as are gradients, exp_avgs and those of exp_avg_sqs with a number per
            element or per output; the rest is the same on all ranks.
    """
    shards = shards_of(params[0])
    assert shards is not None
    mesh, dimension = shards
    elements = [param.numel() for param in params]
    layers = layer_slices(layer_sizes)
    weights = [params[mine][0] for mine in layers]
    outputs = [len(weight) for weight in weights]
    params, gradients, exp_avgs, exp_avg_sqs = (
        [rows_here(tensor) for tensor in tensors]
        for tensors in (params, gradients, exp_avgs, exp_avg_sqs)
    )
    if normalize in ("none", "adam", "row"):
        backend.update_layers_(
            params, gradients, exp_avgs, exp_avg_sqs, steps, inverses, layer_sizes=layer_sizes,
            normalize=normalize, lr=lr, momentum=momentum, beta2=beta2, eps=eps,
            weight_decay=weight_decay, skip=skip, rates=rates,
        )  # fmt: skip
        return
    directions = [
        layer_directions(gradients[mine], exp_avgs[mine], inverse)
        for mine, inverse in zip(layers, inverses, strict=True)
    ]
    if normalize == "factored":
        sums = [
            _sum_axes(mine, exp_avg_sqs[2 * layer], beta2) for layer, mine in enumerate(directions)
        ]
        flat = torch.cat(sums)
        dist.all_reduce(flat, group=mesh.get_group(dimension))
        axes = torch.split(flat, [len(each) for each in sums])
    else:
        squares = torch.stack([_square_sum(mine) for mine in directions])[None]
        if normalize == "sgd":
            first = torch.stack([_square_sum(gradients[mine]) for mine in layers])
            squares = torch.cat([squares, first[None]])
        dist.all_reduce(squares, group=mesh.get_group(dimension))
    with kept_where(skip, [*params, *exp_avgs, *exp_avg_sqs, *steps]):
        for layer, mine in enumerate(layers):
            steps[layer].add_(1)
            rate = lr if rates is None else rate_within(lr, *rates[layer])
            scales: list[Tensor | float]
            if normalize == "factored":
                rows, columns = exp_avg_sqs[2 * layer : 2 * layer + 2]
                by_row = squares_by_row(directions[layer], rows.dtype)
                rows.lerp_(by_row.mean(1), 1 - beta2)
                columns[: by_row.shape[1]].lerp_(axes[layer][:-1] / outputs[layer], 1 - beta2)
                mean = axes[layer][-1] / outputs[layer]
                scales = scales_of_axes(
                    directions[layer], rows, [columns], mean, steps[layer], beta2, eps
                )
            elif normalize == "rms":
                mean = squares[0, layer] / sum(elements[mine])
                exp_avg_sqs[layer].lerp_(mean.to(exp_avg_sqs[layer].dtype), 1 - beta2)
                scales = [inverse_root(exp_avg_sqs[layer], steps[layer], beta2, eps)]
            else:
                norm, gradient_norm = squares[:, layer].sqrt()
                scales = [torch.where(norm == 0, 1.0, gradient_norm / norm)]
            if len(scales) < layer_sizes[layer]:
                scales = scales * layer_sizes[layer]
            move_layer_(
                params[mine], directions[layer], exp_avgs[mine], scales,
                steps[layer], rate, momentum, lr * weight_decay,
            )  # fmt: skip


def _sharded_dimensions(weight: Any) -> list[int]:
    """Of the device mesh."""
    return [i for i, placement in enumerate(weight.placements) if not placement.is_replicate()]


def _sum_axes(directions: Sequence[Tensor], exp_avg_sq: Tensor, beta2: float) -> Tensor:
    """Over this rank's rows: D^2 by column [d], and what v will be, in at least float32."""
    squares = squares_by_row(directions, exp_avg_sq.dtype)
    rows = exp_avg_sq.lerp(squares.mean(1), 1 - beta2)
    return torch.cat([squares.sum(0), rows.sum()[None]])


def _square_sum(tensors: Sequence[Tensor]) -> Tensor:
    """In at least float32."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack([tensor.to(wide).square().sum() for tensor in tensors]).sum()
