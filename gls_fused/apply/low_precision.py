"""How parameters of 16 bits take a step that is smaller than their rounding.

    nearest     the step is rounded into the parameter, and lost where it is below half a unit
    stochastic  rounded up or down with the probability that makes its mean exact
    master      a float32 copy in the state takes the step, the parameter is that copy rounded

The update is made on float32 copies of parameters and gradients, with float32 averages. Copies are
made, and rounded, of many parameters at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gls_fused import reference
from gls_fused.distributed.sharding import is_sharded, rows_here

Seeds: TypeAlias = Callable[[Tensor], int]

MOST_SEEDS = 1 << 32
LOW_DTYPES = frozenset((torch.bfloat16, torch.float16))
POLICIES = ("nearest", "stochastic", "master")


def is_low(tensor: Tensor) -> bool:
    """Whether a tensor has fewer bits than its averages."""
    return tensor.dtype in LOW_DTYPES


def make_seeds(options: Mapping[str, Any]) -> Seeds:
    """What a group's parameters are rounded by, beside the steps that they have taken.

    A parameter's seed is the same on every rank, whatever the rank holds of others, and after a
    resume.

    Args:
        options: params and seed.
    """
    places: dict[Tensor, int] = {}

    def seed_of(param: Tensor) -> int:
        if not places:
            places.update((other, place) for place, other in enumerate(options["params"]))
        # Odd factors keep seeds and parameters apart.
        mixed: int = options["seed"] * 0x9E3779B1 + places[param] * 0xC2B2AE3D
        return mixed % MOST_SEEDS

    return seed_of


def widen(tensors: Sequence[Tensor]) -> list[Tensor]:
    """float32 copies of those of 16 bits, by one op of torch's; the others themselves."""
    found = list(tensors)
    if not any(map(is_low, found)):
        return found
    # Of tensors that are spread over ranks not all ops of torch's know.
    at_once = [place for place, x in enumerate(found) if is_low(x) and not is_sharded(x)]
    copies = [torch.empty_like(found[place], dtype=torch.float32) for place in at_once]
    if copies:
        torch._foreach_copy_(copies, [found[place] for place in at_once])
    for place, copy in zip(at_once, copies, strict=True):
        found[place] = copy
    return [x.float() if is_low(x) else x for x in found]


def open_copies(
    params: Sequence[Tensor], states: Sequence[dict[str, Any]], options: Mapping[str, Any]
) -> list[Tensor]:
    """What the update writes to: float32 for a parameter of 16 bits, else the parameter.

    With "master" the copy is kept as state["master"]. An element of the parameter that is not the
    copy's rounding was changed elsewhere, and the copy follows it.
    """
    copies = widen(params)
    if options["low_precision"] != "master":
        return copies
    for place, (param, state) in enumerate(zip(params, states, strict=True)):
        wide = copies[place]
        if wide is not param:
            master = state.setdefault("master", wide)
            if master is not wide:
                master.copy_(torch.where(master.to(param.dtype) == param, master, wide))
            copies[place] = master
    return copies


def close_copies(
    params: Sequence[Tensor],
    copies: Sequence[Tensor],
    options: Mapping[str, Any],
    seeds: Seeds,
    steps: Sequence[Tensor],
    backend: ModuleType | None,
) -> None:
    """Round what `open_copies` gave, and the update wrote to, into the parameters.

    Args:
        steps: taken, of each parameter.
        backend: whose kernels round stochastically; None, the reference's ops.
    """
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, (param, copy) in enumerate(zip(params, copies, strict=True)):
        if copy is not param:
            alike.setdefault((param.device, param.dtype), []).append(place)
    for mine in alike.values():
        written = [rows_here(params[place]) for place in mine]
        values = [rows_here(copies[place]) for place in mine]
        if options["low_precision"] == "stochastic":
            drawn = [seeds(params[place]) for place in mine]
            counts = [steps[place] for place in mine]
            (backend or reference).round_params_(written, values, drawn, counts)
        else:
            torch._foreach_copy_(written, values)
