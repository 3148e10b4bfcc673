"""Numbers to watch a run by, of what the optimizers keep anyway; nothing is kept for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gls_fused.capture.layer import Layer
from gls_fused.curvature.estimate import State
from gls_fused.distributed.sharding import everywhere
from gls_fused.preconditioner import Preconditioner
from gls_fused.reference import damping_of


def diagnose(
    preconditioners: Sequence[Preconditioner],
    options: Sequence[Mapping[str, Any]],
    squares_of: Callable[[Layer], list[Tensor]],
) -> dict[str, float]:
    """See `GLS.diagnostics`; waits for the device once. Of sharded layers, all ranks must ask.

    Args:
        options: of each preconditioner; damping and, where there are squares, beta2.
        squares_of: a layer's mean squares of the directions, before bias correction.
    """
    found: dict[str, Tensor] = {}
    for index, (preconditioner, chosen) in enumerate(zip(preconditioners, options, strict=True)):
        group = f"group{index}/" if len(preconditioners) > 1 else ""
        for layer in preconditioner.layers:
            state = preconditioner.state_of(layer, False)
            if state.get("rows"):
                values = _of_layer(layer, state, chosen, squares_of(layer))
                name = f"{group}{layer.name or layer.kind}"
                found.update({f"{name}/{key}": value for key, value in values.items()})
    if not found:
        return {}
    device = next(iter(found.values())).device
    numbers = torch.stack([value.to(device, torch.float64) for value in found.values()]).tolist()
    return dict(zip(found, numbers, strict=True))


def _of_layer(
    layer: Layer, state: State, options: Mapping[str, Any], squares: list[Tensor]
) -> dict[str, Tensor]:
    if "core" in state:
        trace, captured = state["trace"], state["core"].trace() / state["trace"]
    else:
        trace = state["gram"].trace()
        captured = torch.ones_like(trace)
    values = {
        "trace": trace,
        "captured": captured,
        "damping": damping_of(trace, layer.dim, options["damping"]),
    }
    if squares:
        total = torch.stack([everywhere(square.double().sum()) for square in squares]).sum()
        count = sum(square.numel() for square in squares)
        corrected = total / count / (1 - options["beta2"] ** state["step"].double())
        values["update_rms"] = corrected.sqrt()
    return values
