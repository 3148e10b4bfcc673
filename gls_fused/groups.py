"""What a user may pass as a group: its modules and parameters, and its options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from gls_fused.apply.low_precision import MOST_SEEDS, POLICIES
from gls_fused.distributed.ranks import unwrapped
from gls_fused.preconditioner import check_choice, check_number, check_options

NORMALIZATIONS = ("rms", "adam", "sgd", "none")


def check_group_options(options: Mapping[str, Any], site: str) -> None:
    """Raises ValueError naming the first option that is out of range."""
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.ndim:
        raise ValueError(f"lr: expected a number or a tensor of no dimension, got {[*lr.shape]}")
    check_number("lr", lr, 0)
    check_number("momentum", options["momentum"], 0, 1, closed=True)
    check_number("beta2", options["beta2"], 0, 1, closed=True)
    check_number("eps", options["eps"], 0)
    check_number("weight_decay", options["weight_decay"], 0, closed=True)
    check_choice("normalize", options["normalize"], NORMALIZATIONS)
    check_choice("low_precision", options["low_precision"], POLICIES)
    seed = options["seed"]
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < MOST_SEEDS:
        raise ValueError(f"seed: expected a whole number in [0, {MOST_SEEDS}), got {seed!r}")
    check_options(options)
    check_site(options["normalize"], site)


def check_site(normalize: str, site: str) -> None:
    """Raises ValueError where the site does not keep what the step's size is made of."""
    if normalize == "sgd" and site == "backward":
        raise ValueError(
            "site: normalize='sgd' needs the true gradient, expected auto, step, got 'backward'"
        )


def split_group(entry: Any) -> tuple[list[tuple[str, nn.Module]], list[Tensor]]:
    """The modules of a group's "params", with a prefix for their names, and all its parameters."""
    entries = [entry] if isinstance(entry, nn.Module | Tensor) else list(entry)
    modules: list[tuple[str, nn.Module]] = []
    params: dict[Tensor, None] = {}
    for index, item in enumerate(entries):
        if isinstance(item, nn.Module):
            item = unwrapped(item)
            modules.append(("" if len(entries) == 1 else str(index), item))
            params.update(dict.fromkeys(item.parameters()))
        elif isinstance(item, Tensor):
            params[item] = None
        else:
            raise TypeError(f"params: expected modules or parameters, got {type(item).__name__}")
    return modules, list(params)


def name_params(
    modules: list[tuple[str, nn.Module]], params: list[Tensor], index: int
) -> dict[Tensor, str]:
    """Qualified names of a group's parameters, or the numbers of those that no module has."""
    names = {param: f"{number} of group {index}" for number, param in enumerate(params)}
    for prefix, module in modules:
        names.update({param: name for name, param in module.named_parameters(prefix)})
    return names


def describe_options(group: Mapping[str, Any]) -> str:
    """A group's options, alike on all ranks."""
    options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    # A tensor's text tells its device.
    return str({k: float(v) if isinstance(v, Tensor) else v for k, v in options.items()})


def describe_bare(
    modules: list[tuple[str, nn.Module]], params: list[Tensor], index: int
) -> dict[str, str]:
    """Why the parameters of a group without modules take Adam's update."""
    if modules:
        return {}
    return {f"group {index}, {len(params)} parameters": "given as parameters, not as a module"}


def check_dense(groups: Iterable[Mapping[str, Any]]) -> None:
    """Raises RuntimeError for a sparse gradient, before anything is changed."""
    for group in groups:
        for param in group["params"]:
            if param.grad is not None and param.grad.is_sparse:
                raise RuntimeError("GLS does not take sparse gradients; use torch.optim.SparseAdam")
