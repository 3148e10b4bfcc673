"""Apply: layers take their steps, as many in one call of a backend as are alike."""

from __future__ import annotations

import functools
from collections.abc import Mapping, MutableMapping, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from gls_fused.apply.low_precision import Bits, close_copies, is_low, open_copies
from gls_fused.capture.layers import Layer
from gls_fused.curvature.estimate import State
from gls_fused.distributed.sharding import update_shards_
from gls_fused.reference import Inverse
from gls_fused.state import fill_layer_states


def step_layers_(
    backend: ModuleType,
    layers: Sequence[Layer],
    states: MutableMapping[Tensor, State],
    options: Mapping[str, Any],
    bits: Bits,
    skip: Tensor | None,
) -> None:
    """One step of layers that have a P and a gradient, in place; P where the backward has not.

    Args:
        states: of the parameters; a layer's buffers are made at its first step.
        options: of the layers' group.
        bits: what rounds stochastically.
        skip: 0-d bool; where it is true nothing changes.
    """
    for alike in _group(layers, options):
        _step_together_(backend, alike, states, options, bits, skip)


def _group(layers: Sequence[Layer], options: Mapping[str, Any]) -> list[list[Layer]]:
    """Layers that one update takes together: of one dtype, device and sharding."""
    groups: dict[tuple[object, ...], list[Layer]] = {}
    for layer in layers:
        key: tuple[object, ...] = (layer.weight.dtype, layer.weight.get_device(), layer.shards)
        # One by one, so that the float32 copies of a single layer are alive at a time.
        # Not where they share an all-reduce.
        alone = layer.shards is None and options["low_precision"] == "stochastic"
        if alone and is_low(layer.weight):
            key = (*key, layer.name)
        groups.setdefault(key, []).append(layer)
    return list(groups.values())


def _step_together_(
    backend: ModuleType,
    layers: Sequence[Layer],
    states: MutableMapping[Tensor, State],
    options: Mapping[str, Any],
    bits: Bits,
    skip: Tensor | None,
) -> None:
    params: list[Tensor] = []
    found: list[State] = []
    firsts: list[State] = []
    inverses: list[Inverse | None] = []
    sizes: list[int] = []
    for layer in layers:
        mine = [param for param in layer.params if param.grad is not None]
        own = [states[param] for param in mine]
        fill_layer_states(layer, mine, own, options)
        params += mine
        found += own
        # The weight's, which holds what is the layer's.
        firsts.append(own[0])
        sizes.append(len(mine))
        with_bias = len(mine) == len(layer.params)
        inverses.append(None if layer.at_backward else layer.inverse_for(with_bias))
    squared = {"rms": firsts, "adam": found}.get(options["normalize"], [])
    # The backends round to the nearest themselves.
    copies = params
    if options["low_precision"] != "nearest":
        copies = open_copies(params, found, options)
    pairs = zip(params, copies, strict=True)
    gradients = [p.grad if copy is p else p.grad.float() for p, copy in pairs if p.grad is not None]
    update_layers_ = backend.update_layers_
    if layers[0].shards is not None:
        update_layers_ = functools.partial(update_shards_, backend)
    update_layers_(
        copies,
        gradients,
        [state["exp_avg"] for state in found] if options["momentum"] else [],
        [state["exp_avg_sq"] for state in squared],
        [state["step"] for state in firsts],
        inverses,
        layer_sizes=sizes,
        normalize=options["normalize"],
        lr=options["lr"],
        momentum=options["momentum"],
        beta2=options["beta2"],
        eps=options["eps"],
        weight_decay=options["weight_decay"],
        skip=None if skip is None else skip.to(params[0].device, non_blocking=True),
    )
    close_copies(params, copies, options, bits)
