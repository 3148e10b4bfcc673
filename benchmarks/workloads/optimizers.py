"""The optimizers compared: how each is built, its learning rate or the grid to search.

Grids climb in half decades (1, 3, 10, ...); the search extends one whose best value is an edge.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.harness.errors import InputError
from benchmarks.workloads.peers import PEERS, PEERS_EXTRA, make_kron, make_shampoo, make_soap
from benchmarks.workloads.tasks import TASKS
from benchmarks.workloads.training import Steps
from gls_fused import GLS
from gls_fused.backends.factors import cpu_has_tiles

GlsOptions = Mapping[str, Any]
Decay = float | None


@dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer of the comparison.

    Attributes:
        rate: the learning rate where nothing is searched.
        grid: the learning rates searched by default, ascending; empty: `rate` is used as it is.
        make: (model, learning rate, weight decay, options for GLS) -> optimizer; without a weight
            decay it takes its own.
        needs: the module that it comes from, where that is an extra.
    """

    name: str
    title: str
    rate: float
    grid: tuple[float, ...]
    make: Callable[[nn.Module, float, Decay, GlsOptions], Steps]
    needs: str | None = None

    def build(
        self, model: nn.Module, lr: float, options: GlsOptions, weight_decay: Decay = None
    ) -> Steps:
        """The optimizer of a model."""
        return self.make(model, lr, weight_decay, options)

    def missing(self) -> str | None:
        """Why it cannot be built here, and what helps; None where it can."""
        if self.needs is not None and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed: pip install {PEERS_EXTRA}"
        if self.name == "muon" and not hasattr(torch.optim, "Muon"):
            return f"torch {torch.__version__} has no Muon: pip install --upgrade torch"
        return None


class Together:
    """Several optimizers over disjoint parameters that step as one."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of all of them."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def zero_grad(self) -> None:
        """Clear every gradient."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        """Let every optimizer step."""
        for optimizer in self.optimizers:
            optimizer.step()


if hasattr(torch.optim, "Muon"):
    from torch.optim import _muon as torch_muon

    class Float32Muon(torch.optim.Muon):
        """`torch.optim.Muon` whose Newton-Schulz iteration is in float32 instead of bfloat16.

        For CPUs without matrix units for bfloat16 (AMX), where torch's own takes longer, and where
        it is emulated many times as long.
        """

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            """As Muon's."""
            with mock.patch.object(torch_muon, "_zeropower_via_newtonschulz", _orthogonalize):
                return cast("float | None", super().step(closure))


def _orthogonalize(
    grad: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """torch's iteration, in the gradient's own dtype."""
    a, b, c = coefficients
    factor = grad.T if grad.size(0) > grad.size(1) else grad
    factor = factor / factor.norm().clamp(min=eps)
    for _ in range(steps):
        gram = factor @ factor.T
        factor = torch.addmm(factor, torch.addmm(gram, gram, gram, beta=b, alpha=c), factor, beta=a)
    return factor.T if grad.size(0) > grad.size(1) else factor


def _has_bfloat16(model: nn.Module) -> bool:
    """Whether the model's device takes less time for bfloat16 than for float32."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    return not on_cpu or cpu_has_tiles()


def _sgd(model: nn.Module, lr: float, decay: Decay, options: GlsOptions) -> Steps:
    return torch.optim.SGD(model.parameters(), lr=lr, weight_decay=decay or 0.0, fused=True)


def _sgd_momentum(model: nn.Module, lr: float, decay: Decay, options: GlsOptions) -> Steps:
    return torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, weight_decay=decay or 0.0, fused=True
    )


def _adam(model: nn.Module, lr: float, decay: Decay, options: GlsOptions) -> Steps:
    """Without a weight decay Adam; with one AdamW, which is Adam with a decay that is its own."""
    return (
        _adamw(model, lr, decay, options)
        if decay
        else torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    )


def _adamw(model: nn.Module, lr: float, decay: Decay, options: GlsOptions) -> Steps:
    decay = ADAMW_DECAY if decay is None else decay
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay, fused=True)


def _muon(model: nn.Module, lr: float, decay: Decay, options: GlsOptions) -> Steps:
    """Muon on hidden linear layers' weights, scaled to AdamW's update size; AdamW on the rest.

    The rest, as torch's documentation and the author ask: biases, norms, embeddings, the last
    layer; and convolutions, as torch's Muon takes matrices only.
    """
    muon_class = torch.optim.Muon if _has_bfloat16(model) else Float32Muon
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    hidden = [module.weight for module in linear[:-1]]
    matrices = {id(weight) for weight in hidden}
    others = [parameter for parameter in model.parameters() if id(parameter) not in matrices]
    decay = decay or 0.0
    adamw = torch.optim.AdamW(others, lr=lr, weight_decay=decay, fused=True)
    if not hidden:
        return adamw
    muon = muon_class(hidden, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return Together([muon, adamw])


def _gls(model: nn.Module, lr: float, decay: Decay, options: GlsOptions) -> Steps:
    searched = {} if decay is None else {"weight_decay": decay}
    return GLS(model, lr=lr, **{**options, **searched})


def _gls_sgd(model: nn.Module, lr: float, decay: Decay, options: GlsOptions) -> Steps:
    # As the page has it: a plain least-squares step of SGD's size.
    plain = {"power": 1, "max_change": None}
    return _gls(model, lr, decay, {**plain, **options, "normalize": "sgd"})


# torch's own.
ADAMW_DECAY = 0.01
ADAM_GRID = (3e-4, 1e-3, 3e-3)
OPTIMIZERS = {
    spec.name: spec
    for spec in (
        OptimizerSpec("sgd", "SGD", 0.1, (0.03, 0.1, 0.3, 1.0), _sgd),
        OptimizerSpec("adam", "Adam", 1e-3, ADAM_GRID, _adam),
        OptimizerSpec("gls", "GLS", 1e-3, (), _gls),
        OptimizerSpec("gls-sgd", "GLS, SGD's step size", 0.1, (), _gls_sgd),
        OptimizerSpec("gls-tuned", "GLS, tuned", 1e-3, ADAM_GRID, _gls),
        OptimizerSpec("muon", "Muon", 1e-3, (1e-3, 3e-3, 1e-2), _muon),
        OptimizerSpec("sgd-momentum", "SGD, momentum .9", 0.03, (0.01, 0.03, 0.1), _sgd_momentum),
        OptimizerSpec("adamw", "AdamW", 1e-3, ADAM_GRID, _adamw),
        OptimizerSpec("soap", "SOAP", 3e-3, (1e-3, 3e-3, 1e-2), make_soap, PEERS),
        OptimizerSpec("shampoo", "Shampoo", 1e-3, ADAM_GRID, make_shampoo, PEERS),
        OptimizerSpec("psgd-kron", "PSGD-Kron", 1e-3, (3e-4, 1e-3, 3e-3), make_kron, PEERS),
    )
}
# Those that take the options of --gls.
GLS_NAMES = ("gls", "gls-sgd", "gls-tuned")
# What GLS takes besides: lr has an option of its own, and one process trains.
NOT_OPTIONS = ("params", "model", "lr", "process_group")
# Of data, for models on which options are tried.
SMALL_IMAGES, SMALL_TEXT = (1, 28, 28), (16, 8)


def check_gls_options(options: GlsOptions, names: Sequence[str], tasks: Sequence[str]) -> None:
    """Build GLS once on each task's model, so that a bad option fails before any training.

    Raises:
        InputError: an option GLS does not have or a value it does not take.
    """
    used = [name for name in names if name in GLS_NAMES]
    if options and not used:
        raise InputError(
            f"--gls is given, but neither {' nor '.join(GLS_NAMES)} is among --optimizers"
        )
    if not used:
        return
    known = [name for name in inspect.signature(GLS).parameters if name not in NOT_OPTIONS]
    for name in options:
        if name not in known:
            hint = "use --lr gls=VALUE" if name == "lr" else f"choose from {', '.join(known)}"
            raise InputError(f"--gls: unknown option {name!r}, {hint}")
    for name, task in itertools.product(used, tasks):
        spec, small = OPTIMIZERS[name], SMALL_TEXT if TASKS[task].text else SMALL_IMAGES
        try:
            spec.build(TASKS[task].build(small), spec.rate, options)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"--gls: {' '.join(str(error).split())}") from error
