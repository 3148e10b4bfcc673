"""What torch.amp.GradScaler leaves on an optimizer for its step: a scale and a flag."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


def take_flag(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """Whether a gradient of this step is not finite, 0-d bool; None without a GradScaler."""
    found = getattr(optimizer, "found_inf", None)
    # The scaler's sum over no gradients is the number 0.
    return found.reshape(()) != 0 if isinstance(found, Tensor) else None


def is_known_to_skip(skip: Tensor | None) -> bool:
    """Whether the flag is true, of one on the CPU; a device is not asked, which would wait."""
    return skip is not None and skip.is_cpu and bool(skip)


def where_flag(skip: Tensor, skipped: Tensor, otherwise: Tensor) -> Tensor:
    """`skipped` where the flag, which is on one of a model's devices, is true."""
    return torch.where(skip.to(otherwise.device, non_blocking=True), skipped, otherwise)


def unscale_(optimizer: torch.optim.Optimizer, params: Iterable[Tensor]) -> None:
    """Divide the gradients by the scale, unless the scaler's own `unscale_` has done so."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    gradients: dict[torch.device, list[Tensor]] = defaultdict(list)
    for param in params:
        if param.grad is not None:
            gradients[param.grad.device].append(param.grad)
    # The scaler's own way is through float64, which not every device has; to the same bits, as a
    # reciprocal of float32 that is rounded twice is the one that is rounded once.
    inverse = scale.reciprocal()
    for device, group in gradients.items():
        torch._foreach_mul_(group, inverse.to(device, non_blocking=True))
