"""What the optimizers tell of a run: numbers to watch it by, and a report of the layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from gls_fused.apply.bounds import most_rms
from gls_fused.apply.spectral import factor_share, normalize_of
from gls_fused.backends.dispatch import describe_backend
from gls_fused.capture.find import Uncovered
from gls_fused.capture.layer import Layer
from gls_fused.curvature.estimate import State
from gls_fused.distributed.sharding import everywhere
from gls_fused.preconditioner import MOST_MISSES, Preconditioner, States
from gls_fused.reference import bias_correction, damping_of


def diagnose(
    parts: Sequence[tuple[str, Sequence[Layer], Mapping[str, Any]]],
    states: Mapping[Tensor, State],
    squares_of: Callable[[Layer], list[Tensor]],
) -> dict[str, float]:
    """See `GLS.diagnostics`; waits for the device once. Of sharded layers, all ranks must ask.

    Args:
        parts: a prefix for their names, layers, and their options: damping and, where there are
            squares, beta2.
        states: by weight.
        squares_of: a layer's mean squares of the directions, before bias correction.
    """
    found: dict[str, Tensor] = {}
    for prefix, layers, options in parts:
        for layer in layers:
            state = states.get(layer.weight) or {}
            if state.get("rows") and not layer.replaced:
                values = _of_layer(layer, state, options, squares_of(layer))
                name = f"{prefix}{layer.name or layer.kind}"
                found.update({f"{name}/{key}": value for key, value in values.items()})
    if not found:
        return {}
    device = next(iter(found.values())).device
    numbers = torch.stack([value.to(device) for value in found.values()]).tolist()
    return dict(zip(found, numbers, strict=True))


def describe_layers(
    preconditioner: Preconditioner,
    states: States,
    groups: Mapping[Tensor, Mapping[str, Any]] | None = None,
    *,
    whys: bool = True,
) -> list[str]:
    """A line per layer: kind, shape, rows, rank, site, backend; what an orthogonal step costs.

    Those whose weight is frozen share one.

    Args:
        groups: of the weights, where the layers' steps are scaled by them.
        whys: whether to say why layers are idle, which ranks may see each in its own way.
    """
    lines = []
    frozen = sum(not layer.weight.requires_grad for layer in preconditioner.layers)
    for layer in preconditioner.layers:
        name = layer.name or layer.kind
        if not layer.weight.requires_grad:
            continue
        if layer.idle is not None:
            lines.append(f"{name}: Adam ({layer.idle if whys else 'idle'})")
            continue
        if layer.replaced:
            lines.append(f"{name}: not in use (its module has another weight now)")
            continue
        state = states.get(layer.weight) or {}
        rank = f"rank {state['basis'].shape[-1]}" if "basis" in state else "dense"
        started = f"{state['rows']} rows, {rank}" if state.get("rows") else "no rows yet"
        if state.get("rows") and layer.misses >= MOST_MISSES:
            started += f", none for {layer.misses} steps"
        stack = "" if layer.blocks is None else f"{layer.blocks} x "
        lines.append(
            f"{name}: GLS ({layer.kind} {stack}{layer.dim} -> {layer.outputs}, {started}, "
            f"site {preconditioner.site_of(layer)}, backend {describe_backend(layer.backend_name)}"
            f"{'' if layer.table is None else f', tied to {layer.table}'}"
            f"{_describe_scale(layer, state, (groups or {}).get(layer.weight))})"
        )
    if frozen:
        lines.append(f"{frozen} frozen layers: not trained")
    return lines


def describe(
    lines: Sequence[str],
    layers: Sequence[Layer],
    uncovered: Sequence[Uncovered],
    params: Sequence[Tensor],
    otherwise: str,
) -> str:
    """A report: the layers' lines, then what becomes of the rest, and how much the layers cover.

    Args:
        uncovered: of which those that the optimizer has no longer are left out.
        params: of the optimizer; those that are frozen do not count.
        otherwise: what those get that no layer covers.
    """
    held = set(params)
    uncovered = [each for each in uncovered if each.param.requires_grad and each.param in held]
    known = {each.param for each in uncovered}
    known |= {param for layer in layers for param in layer.params}
    unused = {layer.weight for layer in layers if layer.replaced}
    trained = [param for param in params if param.requires_grad and param not in unused]
    # What is not initialised yet has no shape.
    sizes = {param: 0 if is_lazy(param) else param.numel() for param in trained}
    large, small = [], 0
    for each in uncovered:
        if is_lazy(each.param) or each.param.ndim > 1:
            large.append(each)
        else:
            small += 1
    bare = [param for param in trained if param not in known]
    found = [*lines, *(f"{each.name}: {otherwise} ({each.reason})" for each in large)]
    if small:
        found.append(f"{small} norms, biases and other vectors: {otherwise}")
    if bare:
        found.append(f"{len(bare)} parameters given without their model: {otherwise}")
    mine = {param for layer in layers if layer.idle is None for param in layer.params}
    share = sum(sizes[param] for param in mine if param in sizes) / max(1, sum(sizes.values()))
    found.append(f"share covered: {share:.1%} of {sum(sizes.values()):,} parameters")
    return "\n".join(found)


def _describe_scale(layer: Layer, state: State, group: Mapping[str, Any] | None) -> str:
    if group is None or not state.get("rows"):
        return ""
    normalize = normalize_of(layer, state, group)
    if normalize != "spectral":
        return f", {normalize}"
    share = factor_share(layer, state["rows"], group["split"])
    return f", spectral: {share:.1%} of its forward's and backward's flops"


def _of_layer(
    layer: Layer, state: State, options: Mapping[str, Any], squares: list[Tensor]
) -> dict[str, Tensor]:
    if "core" in state:
        trace, captured = state["trace"], _trace(state["core"]) / state["trace"]
    else:
        trace = _trace(state["gram"])
        captured = torch.ones_like(trace)
    values = {
        "trace": trace,
        "captured": captured,
        "samples": state["samples"],
        "damping": damping_of(trace, layer.dim, options["damping"], state["samples"]),
    }
    # Of a stack, the mean over its matrices.
    values = {key: value.mean() for key, value in values.items()}
    normalize = normalize_of(layer, state, options) if "normalize" in options else None
    # An orthogonal step is scaled by no mean square; there may be those of its bias.
    if squares and normalize != "spectral":
        total = torch.stack([everywhere(square.sum()) for square in squares]).sum()
        count = sum(square.numel() for square in squares)
        corrected = total / count / bias_correction(options["beta2"], state["step"], total.dtype)
        values["update_rms"] = corrected.sqrt()
    growth: float | Tensor = 1.0
    if options.get("max_growth") is not None and "growth" in state:
        kept = state["growth"].clamp(max=options["max_growth"])
        growth = values["growth"] = everywhere(kept.mean())
    if options.get("max_change") is not None and "weight_rms" in state:
        if normalize not in ("sgd", "none"):
            share = options["max_change"] / most_rms(str(normalize), options)
            bound = state["weight_rms"].mean() * share
            values["lr_share"] = (bound / (options["lr"] * growth)).clamp(max=1)
        if "held" in state:
            values["held"] = everywhere(state["held"].mean())
    return values


def _trace(matrices: Tensor) -> Tensor:
    found: Tensor = matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
    return found
