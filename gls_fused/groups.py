"""What a user may pass as a group: its modules and parameters, and its options."""

from __future__ import annotations

import difflib
import math
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, complex32, nn

from gls_fused.apply.low_precision import MOST_SEEDS, POLICIES
from gls_fused.capture.layer import Layer
from gls_fused.distributed.ranks import unwrapped
from gls_fused.host import has_sparse_gradient
from gls_fused.reference import Normalize

Scale: TypeAlias = Normalize | Literal["auto", "spectral"]
NORMALIZATIONS = ("auto", "spectral", "factored", "row", "rms", "adam", "sgd", "none")

CURVATURES = ("subspace", "dense")
SITES = ("auto", "step", "backward")
POWERS = (1, 0.75, 0.5, 0.25)
# What float32 holds, as the states do.
MOST_GROWTH = torch.finfo(torch.float32).max

# Keys that a group may have besides the options of GLS; others are kept as well.
FREE_KEYS = {"params", "param_names", "name", "initial_lr", "step", "version"}
# What a group cannot have of its own.
WHOLE = ("model", "site", "backend", "process_group")


class Members(NamedTuple):
    """What a group's "params" holds."""

    modules: list[tuple[str, nn.Module]]  # with a prefix for the names of their parameters
    params: list[Tensor]
    names: list[str]  # of the parameters where the user gave them, else empty


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if not (isinstance(value, str | bool) or _is_plain(value)) or value not in choices:
        raise ValueError(f"{name}: expected {', '.join(map(str, choices))}, got {value!r}")


def check_number(
    name: str, value: Any, low: float, high: float = math.inf, *, closed: bool = False
) -> None:
    """Checks that low < value < high, or low <= value with `closed`.

    Raises:
        TypeError: it is no int or float, be it Python's or numpy's.
        ValueError: it is out of this range, or not a number.
    """
    expected = f"{'[' if closed else '('}{low}, {high})"
    if not _is_plain(value):
        raise TypeError(f"{name}: expected a number in {expected}, got {value!r}")
    # Python's ints may be more than any float.
    beyond = isinstance(value, int) and value > sys.float_info.max
    if beyond or not ((low <= value if closed else low < value) and value < high):
        raise ValueError(f"{name}: expected a value in {expected}, got {value}")


def _is_plain(value: Any) -> bool:
    """Whether it is a number of Python's or numpy's."""
    return isinstance(value, int | float) or (isinstance(value, Real) and hasattr(value, "item"))


def check_count(name: str, value: Any, otherwise: str = "") -> None:
    """Raises ValueError unless `value` is a whole number, at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a whole number, at least 1{otherwise}, got {value!r}")


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first option of the statistics that is out of range."""
    check_number("damping", options["damping"], 0)
    check_choice("power", options["power"], POWERS)
    check_number("beta", options["beta"], 0, 1, closed=True)
    if options["rank"] != "auto":
        check_count("rank", options["rank"], " or 'auto'")
    check_count("curvature_every", options["curvature_every"])
    check_choice("curvature", options["curvature"], CURVATURES)


def check_group_options(options: Mapping[str, Any], site: str) -> None:
    """Raises what `check_number` does, naming the first option that is out of range."""
    check_rate(options["lr"])
    check_rest(options, site)


def check_rate(lr: Any, *, waits: bool = True) -> None:
    """Raises what `check_number` does, and ValueError for a tensor of more than a number.

    Args:
        waits: for a device that has it; else such a tensor is not looked into.
    """
    if isinstance(lr, nn.Module):
        raise TypeError("lr: expected a number, got a module; pass it as GLS(params, model=model)")
    if isinstance(lr, Tensor):
        if lr.ndim:
            shape = [*lr.shape]
            raise ValueError(f"lr: expected a number or a tensor of no dimension, got {shape}")
        if not (waits or lr.is_cpu):
            return
        lr = lr.item()
    check_number("lr", lr, 0, closed=True)


def check_rest(options: Mapping[str, Any], site: str) -> None:
    """The same of all options but lr."""
    check_number("momentum", options["momentum"], 0, 1, closed=True)
    check_number("beta2", options["beta2"], 0, 1, closed=True)
    check_number("eps", options["eps"], 0)
    check_number("weight_decay", options["weight_decay"], 0, closed=True)
    check_choice("normalize", options["normalize"], NORMALIZATIONS)
    if options["max_change"] is not None:
        check_number("max_change", options["max_change"], 0)
    if options["max_growth"] is not None:
        check_number("max_growth", options["max_growth"], 1, MOST_GROWTH, closed=True)
    check_count("split", options["split"])
    check_choice("spectral_head", options["spectral_head"], (True, False))
    check_number("spectral_share", options["spectral_share"], 0, closed=True)
    check_choice("low_precision", options["low_precision"], POLICIES)
    seed = options["seed"]
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < MOST_SEEDS:
        raise ValueError(f"seed: expected a whole number in [0, {MOST_SEEDS}), got {seed!r}")
    check_options(options)
    check_site(options["normalize"], site)


def check_split(layer: Layer, options: Mapping[str, Any], *, last: bool) -> None:
    """Raises ValueError where a weight that is to be split is not `split` matrices of as many rows.

    Args:
        last: whether it is the last layer, which is not split unless it is asked to be.
    """
    if (options["spectral_head"] or not last) and layer.outputs % options["split"]:
        raise ValueError(
            f"split: expected a divisor of the {layer.outputs} outputs of layer {layer.name!r}, "
            f"got {options['split']}"
        )


def check_kept(layer: Layer, options: Mapping[str, Any]) -> None:
    """Raises ValueError where a group asks for other statistics than its layer was made with."""
    kind, rank = options["curvature"], options["rank"]
    if layer.curvature_of(kind, rank).shapes() != layer.curvature.shapes():
        raise ValueError(
            f"curvature, rank: expected those that the statistics of layer {layer.name!r} were "
            f"made with, got {kind!r}, {rank!r}; build a new optimizer to change them"
        )


def check_site(normalize: str, site: str) -> None:
    """Raises ValueError where the site does not keep what the step's size is made of."""
    if normalize == "sgd" and site == "backward":
        raise ValueError(
            "site: normalize='sgd' needs the true gradient, expected auto, step, got 'backward'"
        )


def check_keys(group: Mapping[str, Any]) -> None:
    """Raises TypeError for no dict, ValueError for what it lacks or cannot have of its own."""
    given: Any = group
    if not isinstance(given, dict):
        raise TypeError(f"group: expected a dict with 'params', got {type(given).__name__}")
    if "params" not in group:
        raise ValueError(f"group: expected a key 'params', got {sorted(map(str, group))}")
    for key in WHOLE:
        if key in group:
            raise ValueError(
                f"group: {key!r} is an option of the whole optimizer, not of a group, "
                f"got {group[key]!r}"
            )
    if group.get("maximize"):
        raise ValueError("group: GLS minimizes, expected no 'maximize', got True")


def warn_of_misspellings(group: Mapping[str, Any], options: Iterable[str], stacklevel: int) -> None:
    """Warns of a key that is kept, as torch keeps it, and that looks like an option of GLS."""
    known = list(options)
    for key in group.keys() - set(known) - FREE_KEYS:
        for meant in difflib.get_close_matches(key, known, n=1, cutoff=0.8):
            warnings.warn(
                f"group: {key!r} is no option of GLS, did you mean {meant!r}? It is kept, and "
                "nothing reads it",
                stacklevel=stacklevel + 1,
            )


def read_groups(params: Any, model: nn.Module | None) -> list[dict[str, Any]]:
    """The groups that a user passed to GLS, in any of the forms that torch.optim takes.

    Raises:
        TypeError: neither a module nor parameters, named parameters or groups.
        ValueError: nothing.
    """
    if params is None:
        if model is None:
            raise TypeError("params: expected a module, parameters or groups, got nothing")
        params = model
    if isinstance(params, nn.Module):
        return [{"params": params}]
    if isinstance(params, Tensor | str | dict) or not isinstance(params, Iterable):
        raise TypeError(
            "params: expected a module, or an iterable of parameters, named parameters or dicts, "
            f"got {type(params).__name__}"
        )
    _check_ordered(params)
    entries = list(params)
    if not entries:
        raise ValueError("params: expected a module or a non-empty list, got []")
    if any(isinstance(entry, dict) for entry in entries):
        for entry in entries:
            if not isinstance(entry, dict):
                raise TypeError(
                    f"params: expected dicts alone or none, got {type(entry).__name__} beside them"
                )
            check_keys(entry)
        return entries
    return [{"params": entries}]


def split_group(entry: Any) -> Members:
    """The modules of a group's "params", and all its parameters."""
    if isinstance(entry, nn.Module | Tensor):
        entry = [entry]
    if isinstance(entry, str) or not isinstance(entry, Iterable):
        raise TypeError(
            f"params: expected modules, parameters or named parameters, got {type(entry).__name__}"
        )
    _check_ordered(entry)
    entries = list(entry)
    modules: list[tuple[str, nn.Module]] = []
    params: dict[Tensor, str | None] = {}
    for index, item in enumerate(entries):
        if isinstance(item, nn.Module):
            item = unwrapped(item)
            modules.append(("" if len(entries) == 1 else str(index), item))
            params.update(dict.fromkeys(item.parameters()))
        elif isinstance(item, Tensor):
            params[item] = None
        elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Tensor):
            params[item[1]] = str(item[0])
        else:
            raise TypeError(
                "params: expected modules, parameters or named parameters, "
                f"got {type(item).__name__}"
            )
    names = [name for name in params.values() if name is not None]
    if names and len(names) != len(params):
        raise ValueError("params: expected a name for all parameters of a group or for none")
    for param in params:
        if param.dtype is complex32:
            raise ValueError(
                f"params: expected parameters of any dtype but complex32, got {param.dtype}"
            )
    return Members(modules, list(params), names)


def _check_ordered(params: Iterable[Any]) -> None:
    if isinstance(params, set | frozenset):
        raise TypeError(
            "params: expected an order, by which a saved state is found again, "
            f"got a {type(params).__name__}"
        )


def name_params(members: Members, index: int, model: nn.Module | None) -> dict[Tensor, str]:
    """Qualified names of a group's parameters, or the numbers of those that no module has."""
    names = {param: f"{number} of group {index}" for number, param in enumerate(members.params)}
    roots = members.modules if model is None else [*members.modules, ("", model)]
    for prefix, module in roots:
        own = module.named_parameters(prefix)
        names.update({param: name for name, param in own if param in names})
    return names


def option_names(defaults: Mapping[str, Any]) -> list[str]:
    """The options of an optimizer's groups, by its defaults."""
    # torch's own mark, which it gives to the defaults of every optimizer.
    return [option for option in defaults if option != "differentiable"]


def describe_options(group: Mapping[str, Any]) -> str:
    """A group's options, alike on all ranks."""
    options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    # A tensor's text tells its device.
    return str({k: float(v) if isinstance(v, Tensor) else v for k, v in options.items()})


def check_dense(groups: Iterable[Mapping[str, Any]]) -> None:
    """Raises RuntimeError for a sparse gradient, before anything is changed."""
    if any(has_sparse_gradient(group["params"]) for group in groups):
        raise RuntimeError("GLS does not take sparse gradients; use torch.optim.SparseAdam")
