"""Apply: layers take their steps, as many in one call of a backend as are alike."""

from __future__ import annotations

import functools
from collections.abc import Mapping, MutableMapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gls_fused.apply.fallback import forget_adam
from gls_fused.apply.low_precision import Bits, close_copies, is_low, open_copies
from gls_fused.capture.layer import Layer
from gls_fused.curvature.estimate import State
from gls_fused.distributed.sharding import update_shards_
from gls_fused.reference import Inverse


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


def fill_layer_states(
    layer: Layer, params: Sequence[Tensor], states: Sequence[State], group: Mapping[str, Any]
) -> None:
    """Buffers for a layer's first update: one step and, for "rms", one square on its weight."""
    first, dtype = states[0], layer.statistics_dtype
    if "step" not in first:
        first["step"] = torch.zeros((), dtype=torch.float32, device=layer.weight.device)
        if group["normalize"] == "rms":
            first["exp_avg_sq"] = torch.zeros((), dtype=dtype, device=layer.weight.device)
    for state in states[1:]:
        # A bias that took Adam's steps while its weight was frozen averaged another quantity.
        if "step" in state:
            forget_adam(state)
    for param, state in zip(params, states, strict=True):
        if group["momentum"] and "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(param, dtype=dtype)
        if group["normalize"] == "adam" and "exp_avg_sq" not in state:
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype)


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
