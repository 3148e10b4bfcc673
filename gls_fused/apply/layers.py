"""Apply: layers take their steps, as many in one call of a backend as are alike."""

from __future__ import annotations

import functools
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gls_fused.apply.apart import Apart
from gls_fused.apply.bounds import count_held_, hold_idle, root_mean_squares
from gls_fused.apply.kept import Alike, Kept
from gls_fused.apply.low_precision import Seeds, close_copies, open_copies, widen
from gls_fused.apply.matrices import Copied, Steps, by_matrix, write_back_
from gls_fused.capture.layer import Layer
from gls_fused.curvature.estimate import State
from gls_fused.distributed.factors import update_spectral_shards_
from gls_fused.distributed.sharding import update_shards_


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
        if options["max_change"] is not None:
            count_held_(layers, alike.firsts, None, options, skip)
        return
    backend = layers[0].backend
    sharded = layers[0].shards is not None and not layers[0].stacked
    update_ = functools.partial(update_shards_, backend) if sharded else backend.update_layers_
    rates = alike.rates(options)
    if rates is not None and options["max_change"] is not None:
        if normalize in ("sgd", "none"):
            found = root_mean_squares(
                gradients, averages, steps.by_matrix, inverses, sizes, options
            )
            rates = torch.stack([rates[:, 0] / found, rates[:, 1]], 1)
        count_held_(layers, alike.firsts, rates, options, skip)
    how: dict[str, Any] = {"normalize": normalize, "rates": rates}
    if normalize == "spectral":
        update_ = backend.update_spectral_layers_
        if sharded:
            update_ = functools.partial(update_spectral_shards_, backend)
        bounds = None if rates is None else rates[:, 0]
        how = {"split": options["split"], "lr_bounds": hold_idle(gradients, sizes, bounds)}
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
    )
    write_back_(copied)
    apart.close_(skip)
    if copies is not params:
        close_copies(params, copies, options, seeds, alike.steps_of_params, backend)
