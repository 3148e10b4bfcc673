"""The optimizers compared: how each is built, its learning rate or the grid to search.

Grids climb in half decades (1, 3, 10, ...); the search extends one whose best value is an edge.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.harness.errors import InputError
from benchmarks.workloads.training import Steps
from gls_fused import GLS

GlsOptions = Mapping[str, Any]


@dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer of the comparison.

    Attributes:
        rate: the learning rate where nothing is searched.
        grid: the learning rates searched by default, ascending; empty: `rate` is used as it is.
        build: (model, learning rate, options for GLS) -> optimizer.
    """

    name: str
    title: str
    rate: float
    grid: tuple[float, ...]
    build: Callable[[nn.Module, float, GlsOptions], Steps]


class Together:
    """Several optimizers over disjoint parameters that step as one."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers

    def zero_grad(self) -> None:
        """Clear every gradient."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        """Let every optimizer step."""
        for optimizer in self.optimizers:
            optimizer.step()


def _sgd(model: nn.Module, lr: float, options: GlsOptions) -> Steps:
    return torch.optim.SGD(model.parameters(), lr=lr, fused=True)


def _sgd_momentum(model: nn.Module, lr: float, options: GlsOptions) -> Steps:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, fused=True)


def _adam(model: nn.Module, lr: float, options: GlsOptions) -> Steps:
    return torch.optim.Adam(model.parameters(), lr=lr, fused=True)


def _adamw(model: nn.Module, lr: float, options: GlsOptions) -> Steps:
    return torch.optim.AdamW(model.parameters(), lr=lr, fused=True)


def _muon(model: nn.Module, lr: float, options: GlsOptions) -> Steps:
    """Muon on the matrices, scaled to Adam's update size; Adam on what Muon does not take."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return Together([muon, torch.optim.Adam(others, lr=lr, fused=True)])


def _gls(model: nn.Module, lr: float, options: GlsOptions) -> Steps:
    return GLS(model, lr=lr, **options)


def _gls_sgd(model: nn.Module, lr: float, options: GlsOptions) -> Steps:
    return GLS(model, lr=lr, **{**options, "normalize": "sgd"})


OPTIMIZERS = {
    spec.name: spec
    for spec in (
        OptimizerSpec("sgd", "SGD", 0.1, (0.03, 0.1, 0.3, 1.0), _sgd),
        OptimizerSpec("adam", "Adam", 1e-3, (3e-4, 1e-3, 3e-3), _adam),
        OptimizerSpec("gls", "GLS", 1e-3, (), _gls),
        OptimizerSpec("gls-sgd", "GLS, SGD's step size", 0.1, (), _gls_sgd),
        OptimizerSpec("muon", "Muon", 1e-3, (1e-3, 3e-3, 1e-2), _muon),
        OptimizerSpec("sgd-momentum", "SGD, momentum .9", 0.03, (0.01, 0.03, 0.1), _sgd_momentum),
        OptimizerSpec("adamw", "AdamW", 1e-3, (3e-4, 1e-3, 3e-3), _adamw),
    )
}


def check_gls_options(options: GlsOptions, names: Sequence[str]) -> None:
    """Build GLS once on a small model, so that a bad option fails before any training.

    Raises:
        InputError: an option GLS does not have or a value it does not take.
    """
    used = [name for name in names if name in ("gls", "gls-sgd")]
    if options and not used:
        raise InputError("--gls is given, but neither gls nor gls-sgd is among --optimizers")
    if not used:
        return
    known = [name for name in inspect.signature(GLS).parameters if name not in ("model", "lr")]
    for name in options:
        if name not in known:
            hint = "use --lr gls=VALUE" if name == "lr" else f"choose from {', '.join(known)}"
            raise InputError(f"--gls: unknown option {name!r}, {hint}")
    for name in used:
        spec = OPTIMIZERS[name]
        try:
            spec.build(nn.Linear(3, 2), spec.rate, options)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"--gls: {' '.join(str(error).split())}") from error
