"""What torch's own op takes under autocast: its inputs and weights in 16 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gls_fused.host import native_module


def autocast_inputs(inputs: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """What torch's own op would do under autocast, seen by autograd.

    Autocast keeps its cast of a parameter until it ends, for all uses of it. That very cast is
    taken where the native module is there to ask for it; else there is one for each call.
    """
    device, tensors = inputs.device.type, (inputs, *others)
    compiles = torch.compiler.is_compiling()
    # Of a device without autocast, such as meta, the last raises. Torch 2.11 traces no `available`.
    available = compiles or torch.amp.is_autocast_available(device)
    if not (available and torch.is_autocast_enabled(device)):
        return tensors
    native = None if compiles else native_module()
    if native is not None:
        return tuple(x if x is None else native.cast_by_autocast(x) for x in tensors)
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x if x is None or x.dtype == torch.float64 or not x.is_floating_point() else x.to(dtype)
        for x in tensors
    )
