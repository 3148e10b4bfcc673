"""Weights that a module computes from the parameter that is trained: weight_norm, spectral_norm.

    weight_norm     W_i = g_i v_i / ||v_i|| for each output i; v is the layer's weight
    spectral_norm   W = V / sigma(V); V is the layer's weight

The gradient at that parameter is a linear function of the gradient at W and has its columns. P acts
on it as a whole, so p.grad keeps the gradient until the step. The rows are those of the op with W.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


class Place(NamedTuple):
    """Where a parameter is: the module, and the name that it has there."""

    module: nn.Module
    key: str

    @property
    def param(self) -> nn.Parameter | None:
        """What is there now."""
        return self.module._parameters.get(self.key)


def source_of(module: nn.Module) -> Place | None:
    """The parameter that a module's weight is computed from, by a norm of its outputs."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    lists: Any = module._modules.get("parametrizations")
    if isinstance(lists, nn.ModuleDict) and "weight" in lists:
        own: Any = lists["weight"]
        norm: Any = own[0]
        key = _KEYS.get(type(norm))
        if key is not None and len(own) == 1 and norm.dim == 0:
            return Place(own, key)
    for norm in module._forward_pre_hooks.values():
        key = _KEYS.get(type(norm))
        if key is not None and norm.name == "weight" and norm.dim == 0:
            return Place(module, key)
    return None


_KEYS: dict[type, str] = {
    parametrizations._WeightNorm: "original1",
    parametrizations._SpectralNorm: "original",
    WeightNorm: "weight_v",
    SpectralNorm: "weight_orig",
}
