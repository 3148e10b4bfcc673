"""Parameters that no layer owns take Adam's update, through torch's own fused functional."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def adam_(
    params: Sequence[Tensor], states: Sequence[dict[str, Any]], options: Mapping[str, Any]
) -> None:
    """One Adam step with decoupled weight decay, in place, for parameters that have a gradient.

    Args:
        params: any shapes, floating point, dense gradients.
        states: of the same length; filled at the first step with step, exp_avg and exp_avg_sq.
        options: lr, momentum (Adam's beta1), beta2, eps, weight_decay.
    Raises:
        RuntimeError: a gradient is sparse.
    """
    if not params:
        return
    for param, state in zip(params, states, strict=True):
        assert param.grad is not None
        if param.grad.is_sparse:
            raise RuntimeError("GLS does not take sparse gradients; use torch.optim.SparseAdam")
        # A bias whose weight was frozen since has averages, but no step of its own.
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
    adamw(
        list(params),
        [param.grad for param in params if param.grad is not None],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=True,
        amsgrad=False,
        beta1=options["momentum"],
        beta2=options["beta2"],
        lr=options["lr"],
        weight_decay=options["weight_decay"],
        eps=options["eps"],
        maximize=False,
    )
