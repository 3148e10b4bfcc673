"""The update of all layers at once, in a fixed number of launches.

Bytes per float32 parameter, and launches:

    what                           launches     without / with momentum 0.9
    D given, "none"                1            12 / 20
    D given, "adam"                1            20 / 28     torch's fused Adam: 28, in 2 launches
    D given, "rms" or "sgd"        1 + 1        16 / 24     the norm pass reads D: 4
    D given, "row", "factored"     1 + 1 + 1    16 / 24     and .1, .4 for the sums
    D = D0 P formed, "none"        1 + 1        16 / 24     T = D0 U C reads D0: 4
    D = D0 P formed, "rms", "sgd"  1 + 1 + 1    20 / 28     both
    D formed, "row", "factored"    1 + 1 + 1 + 1    20 / 28     and .1, .4 for the sums
      where rows are walked twice one launch and 4 bytes less; .5 for the sums of "factored"

The launches are T, the norm pass, the blending of rows and columns, and the update. Layers of all
ranks, and where some D is formed those whose D is given too, share them; layers of several dtypes
have launches of their own. The norm must be known before the first weight is written, so D's tile
is formed twice: 4 bytes and 2 r flops per parameter, against 8 bytes if D were stored and read
again. Where `walks_twice` says so, T and the norms are one kernel, a program of which has a block
of whole rows and finds them in L2 the second time. ||D||^2 also follows from D0 U and T alone,
without a second pass, but as a difference of nearly equal numbers where P damps most of D0.
Sums of squares go into a slot per program; the layer's last program adds them in order, so the same
step gives the same bits.

Those of rows go into a slot per row and tile, one for 64 elements, those of columns into one per
column and tile, for 32 elements, or 16 above rank 32; each is written and read once. A launch adds
them in order, as all of a layer's in one program would take longer than that. What v is multiplied
with stands in the layer's line, so the update reads v and c and no sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from gls_fused.backends.triton.launch import ELEMENTS, bits, upload
from gls_fused.backends.triton.update_kernels import LAYER_LINE
from gls_fused.backends.triton.update_plan import Plan, formed_shape
from gls_fused.reference import Inverse, Normalize, check_normalize, layer_slices

# How many of `exp_avg_sqs` a layer has, where it is not one per parameter.
SQUARES_EACH = {"rms": 1, "row": 1, "factored": 2}


def update_layers_(
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    inverses: Sequence[Inverse | None],
    *,
    layer_sizes: Sequence[int],
    normalize: Normalize,
    lr: float | Tensor,
    momentum: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    skip: Tensor | None = None,
    rates: Tensor | None = None,
) -> None:
    """See `gls_fused.reference.update_layers_`; without a host synchronisation.

    Args:
        lr: read on the device where it is a tensor there.
        exp_avg_sqs: all of one dtype, but for "adam".
        steps: all of one dtype.
        skip: read on the device, by each program that would write.
        rates: read on the device.
    Numerics: float32, or float64 where parameters or averages are; the direction is not rounded to
        the gradients' dtype on its way into the update. A dense P, float64 statistics, ranks above
        64 and weights that are not contiguous form D through `precondition_gradient` first;
        tensors that are not dense in memory, or not alike, are updated in a copy.
    """
    check_normalize(normalize)
    if not params:
        return
    if bool(exp_avgs) != bool(momentum):
        raise ValueError(f"exp_avgs: expected exactly with momentum, got momentum {momentum}")
    device = params[0].device
    rates = None if rates is None else rates.contiguous()
    layers = list(zip(layer_slices(layer_sizes), inverses, strict=True))
    found = [formed_shape(params[mine][:1], inverse) for mine, inverse in layers]
    plan = Plan(normalize, [shape for shape in found if shape is not None])
    each = SQUARES_EACH.get(normalize)
    layer_lines: list[int] = []
    for layer, (mine, inverse) in enumerate(layers):
        squares = exp_avg_sqs[mine if each is None else slice(layer * each, (layer + 1) * each)]
        slot = plan.slots
        programs = plan.add_layer(
            layer,
            params[mine],
            gradients[mine],
            exp_avgs[mine],
            () if normalize == "rms" else squares,
            inverse,
        )
        square = squares[0].data_ptr() if normalize == "rms" else 0
        rate = 0 if rates is None else rates[layer].data_ptr()
        elements = sum(param.numel() for param in params[mine])
        layer_lines += [steps[layer].data_ptr(), square, slot, programs, elements, 0, 0, rate, 0]

    sums = plan.empty_sums(device)
    on_device = isinstance(lr, Tensor) and lr.device == device
    options = (
        0.0 if on_device else float(lr),
        weight_decay,
        momentum,
        math.log(momentum) if momentum else 0.0,
        beta2,
        math.log(beta2) if beta2 else -math.inf,
        eps,
    )
    shared = {
        "layers": upload(layer_lines, device),
        "options": upload([bits(value) for value in options], device),
        "lr": lr if on_device else sums,
        "squares": sums,
        "skip": sums if skip is None else skip,
        "SKIPS": skip is not None,
        "STEP": ELEMENTS[steps[0].dtype],
        "SQUARE": ELEMENTS[torch.float32 if each is None else exp_avg_sqs[0].dtype],
        "NORMALIZE": normalize,
        "MOMENTUM": bool(exp_avgs),
        "LR_TENSOR": on_device,
        "RATES": None if rates is None else ELEMENTS[rates.dtype],
        "LAYER_LINE": LAYER_LINE,
    }
    plan.project(device)
    if plan.walks:
        plan.walk(device, **shared)
    if normalize not in ("none", "adam"):
        plan.launch_flat(device, SUMS=True, **shared)
        plan.launch_tiles(device, SUMS=True, **shared)
        plan.launch_axes(device, **shared)
    plan.launch_flat(device, SUMS=False, **shared)
    plan.launch_tiles(device, SUMS=False, **shared)
    for target, copy in plan.copies:
        target.copy_(copy)
    increment_version([*params, *exp_avgs, *exp_avg_sqs, *steps])
