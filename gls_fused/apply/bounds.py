"""What `max_change` allows: no layer moves by more than that share of itself in a step.

The rate is at most max_change * max(rms(W), 1 / sqrt(3 d)) / rms(update).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gls_fused.apply.buffers import zeros_of
from gls_fused.capture.layer import Layer
from gls_fused.curvature.estimate import State
from gls_fused.distributed.sharding import rows_here, shards_of
from gls_fused.reference import (
    SPECTRAL_RMS,
    Inverse,
    bias_correction,
    layer_directions,
    layer_slices,
)


def most_rms(normalize: str, options: Mapping[str, Any]) -> float:
    """The most that the root mean square of an update can be, about; 1 where it is not known.

    Divided by a mean square of which D is a share of 1 - beta2, m, of which D is a share of
    1 - momentum, is at most (1 - momentum) / sqrt(1 - beta2) where D grows at once.
    """
    if normalize == "spectral":
        return SPECTRAL_RMS
    if normalize in ("sgd", "none"):
        return 1.0
    return max(1.0, float((1 - options["momentum"]) / math.sqrt(1 - options["beta2"])))


def bound_rates(
    layers: Sequence[Layer], sizes: Sequence[Tensor], share: float, growths: Sequence[Tensor]
) -> Tensor:
    """The most that the rate of each layer's step may be, and its growth, [layers, 2].

    Of stacks by matrix of this rank. A layer's weight then moves by max_change of its root mean
    square at most, but for "sgd" and "none", where what the update has is still to be divided by.

    Args:
        sizes: of the weights, their states' "weight_rms"; or none.
        share: max_change over `most_rms`; inf without sizes.
        growths: of their matrices on this rank, at least 1.
    """
    here: list[Tensor] = []
    for layer, size in zip(layers, sizes, strict=bool(sizes)):
        here += [size] if layer.blocks is None else size.view(-1)[layer.here].unbind()
    # Two ops of torch's, however many layers. Without sizes any number stands for them.
    own = [number for pair in zip(here or growths, growths, strict=True) for number in pair]
    found = torch.stack(own).view(-1, 2)
    found[:, 0].mul_(share)
    return found


def count_held_(
    layers: Sequence[Layer],
    states: Sequence[State],
    rates: Tensor | None,
    options: Mapping[str, Any],
    skip: Tensor | None,
) -> None:
    """Blend into each state's "held", in steps that gather, whether its rate is above the bound.

    Of a stack, one number for each matrix.

    Args:
        rates: bound and growth by matrix, on this rank; None where all matrices are on others,
            which may ask for what a state holds.
        skip: 0-d bool; where it is true nothing changes.
    """
    if not any(layer.gathers for layer in layers):
        return
    starting = ["held" not in state for state in states]
    for layer, state in itertools.compress(zip(layers, states, strict=True), starting):
        state["held"] = zeros_of(layer, layer.stack)
    if rates is None:
        return
    lr = options["lr"]
    lr = lr.to(rates.device, non_blocking=True) if isinstance(lr, Tensor) else lr
    bounds, growths = rates.unbind(1)
    above = (bounds < growths * lr).to(rates.dtype)
    now = torch.split(above, [layer.matrices_here for layer in layers])
    kept = [rows_here(state["held"]).view(-1) for state in states]
    for average, first in itertools.compress(zip(kept, now, strict=True), starting):
        average.copy_(first)
    weight = 1 - options["beta"]
    if skip is None:
        torch._foreach_lerp_(kept, now, weight)
    else:
        weights = torch.where(skip, 0.0, torch.full_like(rates[0, 0], weight))
        torch._foreach_lerp_(kept, now, [weights] * len(kept))


def hold_idle(
    gradients: Sequence[Tensor], sizes: Sequence[int], bounds: Tensor | None
) -> Tensor | None:
    """The bounds of layers that take orthogonal steps, 0 where their gradients are all zeros.

    The momentum alone shrinks, but the step that it leads to would not.

    Args:
        gradients: of each layer's weight, and of its bias where P acts on both.
        sizes: how many of them each layer has, 1 or 2.
        bounds: of the rates, [layers]; None without any.
    """
    here, shards = [rows_here(gradient) for gradient in gradients], shards_of(gradients[0])
    layers = layer_slices(sizes)
    if shards is None and here[0].is_cpu:
        moving = [any(map(_has_entries, here[mine])) for mine in layers]
        if all(moving):
            return bounds
        flags = torch.tensor(moving)
    else:
        norms = torch._foreach_norm([x if x.numel() else x.new_zeros(1) for x in here], math.inf)
        biased = [mine.start for mine, size in zip(layers, sizes, strict=True) if size > 1]
        if biased:
            torch._foreach_add_([norms[i] for i in biased], [norms[i + 1] for i in biased])
        flags = torch.stack([norms[mine.start] for mine in layers]) != 0
    if shards is not None:
        found = flags.float()
        dist.all_reduce(found, dist.ReduceOp.MAX, group=shards[0].get_group(shards[1]))
        flags = found != 0
    if bounds is None:
        dtype = torch.promote_types(here[0].dtype, torch.float32)
        bounds = torch.full((len(sizes),), math.inf, dtype=dtype, device=here[0].device)
    return torch.where(flags, bounds, 0.0)


def _has_entries(gradient: Tensor) -> bool:
    """Whether one is not zero, which a few of a matrix tell most often."""
    few = gradient.diagonal() if gradient.ndim > 1 else gradient
    return bool(few.any() or gradient.any())


def root_mean_squares(
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    steps: Sequence[Tensor],
    inverses: Sequence[Inverse | None],
    sizes: Sequence[int],
    options: Mapping[str, Any],
) -> Tensor:
    """Of the updates of "sgd" and "none" that the layers are about to take, [layers].

    D is formed for it alone, as no backend knows its norm before it writes with "none". At least a
    tiny number.
    """
    momentum = options["momentum"]
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    shards, counts = shards_of(gradients[0]), []
    squares = torch.zeros(len(steps), 3, dtype=dtype, device=gradients[0].device)
    for layer, (inverse, mine) in enumerate(zip(inverses, layer_slices(sizes), strict=True)):
        counts.append(sum(gradient.numel() for gradient in gradients[mine]))
        d0, averages = ([rows_here(x) for x in tensors[mine]] for tensors in (gradients, exp_avgs))
        directions = layer_directions(d0, averages, inverse)
        updates = directions
        if averages:
            pairs = zip(averages, directions, strict=True)
            updates = [m.lerp(d, 1 - momentum) for m, d in pairs]
        for place, tensors in enumerate((updates, d0, directions)):
            squares[layer, place] = sum(x.to(dtype).square().sum() for x in tensors)
    if shards is not None:
        dist.all_reduce(squares, group=shards[0].get_group(shards[1]))
    means, d0_norms, norms = (squares / squares.new_tensor(counts)[:, None].clamp(min=1)).unbind(1)
    if options["normalize"] == "sgd":
        means = means * torch.where(norms > 0, d0_norms / norms, 1.0)
    corrections = [bias_correction(momentum, step + 1, dtype) for step in steps]
    found: Tensor = means.sqrt() / torch.stack(corrections)
    return found.clamp(min=torch.finfo(dtype).tiny)
