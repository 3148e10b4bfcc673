"""Apply: layers take their steps, as many in one call of a backend as are alike."""

from __future__ import annotations

import functools
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gls_fused.apply.bounds import bound_rates, count_held_, root_mean_squares
from gls_fused.apply.kept import Alike, Kept
from gls_fused.apply.low_precision import Bits, close_copies, open_copies
from gls_fused.apply.matrices import Copied, Steps, by_matrix, write_back_
from gls_fused.capture.layer import Layer
from gls_fused.curvature.estimate import State
from gls_fused.distributed.factors import update_spectral_shards_
from gls_fused.distributed.sharding import update_shards_
from gls_fused.reference import SPECTRAL_RMS


def step_layers_(
    layers: Sequence[Layer],
    states: MutableMapping[Tensor, State],
    options: Mapping[str, Any],
    groups: Mapping[Tensor, Mapping[str, Any]],
    kept: Kept,
    bits: Bits,
    skip: Tensor | None,
) -> None:
    """One step of layers that have a P and a gradient, in place; P where the backward has not.

    Args:
        states: of the parameters; a layer's buffers are made at its first step.
        options: of the group of the layers' weights.
        groups: of every parameter that is to move; a bias has lr and weight decay of its own.
        kept: of this group.
        bits: what rounds stochastically.
        skip: 0-d bool; where it is true nothing changes.
    """
    for alike in kept.sort(layers, states, options, groups):
        _step_together_(alike, options, bits, skip)


def _step_together_(
    alike: Alike, options: Mapping[str, Any], bits: Bits, skip: Tensor | None
) -> None:
    layers, normalize, params = alike.layers, alike.normalize, alike.params
    # The backends round to the nearest themselves.
    copies: Sequence[Tensor] = params
    if options["low_precision"] != "nearest":
        copies = open_copies(params, alike.states, options)
    pairs = zip(params, copies, strict=True)
    gradients = [p.grad if copy is p else p.grad.float() for p, copy in pairs if p.grad is not None]
    inverses = alike.inverses()
    apart = Apart(copies, options, alike.owners)
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
        lr_bounds = bound_rates(layers, alike.firsts, options)
        if normalize == "spectral":
            lr_bounds /= SPECTRAL_RMS
        elif normalize in ("sgd", "none"):
            lr_bounds /= root_mean_squares(
                gradients, averages, steps.by_matrix, inverses, sizes, options
            )
        count_held_(layers, alike.firsts, lr_bounds, options, skip)
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
