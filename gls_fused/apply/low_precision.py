"""How parameters of 16 bits take a step that is smaller than their rounding.

    nearest     the step is rounded into the parameter, and lost where it is below half a unit
    stochastic  rounded up or down with the probability that makes its mean exact
    master      a float32 copy in the state takes the step, the parameter is that copy rounded

The update is made on float32 copies of parameters and gradients, with float32 averages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gls_fused.distributed.sharding import rows_here

Bits: TypeAlias = Callable[[Tensor], torch.Generator]

MOST_SEEDS = 1 << 32
LOW_DTYPES = frozenset((torch.bfloat16, torch.float16))
POLICIES = ("nearest", "stochastic", "master")


def is_low(tensor: Tensor) -> bool:
    """Whether a tensor has fewer bits than its averages."""
    return tensor.dtype in LOW_DTYPES


def make_bits(options: Mapping[str, Any]) -> Bits:
    """The generators of one step of a group, by parameter.

    A parameter's bits are the same on every rank, whatever the rank holds of others, and after a
    resume.

    Args:
        options: params, seed, and step, the calls of `step` so far.
    """
    places: dict[Tensor, int] = {}

    def make(param: Tensor) -> torch.Generator:
        if not places:
            places.update((other, place) for place, other in enumerate(options["params"]))
        # The CPU's generator knows 32 bits of a seed; odd factors keep seeds, steps and parameters
        # apart.
        mixed = options["seed"] * 0x9E3779B1 + options["step"] * 0x85EBCA77
        mixed += places[param] * 0xC2B2AE3D
        return torch.Generator(param.device).manual_seed(mixed % MOST_SEEDS)

    return make


def open_copies(
    params: Sequence[Tensor], states: Sequence[dict[str, Any]], options: Mapping[str, Any]
) -> list[Tensor]:
    """What the update writes to: float32 for a parameter of 16 bits, else the parameter.

    With "master" the copy is kept as state["master"]. An element of the parameter that is not the
    copy's rounding was changed elsewhere, and the copy follows it.
    """
    if not any(map(is_low, params)):
        return list(params)
    copies: list[Tensor] = []
    for param, state in zip(params, states, strict=True):
        if not is_low(param):
            copies.append(param)
            continue
        wide = param.float()
        if options["low_precision"] == "master":
            master = state.setdefault("master", wide)
            if master is not wide:
                master.copy_(torch.where(master.to(param.dtype) == param, master, wide))
            wide = master
        copies.append(wide)
    return copies


def close_copies(
    params: Sequence[Tensor],
    copies: Sequence[Tensor],
    options: Mapping[str, Any],
    bits: Bits,
) -> None:
    """Round what `open_copies` gave, and the update wrote to, into the parameters."""
    for param, copy in zip(params, copies, strict=True):
        if copy is param:
            continue
        if options["low_precision"] == "stochastic":
            copy = round_stochastically(rows_here(copy), param.dtype, bits(param))
        rows_here(param).copy_(rows_here(copy))


def round_stochastically(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """One of the two neighbours in `dtype`, so that the mean over many draws is the value.

    Args:
        values: float32, any shape.
        dtype: bfloat16 or float16.
    Numerics: values that `dtype` holds stay as they are; what it rounds to infinity, and NaN, are
        rounded as `values.to(dtype)` is.
    """
    nearest = values.to(dtype)
    # Sign and magnitude: one less in the bits is the next number towards zero.
    bits = nearest.view(torch.int16)
    inner = bits - (nearest.float().abs() > values.abs()).to(torch.int16)
    outer = inner + 1
    low, high = (x.view(dtype).float().abs() for x in (inner, outer))
    draws = torch.empty_like(values).uniform_(generator=generator)
    chosen = torch.where(draws * (high - low) < values.abs() - low, outer, inner)
    return torch.where(nearest.isfinite(), chosen.view(dtype), nearest)
