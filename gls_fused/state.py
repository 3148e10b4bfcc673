"""The format of a saved state: its version, what a layer's state holds, the checks before a load.

    every parameter   step (0-d), exp_avg and exp_avg_sq (shaped as it; exp_avg_sq 0-d, on a layer's
                      weight, for "rms"), master (shaped as it, float32)
    a layer's weight  rows and outputs (plain numbers), at_step (whether its p.grad has turned out
                      to be in use), lent (whether another module uses it by itself) and, where it
                      is saved, due (what it is to do in its next step: 1 to gather, 2 to have its
                      growth measured, 3 both; none is as good as 0), weight_rms and held of
                      max_change (0-d), growth and slow_sq of max_growth (0-d), and the tensors of
                      gls_fused.curvature.estimate
    a stack's weight  the same, with the matrices as first axis of all tensors but step
    a group           its options, step and version: numbers and names

All tensors are of float32, or float64 for parameters of float64; step is float32. In a saved state
the basis lies in memory by rows, as a tensor that is received from another rank does; in an
optimizer's it lies by columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from gls_fused.apply.buffers import (
    empty_growth,
    fill_layer_states,
    may_grow,
    square_shapes,
    zeros_of,
)
from gls_fused.apply.fallback import start_adam
from gls_fused.apply.low_precision import open_copies
from gls_fused.capture.layer import Layer
from gls_fused.curvature.estimate import (
    Dense,
    State,
    Subspace,
    by_columns,
    empty_state,
)
from gls_fused.distributed.sharding import is_sharded

# 0: without a version, "low_precision", "seed" and "outputs". 1: without "at_step". 2: without
# "power", "max_change" and what goes with them. 3: without "samples", "split" and "spectral_head".
# 4: without "spectral_share", which was a half. 5: without "max_growth".
VERSION = 6
ADDED_SINCE: dict[int, dict[str, Any]] = {
    0: {"low_precision": "nearest", "seed": 0},
    2: {"power": 1, "max_change": None},
    3: {"split": 1, "spectral_head": False},
    4: {"spectral_share": 0.5},
    5: {"max_growth": None},
}

# A number for each of a layer's matrices.
MEASURED = ("weight_rms", "held", "growth", "slow_sq")
AVERAGES = ("exp_avg", "exp_avg_sq", "exp_avg_sq_columns", *MEASURED)
OWN_NUMBERS = {"rows", "outputs", "at_step", "lent", "due"}
OWN_TENSORS = {"step", "master", *AVERAGES, *Dense.names, *Subspace.names}

Groups = Sequence[Mapping[str, Any]]


def check_version(state: Mapping[str, Any]) -> int:
    """The version of a saved group, or of what `attach` saved.

    Raises:
        ValueError: it is a later one.
    """
    version = state.get("version", 0)
    if version not in range(VERSION + 1):
        raise ValueError(f"version: expected a state of 0 to {VERSION}, got {version!r}")
    return int(version)


def upgrade_defaults(defaults: MutableMapping[str, Any]) -> None:
    """Give those of an earlier version the options that have been added since."""
    for added in ADDED_SINCE.values():
        for option, value in added.items():
            defaults.setdefault(option, value)


def upgrade_group(group: Mapping[str, Any], index: int, options: Iterable[str]) -> dict[str, Any]:
    """A saved group in the present format.

    Args:
        options: the keys that a group must have.
    Raises:
        TypeError: it is no dict.
        ValueError: it is of a later version, lacks an option, or its step is no whole number.
    """
    check_mapping(f"group {index}", group)
    version = check_version(group)
    added = {
        key: value
        for since, defaults in ADDED_SINCE.items()
        if version <= since
        for key, value in defaults.items()
    }
    group = {**added, **group, "version": VERSION}
    for option in (*options, "step"):
        if option not in group:
            raise ValueError(
                f"group {index}: expected the options of GLS, got none named {option!r}"
            )
    return {**group, "step": read_step(f"group {index}", group["step"])}


def check_saved(state_dict: Any) -> None:
    """Raises TypeError or ValueError unless this is what an optimizer's `state_dict` gives."""
    check_mapping("state_dict", state_dict)
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            "state_dict: expected the keys 'state' and 'param_groups', "
            f"got {sorted(map(str, state_dict))}"
        )
    check_mapping("state_dict: state", state_dict["state"])


def upgrade_state(state_dict: Mapping[str, Any], options: Sequence[str]) -> dict[str, Any]:
    """A saved state with groups and layers as `upgrade_group` and `upgrade_layer` give them."""
    check_saved(state_dict)
    groups = enumerate(state_dict["param_groups"])
    states = state_dict["state"].items()
    return {
        **state_dict,
        "state": {key: upgrade_layer(f"parameter {key}", state) for key, state in states},
        "param_groups": [upgrade_group(group, index, options) for index, group in groups],
    }


def upgrade_layer(owner: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's saved state in the present format.

    Statistics without a count stand for as many rows as it takes: their damping is what it was.

    Args:
        owner: whose it is, for errors.
    """
    check_mapping(owner, state)
    numbers = OWN_NUMBERS & state.keys()
    state = {**state, **{key: _as_number(state[key]) for key in numbers}}
    for key in ("trace", "gram"):
        if "rows" in state and isinstance(state.get(key), Tensor) and "samples" not in state:
            unknown = torch.full((), math.inf, dtype=state[key].dtype, device=state[key].device)
            return {**state, "samples": unknown}
    return state


def _as_number(value: Any) -> Any:
    """Python's whole number of one that somebody has made numpy's, a tensor or a float."""
    if hasattr(value, "item") and not getattr(value, "ndim", 1):
        value = value.item()
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_state(
    state_dict: Mapping[str, Any],
    groups: Groups,
    layers: Sequence[Sequence[Layer]],
    names: Mapping[Tensor, str],
) -> None:
    """Raises ValueError, naming the layer and both shapes, unless a state fits the model.

    What other packages keep in it is none of our concern.

    Args:
        state_dict: from `upgrade_state`.
        groups: the optimizer's, with the layers of each.
        names: of the parameters.
    """
    saved_groups, saved = state_dict["param_groups"], state_dict["state"]
    states: dict[Tensor, Mapping[str, Any]] = {}
    for group, saved_group in zip(groups, saved_groups, strict=False):
        keys = zip(group["params"], saved_group["params"], strict=False)
        states.update({param: saved.get(key, {}) for param, key in keys})
    owned: set[Tensor] = set()
    for mine, saved_group in zip(layers, saved_groups, strict=False):
        for layer in mine:
            owned.update(layer.params)
            known = "rows" in states.get(layer.weight, {})
            for param in (param for param in layer.params if param in states):
                shapes = _shapes(param)
                if known and param is layer.weight:
                    shapes |= _layer_shapes(layer, saved_group)
                _check_sharding(names.get(param, ""), param, states[param])
                _check_layer(layer, param, states[param])
                _check_shapes(f"layer {layer.name!r}", states[param], shapes)
            _check_kind(layer, saved_group)
    for param, state in states.items():
        if param not in owned:
            name = names.get(param, "")
            _check_sharding(name, param, state)
            _check_shapes(f"parameter {name!r}", state, _shapes(param))
    _check_count("groups", len(groups), len(saved_groups))
    for index, (group, saved_group) in enumerate(zip(groups, saved_groups, strict=True)):
        what = f"parameters in group {index}"
        _check_count(what, len(group["params"]), len(saved_group["params"]))


def check_curvature(layer: Layer, state: Mapping[str, Any]) -> None:
    """Raises ValueError unless a state holds the layer's kind of curvature, in its shapes."""
    _check_layer(layer, layer.weight, state)
    _check_shapes(f"layer {layer.name!r}", state, layer.curvature.shapes())


def saved_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state as it is saved: it shares what lies in memory as its shape has it."""
    found = dict(state)
    if isinstance(basis := state.get("basis"), Tensor):
        found["basis"] = basis.contiguous()
    return found


def saved_layer(layer: Layer, state: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """The saved state of a layer's weight, without mean squares that its next step begins anew.

    They are of another way to normalize than the group's, which somebody has changed since. With
    the growth of steps that may grow also where "auto" takes others, as who makes room for a
    checkpoint does not know yet which it will take.
    """
    if "rows" not in state:
        return dict(state)
    kept = square_shapes(layer, group)
    found = {
        key: value
        for key, value in state.items()
        if key not in ("exp_avg_sq", "exp_avg_sq_columns") or kept.get(key) == tuple(value.shape)
    }
    if "step" in state and "growth" not in state and may_grow(layer, group):
        found |= empty_growth(layer)
    return {**found, "due": due_of(layer)}


def saved_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options as they are saved: numpy's numbers, which schedulers leave, as Python's."""
    return {
        key: value.item() if hasattr(value, "item") and not isinstance(value, Tensor) else value
        for key, value in group.items()
    }


def copy_states(state_dict: Mapping[str, Any], groups: Groups) -> dict[Tensor, State]:
    """Copies of a saved state, by the groups' parameters."""
    found: dict[Tensor, State] = {}
    for saved, group in zip(state_dict["param_groups"], groups, strict=True):
        for key, param in zip(saved["params"], group["params"], strict=True):
            if key in state_dict["state"]:
                found[param] = copy_tensors(state_dict["state"][key], param)
    return found


def due_of(layer: Layer) -> int:
    """What a layer is to do in its next step, as a saved state has it."""
    return layer.due + 2 * layer.growth_due


def set_due(layer: Layer, due: int) -> None:
    """What `due_of` gave."""
    layer.due, layer.growth_due = bool(due & 1), bool(due & 2)


def take_due(layers: Iterable[Layer], states: Mapping[Tensor, State]) -> None:
    """Tell layers what a state that has been loaded says of their next step."""
    for layer in layers:
        set_due(layer, int((states.get(layer.weight) or {}).pop("due", 0)))


def copy_tensors(state: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
    """A state on the parameter's device; statistics of 16-bit parameters stay in float32."""
    wide = torch.promote_types(param.dtype, torch.float32)
    found: dict[str, Any] = {}
    # To be written in later steps, also where they are loaded in inference mode.
    with torch.inference_mode(False):
        for key, value in state.items():
            if not isinstance(value, Tensor):
                found[key] = value
            elif key in OWN_TENSORS:
                dtype = torch.float32 if key == "step" else wide
                found[key] = value.to(param.device, dtype, copy=True)
                if key == "basis":
                    found[key] = by_columns(found[key])
            else:
                # Another package's, in its own dtype.
                found[key] = value.to(param.device, copy=True)
    return found


def is_priming(groups: Groups, states: Mapping[Tensor, State]) -> bool:
    """Whether a step moves nothing, and is there to make the state that a saved one fills.

    torch.distributed.checkpoint takes such a step, with gradients of zero, at lr 0.
    """
    rates = [group["lr"] for group in groups]
    # A device is not asked: the rate of such a step is a number, or on the CPU.
    on_device = any(isinstance(rate, Tensor) and not rate.is_cpu for rate in rates)
    if states or on_device or any(map(float, rates)):
        return False
    gradients = [param.grad for group in groups for param in group["params"]]
    return not any(gradient.any() for gradient in gradients if gradient is not None)


def prime_states(
    groups: Sequence[tuple[Mapping[str, Any], Sequence[Layer]]],
    states: MutableMapping[Tensor, State],
) -> None:
    """A state of no rows and no steps for all parameters with a gradient."""
    # A bias may be in another group than its weight.
    owned = {param for _, layers in groups for layer in layers for param in _stepping(layer)}
    for group, layers in groups:
        mine = _prime_layers(group, layers, states)
        others = [p for p in group["params"] if p.grad is not None and p not in owned]
        for param in others:
            start_adam(param, states[param])
        if group["low_precision"] == "master":
            params = [*mine, *others]
            open_copies(params, [states[param] for param in params], group)


def _stepping(layer: Layer) -> list[Tensor]:
    """The parameters that a layer takes a step of."""
    if layer.weight.grad is None:
        return []
    return [param for param in layer.params if param.grad is not None]


def _prime_layers(
    group: Mapping[str, Any], layers: Sequence[Layer], states: MutableMapping[Tensor, State]
) -> list[Tensor]:
    """The parameters of the layers that have been given a state."""
    primed: list[Tensor] = []
    for layer in layers:
        mine = _stepping(layer)
        if not mine:
            continue
        primed += mine
        found = [states[param] for param in mine]
        empty = empty_state(layer.curvature, layer.statistics_dtype, layer.weight.device)
        found[0].update(empty, rows=0, outputs=layer.outputs, at_step=0, lent=0)
        if group["max_change"] is not None:
            found[0]["weight_rms"] = torch.zeros(
                layer.stack, dtype=layer.statistics_dtype, device=layer.weight.device
            )
            found[0]["held"] = zeros_of(layer, layer.stack)
        fill_layer_states(layer, mine, found, group)
    return primed


def _shapes(param: Tensor) -> dict[str, Sequence[int]]:
    shape = tuple(param.shape)
    return {"step": (), "exp_avg": shape, "exp_avg_sq": shape, "master": shape}


def _layer_shapes(layer: Layer, group: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    """Of what the state of a layer's weight may hold."""
    squares = square_shapes(layer, group)
    measured = dict.fromkeys(MEASURED, layer.stack)
    return {**layer.curvature.shapes(), **squares, **measured}


def _check_layer(layer: Layer, param: Tensor, state: Mapping[str, Any]) -> None:
    if param is not layer.weight:
        return
    for key in OWN_NUMBERS & state.keys():
        found = state[key]
        if not (isinstance(found, Real) and 0 <= float(found) < math.inf):
            raise ValueError(
                f"layer {layer.name!r}: expected {key} as a number, at least 0, got {found!r}"
            )
    outputs = state.get("outputs", layer.outputs)
    if outputs != layer.outputs:
        shape = list(layer.weight.shape)
        shape[layer.turned + layer.stacked] = outputs // (layer.groups if layer.turned else 1)
        raise ValueError(
            f"layer {layer.name!r}: expected a state of a weight {list(layer.weight.shape)}, "
            f"got one of {shape}"
        )
    missing = [key for key in layer.curvature.shapes() if key not in state]
    if "rows" in state and missing:
        raise ValueError(
            f"layer {layer.name!r}: expected {_describe(layer.curvature.shapes())}, "
            f"got {_describe(_tensor_shapes(state))}"
        )


def _check_kind(layer: Layer, saved_group: Mapping[str, Any]) -> None:
    saved = layer.curvature_of(saved_group["curvature"], saved_group["rank"])
    if saved.shapes() != layer.curvature.shapes():
        raise ValueError(
            f"layer {layer.name!r}: expected {_describe(layer.curvature.shapes())}, got a state "
            f"for {_describe(saved.shapes())}"
        )


def _check_sharding(name: str, param: Tensor, state: Mapping[str, Any]) -> None:
    for key in ("exp_avg", "exp_avg_sq", "master"):
        value = state.get(key)
        if isinstance(value, Tensor) and value.ndim and is_sharded(value) != is_sharded(param):
            found, sought = type(value).__name__, "DTensor" if is_sharded(param) else "Tensor"
            raise ValueError(f"parameter {name!r}: expected {key} as a {sought}, got a {found}")


def _check_shapes(
    owner: str, state: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> None:
    found = _tensor_shapes(state)
    for key in OWN_TENSORS & state.keys() - found.keys():
        raise ValueError(f"{owner}: expected {key} as a tensor, got {state[key]!r}")
    for key in OWN_TENSORS & found.keys():
        layout, device = state[key].layout, state[key].device
        if layout is not torch.strided or device.type == "meta":
            raise ValueError(
                f"{owner}: expected {key} as a dense tensor with values, got {layout} on {device}"
            )
    for key in found:
        if key in OWN_TENSORS and key not in shapes:
            raise ValueError(f"{owner}: expected {_describe(shapes)}, got {key} {[*found[key]]}")
    for key, shape in shapes.items():
        if key in found and tuple(found[key]) != tuple(shape):
            raise ValueError(f"{owner}: expected {key} {[*shape]}, got {[*found[key]]}")


def read_step(owner: str, step: Any) -> int:
    """How many steps have been taken; raises ValueError for what is no such number."""
    found = _as_number(step)
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise ValueError(f"{owner}: expected step as a whole number, at least 0, got {step!r}")
    return found


def check_mapping(owner: str, found: Any) -> None:
    """Raises TypeError for what is no dict."""
    if not isinstance(found, Mapping):
        raise TypeError(f"{owner}: expected a dict, got {type(found).__name__}")


def _check_count(what: str, expected: int, found: int) -> None:
    if expected != found:
        raise ValueError(f"state_dict: expected {expected} {what}, got {found}")


def _tensor_shapes(state: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    return {key: value.shape for key, value in state.items() if isinstance(value, Tensor)}


def _describe(shapes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{key} {[*shape]}" for key, shape in shapes.items())
