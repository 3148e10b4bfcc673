"""Apply: layers take their steps, as many in one call of a backend as are alike."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gls_fused.apply.bounds import count_held_, hold_idle, root_mean_squares
from gls_fused.apply.kept import Alike, Kept
from gls_fused.apply.low_precision import Seeds, close_copies, is_low, open_copies, widen
from gls_fused.apply.matrices import Copied, Steps, by_matrix, write_back_
from gls_fused.capture.layer import Layer
from gls_fused.curvature.estimate import State
from gls_fused.distributed.factors import update_spectral_shards_
from gls_fused.distributed.sharding import update_shards_
from gls_fused.reference import wide_rate


def step_layers_(
    layers: Sequence[Layer],
    states: MutableMapping[Tensor, State],
    options: Mapping[str, Any],
    groups: Mapping[Tensor, Mapping[str, Any]],
    kept: Kept,
    seeds: Seeds,
    skip: Tensor | None,
) -> None:
    """One step of layers that have a P and a gradient, in place; P where the backward has not.

    Args:
        states: of the parameters; a layer's buffers are made at its first step.
        options: of the group of the layers' weights.
        groups: of every parameter that is to move; a bias has lr and weight decay of its own.
        kept: of this group.
        seeds: of what rounds stochastically.
        skip: 0-d bool; where it is true nothing changes.
    """
    for alike in kept.sort(layers, states, options, groups):
        _step_together_(alike, options, seeds, skip)


def _step_together_(
    alike: Alike, options: Mapping[str, Any], seeds: Seeds, skip: Tensor | None
) -> None:
    layers, normalize, params = alike.layers, alike.normalize, alike.params
    # The backends round to the nearest themselves.
    copies: Sequence[Tensor] = params
    gradients = [param.grad for param in params if param.grad is not None]
    if alike.low and options["low_precision"] != "nearest":
        copies = open_copies(params, alike.states, options)
        gradients = widen(gradients)
    inverses = alike.inverses()
    apart = Apart(copies, options, alike.elsewhere, alike.zeros)
    copied: list[Copied] = []
    gradients = by_matrix(layers, alike.sizes, gradients)
    averages, written = (
        by_matrix(layers, alike.sizes, tensors, copied)
        for tensors in (alike.averages, apart.written)
    )
    squares = by_matrix(layers, alike.counts, alike.squares, copied)
    steps = Steps(layers, alike.steps)
    sizes = alike.matrix_sizes
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
        lr_bounds = alike.bounds(options)
        if normalize in ("sgd", "none"):
            lr_bounds = lr_bounds / root_mean_squares(
                gradients, averages, steps.by_matrix, inverses, sizes, options
            )
        count_held_(layers, alike.firsts, lr_bounds, options, skip)
    if normalize == "spectral":
        firsts = itertools.accumulate(sizes[:-1], initial=0)
        lr_bounds = hold_idle([gradients[first] for first in firsts], lr_bounds)
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
    if copies is not params:
        close_copies(params, copies, options, seeds, alike.steps_of_params, backend)


class Apart:
    """Biases whose group has another lr or weight decay than their weight's.

    The update of a layer writes -lr update into a zero in their place, from which the bias takes
    its own step:

        b <- b (1 - lr_b weight_decay_b) - lr_b update

    Args:
        copies: what is to be written, the parameters themselves or what stands for them.
        options: of the weights' group.
        elsewhere: other groups, and the places of their biases among the copies.
        zeros: takes what stands in for a bias, by its place, for the next step.
    Attributes:
        written: what the update is to write to.
        lr: with which rate; not the group's where that is 0 and would hide the update.
    """

    def __init__(
        self,
        copies: Sequence[Tensor],
        options: Mapping[str, Any],
        elsewhere: Sequence[tuple[Mapping[str, Any], Sequence[int]]],
        zeros: MutableMapping[int, Tensor],
    ) -> None:
        self.lr = wide_rate(options["lr"])
        self.written = list(copies)
        self._copies = copies
        self._groups = [
            (own, places)
            for own, places in elsewhere
            if not all(_equal(own[key], options[key]) for key in ("lr", "weight_decay"))
        ]
        ours = [place for _, places in self._groups for place in places]
        if not ours:
            return
        for place in ours:
            copy, zero = copies[place], zeros.get(place)
            if zero is None or zero.dtype != copy.dtype:
                zeros[place] = torch.zeros_like(copy)
            self.written[place] = zeros[place]
        torch._foreach_zero_([zeros[place] for place in ours])
        # A device is not asked: see `close_`.
        known = not isinstance(self.lr, Tensor) or self.lr.is_cpu
        if known and self.lr == 0:
            # The largest of theirs, with which the bound of the layer's rate is compared.
            rates = [own["lr"] for own, _ in self._groups]
            asked = [float(r) for r in rates if not isinstance(r, Tensor) or r.is_cpu]
            self.lr = max(asked, default=0.0) or 1.0
            for place in set(range(len(copies))).difference(ours):
                self.written[place] = copies[place].clone()

    def close_(self, skip: Tensor | None) -> None:
        """The biases take their steps."""
        for own, places in self._groups:
            biases = [self._copies[place] for place in places]
            updates = [self.written[place] for place in places]
            # A few of torch's ops for all of a group.
            lr = wide_rate(own["lr"])
            decay, ratio = 1 - lr * own["weight_decay"], lr / self.lr
            if isinstance(self.lr, Tensor):
                # Of a warmup that begins at 0, where the update has been lost.
                ratio = torch.where(self.lr == 0, 0.0, ratio)
            if skip is not None:
                # The zero has stayed one.
                decay = torch.where(skip, torch.ones_like(skip, dtype=torch.float32), decay)
            if isinstance(decay, Tensor) or decay != 1:
                torch._foreach_mul_(biases, _beside(biases[0], decay))
            torch._foreach_mul_(updates, _beside(biases[0], ratio))
            torch._foreach_add_(biases, updates)


def _beside(tensor: Tensor, value: float | Tensor) -> Any:
    """A number as torch's ops over many tensors take it: a tensor has to be on their device.

    Of a plain number the CPU's take no more digits than 16-bit tensors have.
    """
    if isinstance(value, Tensor):
        return value.to(tensor.device, non_blocking=True)
    if is_low(tensor):
        return torch.full((), value, dtype=torch.float32, device=tensor.device)
    return value


def _equal(ours: Any, theirs: Any) -> bool:
    """Of two numbers; tensors are not looked into, which would wait for the device."""
    if isinstance(ours, Tensor) or isinstance(theirs, Tensor):
        return ours is theirs
    return bool(ours == theirs)
