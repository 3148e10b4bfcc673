"""Optimizers of other packages, each as its authors use it; `pip install 'gls_fused[peers]'`.

pytorch_optimizer's are plain PyTorch, so they need neither a compiler nor minutes of compilation.
Its `Shampoo` is not taken: its momentum is not the paper's. Shapes follow from each's arithmetic:
a convolution's weight has four factors, a vector's statistics are diagonal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from benchmarks.workloads.training import Steps

PEERS = "pytorch_optimizer"
PEERS_EXTRA = "'gls_fused[peers]'"
# As often as the Shampoo that won AlgoPerf's first competition (Kasimbeg et al., 2025). The
# package's own 1,000 steps are for runs of a hundred thousand.
ROOTS_EVERY = 20
# RMSProp's averages start at 0 without a correction: at .999 its first steps would be six times as
# long as later ones.
SHAMPOO_BETAS = (0.9, 0.99)
# The authors' own.
SOAP_DECAY = 0.01


def make_soap(
    model: nn.Module, lr: float, decay: float | None, options: Mapping[str, Any]
) -> Steps:
    """SOAP (Vyas et al., 2024): the authors' own betas .95 and .95, bases moved every 10 steps.

    Its first step only starts the bases.
    """
    from pytorch_optimizer import SOAP

    decay = SOAP_DECAY if decay is None else decay
    return SOAP(model.parameters(), lr=lr, weight_decay=decay)


def make_shampoo(
    model: nn.Module, lr: float, decay: float | None, options: Mapping[str, Any]
) -> Steps:
    """Shampoo (Gupta et al., 2018), in blocks and with RMSProp's step length (Anil et al., 2020).

    The step length makes its learning rates Adam's. For the first 25 steps it is RMSProp.
    """
    from pytorch_optimizer import ScalableShampoo
    from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting

    return ScalableShampoo(
        model.parameters(),
        lr=lr,
        moving_average_for_momentum=True,
        betas=SHAMPOO_BETAS,
        weight_decay=decay or 0.0,
        decoupled_weight_decay=True,
        preconditioning_compute_steps=ROOTS_EVERY,
        graft_type=LayerWiseGrafting.RMSPROP,
    )


def make_kron(
    model: nn.Module, lr: float, decay: float | None, options: Mapping[str, Any]
) -> Steps:
    """PSGD with Kronecker factors (Li, 2018; Pooladzandi and Li, 2024), by its own defaults."""
    from pytorch_optimizer import Kron

    return Kron(model.parameters(), lr=lr, weight_decay=decay or 0.0)
