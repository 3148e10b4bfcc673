"""Apply: layers take their steps, as many in one call of a backend as are alike."""

from __future__ import annotations

import functools
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gls_fused.apply.fallback import forget_adam
from gls_fused.apply.low_precision import Bits, close_copies, is_low, open_copies
from gls_fused.apply.matrices import (
    Copied,
    Steps,
    by_matrix,
    norms_of,
    of_each_matrix,
    write_back_,
)
from gls_fused.apply.spectral import kept_by, normalize_of
from gls_fused.capture.layer import Layer
from gls_fused.curvature.estimate import State
from gls_fused.distributed.factors import update_spectral_shards_
from gls_fused.distributed.sharding import (
    everywhere,
    is_sharded,
    rows_here,
    shards_of,
    update_shards_,
    zeros_beside,
)
from gls_fused.reference import SPECTRAL_RMS, Inverse, bias_correction, layer_directions
from gls_fused.scaling import where_flag

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


def step_layers_(
    layers: Sequence[Layer],
    states: MutableMapping[Tensor, State],
    options: Mapping[str, Any],
    groups: Mapping[Tensor, Mapping[str, Any]],
    bits: Bits,
    skip: Tensor | None,
) -> None:
    """One step of layers that have a P and a gradient, in place; P where the backward has not.

    Args:
        states: of the parameters; a layer's buffers are made at its first step.
        options: of the group of the layers' weights.
        groups: of every parameter that is to move; a bias has lr and weight decay of its own.
        bits: what rounds stochastically.
        skip: 0-d bool; where it is true nothing changes.
    """
    for normalize, alike in _alike(layers, states, options):
        _step_together_(alike, normalize, states, options, groups, bits, skip)


def _alike(
    layers: Sequence[Layer], states: Mapping[Tensor, State], options: Mapping[str, Any]
) -> list[tuple[str, list[Layer]]]:
    """Layers that one update takes together: of one scale, backend, dtype, device and sharding."""
    found: dict[tuple[object, ...], list[Layer]] = {}
    for layer in layers:
        key: tuple[object, ...] = (
            normalize_of(layer, states[layer.weight], options),
            layer.backend_name,
            layer.weight.dtype,
            layer.weight.get_device(),
            layer.shards,
            layer.shards is not None and layer.stacked,
        )
        # One by one, so that the float32 copies of a single layer are alive at a time.
        # Not where they share an all-reduce.
        alone = layer.shards is None and options["low_precision"] == "stochastic"
        if alone and is_low(layer.weight):
            key = (*key, layer.name)
        found.setdefault(key, []).append(layer)
    return [(str(key[0]), alike) for key, alike in found.items()]


def _step_together_(
    layers: Sequence[Layer],
    normalize: str,
    states: MutableMapping[Tensor, State],
    options: Mapping[str, Any],
    groups: Mapping[Tensor, Mapping[str, Any]],
    bits: Bits,
    skip: Tensor | None,
) -> None:
    params: list[Tensor] = []
    owners: list[Mapping[str, Any]] = []
    found: list[State] = []
    firsts: list[State] = []
    inverses: list[Inverse | None] = []
    # Of weight and bias, by layer, and then by matrix.
    sizes: list[int] = []
    for layer in layers:
        mine: list[Tensor] = []
        for param in layer.params:
            owner = None if param.grad is None else groups.get(param)
            if owner is not None:
                mine.append(param)
                owners.append(owner)
        own = [states[param] for param in mine]
        fill_layer_states(layer, mine, own, options)
        params += mine
        found += own
        # The weight's, which holds what is the layer's.
        firsts.append(own[0])
        sizes.append(len(mine))
        if layer.holds_direction():
            inverses += [None] * layer.matrices_here
        else:
            inverses += layer.inverses_for(len(mine) == len(layer.params))[layer.here]
    # The backends round to the nearest themselves.
    copies = params
    if options["low_precision"] != "nearest":
        copies = open_copies(params, found, options)
    pairs = zip(params, copies, strict=True)
    gradients = [p.grad if copy is p else p.grad.float() for p, copy in pairs if p.grad is not None]
    apart = Apart(copies, options, owners)
    averages = [state["exp_avg"] for state in found] if options["momentum"] else []
    copied: list[Copied] = []
    gradients = by_matrix(layers, sizes, gradients)
    averages, written = (
        by_matrix(layers, sizes, tensors, copied) for tensors in (averages, apart.written)
    )
    keys = SQUARES[normalize]
    kept = found if normalize == "adam" else firsts
    counts = sizes if normalize == "adam" else [len(keys)] * len(layers)
    squares = by_matrix(layers, counts, [state[key] for state in kept for key in keys], copied)
    steps = Steps(layers, [state["step"] for state in firsts])
    sizes = of_each_matrix(layers, sizes)
    skip = None if skip is None else skip.to(params[0].device, non_blocking=True)
    steps.close_(skip)
    if not sizes:
        # All of these layers' matrices are on other ranks.
        return
    backend = layers[0].backend
    sharded = layers[0].shards is not None and not layers[0].stacked
    update_ = functools.partial(update_shards_, backend) if sharded else backend.update_layers_
    how: dict[str, Any] = {"normalize": normalize}
    if normalize == "spectral":
        update_ = backend.update_spectral_layers_
        if sharded:
            update_ = functools.partial(update_spectral_shards_, backend)
        how = {"split": options["split"]}
    lr_bounds = None
    if options["max_change"] is not None:
        lr_bounds = bound_rates(layers, firsts, options)
        if normalize == "spectral":
            lr_bounds /= SPECTRAL_RMS
        elif normalize in ("sgd", "none"):
            lr_bounds /= root_mean_squares(
                gradients, averages, steps.by_matrix, inverses, sizes, options
            )
        _count_held_(layers, firsts, lr_bounds, options, skip)
    update_(
        written,
        gradients,
        averages,
        squares,
        steps.by_matrix,
        inverses,
        layer_sizes=sizes,
        **how,
        lr=apart.lr,
        momentum=options["momentum"],
        beta2=options["beta2"],
        eps=options["eps"],
        weight_decay=options["weight_decay"],
        skip=skip,
        lr_bounds=lr_bounds,
    )
    write_back_(copied)
    apart.close_(skip)
    close_copies(params, copies, options, bits)


class Apart:
    """Biases whose group has another lr or weight decay than their weight's.

    The update of a layer writes -lr update into a zero in their place, from which the bias takes
    its own step:

        b <- b (1 - lr_b weight_decay_b) - lr_b update

    Args:
        copies: what is to be written, the parameters themselves or what stands for them.
        options: of the weights' group.
        owners: the group of each parameter.
    Attributes:
        written: what the update is to write to.
        lr: with which rate; not the group's where that is 0 and would hide the update.
    """

    def __init__(
        self,
        copies: Sequence[Tensor],
        options: Mapping[str, Any],
        owners: Sequence[Mapping[str, Any]],
    ) -> None:
        self.lr = options["lr"]
        self.written = list(copies)
        # Index, group.
        self._biases: list[tuple[int, Mapping[str, Any]]] = []
        self._copies = copies
        for index, own in enumerate(owners):
            if own is not options and not all(
                _equal(own[key], options[key]) for key in ("lr", "weight_decay")
            ):
                self._biases.append((index, own))
                self.written[index] = torch.zeros_like(copies[index])
        # A device is not asked: see `close_`.
        known = not isinstance(self.lr, Tensor) or self.lr.is_cpu
        if self._biases and known and self.lr == 0:
            self.lr = 1.0
            places = {index for index, _ in self._biases}
            for index, copy in enumerate(copies):
                if index not in places:
                    self.written[index] = copy.clone()

    @torch.no_grad()
    def close_(self, skip: Tensor | None) -> None:
        """The biases take their steps."""
        for index, own in self._biases:
            decay, ratio = 1 - own["lr"] * own["weight_decay"], own["lr"] / self.lr
            if isinstance(self.lr, Tensor):
                # Of a warmup that begins at 0, where the update has been lost.
                ratio = torch.where(self.lr == 0, 0.0, ratio)
            if skip is not None:
                # The zero has stayed one.
                decay = torch.where(skip, torch.ones_like(skip, dtype=torch.float32), decay)
            self._copies[index].mul_(decay).add_(self.written[index] * ratio)


def _equal(ours: Any, theirs: Any) -> bool:
    """Of two numbers; tensors are not looked into, which would wait for the device."""
    if isinstance(ours, Tensor) or isinstance(theirs, Tensor):
        return ours is theirs
    return bool(ours == theirs)


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


def bound_rates(
    layers: Sequence[Layer], states: Sequence[State], options: Mapping[str, Any]
) -> Tensor:
    """The most that the learning rate may be in each layer's step, [layers]; by matrix of stacks.

    Of updates with a root mean square of 1, which those that are divided by their mean squares have
    at most, about: a layer's weight then moves by max_change of its root mean square at most.
    """
    sizes: list[Tensor] = [state["weight_rms"] for state in states]
    if all(layer.blocks is None for layer in layers):
        found = torch.stack(sizes)
    else:
        pairs = zip(layers, sizes, strict=True)
        found = torch.cat([size.view(-1)[layer.here] for layer, size in pairs])
    bounds: Tensor = found * options["max_change"]
    return bounds


def _count_held_(
    layers: Sequence[Layer],
    states: Sequence[State],
    bounds: Tensor,
    options: Mapping[str, Any],
    skip: Tensor | None,
) -> None:
    """Blend into each state's "held", in steps that gather, whether lr is above the bound.

    Of a stack, one number for each matrix.

    Args:
        bounds: by matrix, on this rank.
        skip: 0-d bool; where it is true nothing changes.
    """
    if not any(layer.gathers for layer in layers):
        return
    lr = options["lr"]
    lr = lr.to(bounds.device, non_blocking=True) if isinstance(lr, Tensor) else lr
    now = (bounds < lr).to(bounds.dtype).split([layer.matrices_here for layer in layers])
    kept: list[Tensor] = []
    for layer, state, held in zip(layers, states, now, strict=True):
        if "held" not in state:
            state["held"] = empty_held(layer)
            rows_here(state["held"]).view(-1).copy_(held)
        kept.append(rows_here(state["held"]).view(-1))
    weight: Any = 1 - options["beta"]
    if skip is not None:
        weight = torch.where(skip, 0.0, weight)
    torch._foreach_add_(kept, torch._foreach_mul(torch._foreach_sub(now, kept), weight))


def empty_held(layer: Layer) -> Tensor:
    """Zeros for how often the bound held, [], or [blocks] of a stack, with whose blocks it goes."""
    if layer.stacked:
        return zeros_beside(layer.weight, layer.stack, layer.statistics_dtype)
    return torch.zeros((), dtype=layer.statistics_dtype, device=layer.weight.device)


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
    momentum, first = options["momentum"], 0
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    shards, counts = shards_of(gradients[0]), []
    squares = torch.zeros(len(steps), 3, dtype=dtype, device=gradients[0].device)
    for layer, (inverse, size) in enumerate(zip(inverses, sizes, strict=True)):
        mine = slice(first, first + size)
        first += size
        counts.append(sum(gradient.numel() for gradient in gradients[mine]))
        d0, averages = ([rows_here(x) for x in tensors[mine]] for tensors in (gradients, exp_avgs))
        directions = layer_directions(d0, averages, inverse)
        updates = directions
        if averages:
            pairs = zip(averages, directions, strict=True)
            updates = [m.lerp(d, 1 - momentum) for m, d in pairs]
        for place, tensors in enumerate((updates, d0, directions)):
            squares[layer, place] = sum(x.square().sum(dtype=dtype) for x in tensors)
    if shards is not None:
        dist.all_reduce(squares, group=shards[0].get_group(shards[1]))
    means, d0_norms, norms = (squares / squares.new_tensor(counts)[:, None].clamp(min=1)).unbind(1)
    if options["normalize"] == "sgd":
        means = means * torch.where(norms > 0, d0_norms / norms, 1.0)
    corrections = [bias_correction(momentum, step + 1, dtype) for step in steps]
    found: Tensor = means.sqrt() / torch.stack(corrections)
    return found.clamp(min=torch.finfo(dtype).tiny)


@torch.no_grad()
def measure_weights(
    layers: Sequence[Layer], states: Mapping[Tensor, State], skip: Tensor | None = None
) -> None:
    """Root mean squares of the weights, for `bound_rates`; at least 1 / sqrt(3 d), the usual start.

    In steps that gather, as the weights change little between two of these.

    Args:
        skip: 0-d bool; where it is true those there are stay.
    """
    together: dict[Any, list[tuple[Tensor, Tensor, float]]] = {}
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
            rms = (everywhere(norms_of(layer)) / size**0.5).clamp(min=least)
            kept.copy_(rms if unless is None else where_flag(unless, kept, rms))
            continue
        weights = [weight] if layer.blocks is None else weight.unbind()
        own = [(*pair, least) for pair in zip(weights, kept.view(-1).unbind(), strict=True)]
        together.setdefault((layer.backend, weight.device, unless is None), []).extend(own)
    for (backend, device, always), found in together.items():
        measured, results, floors = zip(*found, strict=True)
        flag = None if always or skip is None else skip.to(device, non_blocking=True)
        backend.measure_weights_(measured, results, floors, flag)


def fill_layer_states(
    layer: Layer, params: Sequence[Tensor], states: Sequence[State], group: Mapping[str, Any]
) -> None:
    """Buffers for a layer's first update: one step and, for "rms", one square on its weight."""
    first, dtype, device = states[0], layer.statistics_dtype, layer.weight.device
    shapes = square_shapes(layer, group)
    # Somebody may have taken the mean squares away, or chosen another way to normalize.
    if "exp_avg_sq_columns" not in shapes:
        first.pop("exp_avg_sq_columns", None)
    for key, shape in shapes.items():
        if "step" in first and (key not in first or first[key].shape != shape):
            for state in states:
                forget_adam(state)
    if "step" not in first:
        first["step"] = torch.zeros((), dtype=torch.float32, device=device)
        if group["normalize"] != "adam":
            for key, shape in shapes.items():
                if layer.stacked:
                    first[key] = zeros_beside(layer.weight, shape, dtype)
                else:
                    first[key] = torch.zeros(shape, dtype=dtype, device=device)
            if is_sharded(layer.weight) and not layer.stacked and shapes.get("exp_avg_sq"):
                # One per output, which are spread over the ranks as the weight's are.
                rows = layer.weight.detach().flatten(1)[:, 0]
                first["exp_avg_sq"] = torch.zeros_like(rows, dtype=dtype)
    for state in states[1:]:
        # A bias that took Adam's steps while its weight was frozen averaged another quantity.
        if "step" in state:
            forget_adam(state)
    for param, state in zip(params, states, strict=True):
        if group["momentum"] and "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(param, dtype=dtype)
        if group["normalize"] == "adam" and "exp_avg_sq" not in state:
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype)
