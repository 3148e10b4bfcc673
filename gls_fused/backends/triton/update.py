"""The update of all layers at once, in a fixed number of launches.

Bytes per float32 parameter, and launches:

    what                           launches     without / with momentum 0.9
    D given, "none"                1            12 / 20
    D given, "adam"                1            20 / 28     torch's fused Adam: 28, in 2 launches
    D given, "rms" or "sgd"        1 + 1        16 / 24     the norm pass reads D: 4
    D = D0 P formed, "none"        1 + 1        16 / 24     T = D0 U C reads D0: 4
    D = D0 P formed, "rms", "sgd"  1 + 1 + 1    20 / 28     both

The launches are T, the norm pass and the update; layers with and without P, of several dtypes or of
several padded ranks have launches of their own. The norm must be known before the first weight is
written, so D's tile is formed twice: 4 bytes and 2 r flops per parameter, against 8 bytes if D were
stored and read again. ||D||^2 also follows from D0 U and T alone, without a second pass, but as a
difference of nearly equal numbers where P damps most of D0. Sums of squares go into a slot per
program; the layer's last program adds them in order, so the same step gives the same bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.graph import increment_version

from gls_fused.backends.triton.configs import (
    MAX_RANK,
    UPDATE_BLOCK,
    UPDATE_WARPS,
    Tile,
    pad_rank,
    product_precision,
    row_tile,
    update_tile,
)
from gls_fused.backends.triton.launch import ELEMENTS, bits, launch, needs_reference, upload
from gls_fused.backends.triton.rows import precondition_gradient
from gls_fused.backends.triton.update_kernels import (
    BY_COLUMNS,
    BY_ROWS,
    FLAT_LINE,
    LAYER_LINE,
    STRIDED,
    TILE_LINE,
    _flat_update_kernel,
    _project_gradients_kernel,
    _tile_update_kernel,
)
from gls_fused.reference import Inverse, Normalize, SubspaceInverse

Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype]


@dataclass
class _Group:
    """What one launch serves: layers of the same dtypes (and, where D is formed, padded rank)."""

    lines: list[int] = field(default_factory=list)
    # (entry, its number of blocks, its first slot)
    parts: list[tuple[int, int, int]] = field(default_factory=list)
    # Of each layer's T: (entry, its number of row blocks, 0).
    row_parts: list[tuple[int, int, int]] = field(default_factory=list)
    rows: int = 0
    aligned: bool = True
    even: bool = True
    by_rows: bool = True
    by_columns: bool = True

    @property
    def basis(self) -> int:
        """How the bases lie in memory, where that is the same for all."""
        return BY_ROWS if self.by_rows else BY_COLUMNS if self.by_columns else STRIDED


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
) -> None:
    """See `gls_fused.reference.update_layers_`; without a host synchronisation.

    Args:
        lr: read on the device where it is a tensor there.
        steps: all of one dtype.
        skip: read on the device, by each program that would write.
    Numerics: float32, or float64 where parameters or averages are; the direction is not rounded to
        the gradients' dtype on its way into the update. A dense P, float64 statistics, ranks above
        64 and weights that are not contiguous form D through `precondition_gradient` first;
        tensors that are not dense in memory, or not alike, are updated in a copy.
    """
    if not params:
        return
    if bool(exp_avgs) != bool(momentum):
        raise ValueError(f"exp_avgs: expected exactly with momentum, got momentum {momentum}")
    device = params[0].device
    plan = _Plan()
    layer_lines: list[int] = []
    first = 0
    for layer, (size, inverse) in enumerate(zip(layer_sizes, inverses, strict=True)):
        mine = slice(first, first + size)
        first += size
        slot = plan.slots
        plan.add_layer(
            layer,
            params[mine],
            gradients[mine],
            exp_avgs[mine],
            exp_avg_sqs[mine] if normalize == "adam" else (),
            inverse,
        )
        square = exp_avg_sqs[layer].data_ptr() if normalize == "rms" else 0
        elements = sum(param.numel() for param in params[mine])
        layer_lines += [steps[layer].data_ptr(), square, slot, plan.slots - slot, elements, 0, 0]

    with_sums = normalize in ("rms", "sgd")
    slots = plan.slots if with_sums else 1
    squares = torch.empty(slots, 2, dtype=torch.float64, device=device)
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
        "lr": lr if on_device else squares,
        "squares": squares,
        "skip": squares if skip is None else skip,
        "SKIPS": skip is not None,
        "STEP": ELEMENTS[steps[0].dtype],
        "SQUARE": ELEMENTS[exp_avg_sqs[0].dtype if normalize == "rms" else torch.float32],
        "NORMALIZE": normalize,
        "MOMENTUM": bool(exp_avgs),
        "LR_TENSOR": on_device,
        "LAYER_LINE": LAYER_LINE,
    }
    plan.project(device)
    for sums in (True, False) if with_sums else (False,):
        plan.launch_flat(device, SUMS=sums, **shared)
        plan.launch_tiles(device, SUMS=sums, **shared)
    for target, copy in plan.copies:
        target.copy_(copy)
    increment_version([*params, *exp_avgs, *exp_avg_sqs, *steps])


class _Plan:
    """The launches of one update: its layers in groups, and what must outlive them."""

    def __init__(self) -> None:
        self.slots = 0
        self.flat: dict[Dtypes, _Group] = {}
        self.tiled: dict[tuple[Dtypes, int], _Group] = {}
        self.projections: dict[tuple[Dtypes, int], Tensor] = {}
        # (where a result belongs, the copy it was made in)
        self.copies: list[tuple[Tensor, Tensor]] = []
        # Tables know addresses only, so their tensors are kept until all is launched.
        self.kept: list[Tensor] = []

    def add_layer(
        self,
        layer: int,
        params: Sequence[Tensor],
        gradients: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        inverse: Inverse | None,
    ) -> None:
        """Enter a layer into the tables."""
        streams = [params, gradients, exp_avgs, exp_avg_sqs]
        if isinstance(inverse, SubspaceInverse) and _is_tiled(streams, inverse):
            self._add_tiles(layer, streams, inverse)
            return
        directions: Sequence[Tensor] = gradients
        if inverse is not None:
            weight, *bias = gradients
            found = precondition_gradient(weight.flatten(1), bias[0] if bias else None, inverse)
            shaped = zip(found, gradients, strict=False)
            # One table entry has one dtype for D and D0.
            directions = [
                part.view_as(like).to(like.dtype) for part, like in shaped if part is not None
            ]
        for index, param in enumerate(params):
            optional = [states[index] if states else None for states in (exp_avgs, exp_avg_sqs)]
            self._add_flat(layer, param, directions[index], gradients[index], *optional)

    def _add_flat(
        self,
        layer: int,
        param: Tensor,
        direction: Tensor,
        gradient: Tensor,
        exp_avg: Tensor | None,
        exp_avg_sq: Tensor | None,
    ) -> None:
        count = param.numel()
        entry = [param, direction, gradient, exp_avg, exp_avg_sq]
        if not _are_alike([tensor for tensor in entry if tensor is not None]):
            copies = [None if tensor is None else tensor.contiguous() for tensor in entry]
            written = [(entry[at], copies[at]) for at in (0, 3, 4)]
            self.copies += [
                (old, new)
                for old, new in written
                if old is not None and new is not None and old is not new
            ]
            entry = copies
        found = [tensor for tensor in entry if tensor is not None]
        self.kept += found
        state = torch.float32 if exp_avg is None else exp_avg.dtype
        if exp_avg_sq is not None:
            state = exp_avg_sq.dtype
        group = self.flat.setdefault((param.dtype, gradient.dtype, state), _Group())
        # One at least, so that a layer without elements counts its steps too.
        blocks = max(1, triton.cdiv(count, UPDATE_BLOCK))
        group.parts.append((len(group.parts), blocks, self.slots))
        self.slots += blocks
        group.lines += [0 if tensor is None else tensor.data_ptr() for tensor in entry]
        group.lines += [count, layer]
        group.aligned &= all(tensor.data_ptr() % 16 == 0 for tensor in found)
        group.even &= count % 16 == 0

    def _add_tiles(
        self, layer: int, streams: Sequence[Sequence[Tensor]], inverse: SubspaceInverse
    ) -> None:
        params, gradients, exp_avgs, exp_avg_sqs = streams
        basis, core_inverse, shift = inverse
        rank, weight = basis.shape[1], params[0]
        n, size = weight.shape[0], weight[0].numel()
        state = next(
            (states[0].dtype for states in (exp_avgs, exp_avg_sqs) if states), torch.float32
        )
        dtypes = (weight.dtype, gradients[0].dtype, state)
        padded = pad_rank(rank)
        group = self.tiled.setdefault((dtypes, padded), _Group())
        tile = update_tile(padded)
        across = triton.cdiv(size, tile.columns)
        blocks = triton.cdiv(n, tile.rows) * across
        entry = len(group.parts)
        group.parts.append((entry, blocks, self.slots))
        group.row_parts.append((entry, triton.cdiv(n, row_tile(padded).rows), 0))
        self.slots += blocks
        for index in (0, 1):
            for tensors in streams:
                group.lines.append(tensors[index].data_ptr() if len(tensors) > index else 0)
        group.lines += [basis.data_ptr(), core_inverse.data_ptr(), shift.data_ptr()]
        group.lines += [n, size, rank, *basis.stride(), *core_inverse.stride()]
        group.lines += [layer, group.rows, int(len(params) == 2), across]
        group.rows += n
        wide = [tensors[0] for tensors in streams if tensors]
        group.aligned &= all(tensor.data_ptr() % 16 == 0 for tensor in (*wide, basis))
        group.even &= size % 16 == 0 and rank % 16 == 0
        group.by_rows &= basis.stride(1) == 1 and basis.stride(0) % 16 == 0
        group.by_columns &= basis.stride(0) == 1

    def project(self, device: torch.device) -> None:
        """T = D0 U C of the layers whose D is formed here."""
        for key, group in self.tiled.items():
            (_, gradient, _), padded = key
            self.projections[key] = torch.empty(
                group.rows, padded, dtype=torch.float32, device=device
            )
            launch(
                _project_gradients_kernel,
                (_count(group.row_parts),),
                device,
                table=upload(group.lines, device),
                blocks=upload(group.row_parts, device, _block_table),
                GRADIENT=ELEMENTS[gradient],
                **self._tile_arguments(key, row_tile(padded)),
            )

    def launch_flat(self, device: torch.device, **shared: Any) -> None:
        """A pass over the layers whose D is given."""
        for dtypes, group in self.flat.items():
            param, gradient, state = dtypes
            launch(
                _flat_update_kernel,
                (_count(group.parts),),
                device,
                table=upload(group.lines, device),
                blocks=upload(group.parts, device, _block_table),
                PARAM=ELEMENTS[param],
                GRADIENT=ELEMENTS[gradient],
                STATE=ELEMENTS[state],
                COMPUTE=ELEMENTS[functools.reduce(torch.promote_types, dtypes, torch.float32)],
                ALIGNED=group.aligned,
                EVEN=group.even,
                BLOCK=UPDATE_BLOCK,
                LINE=FLAT_LINE,
                num_warps=UPDATE_WARPS,
                **shared,
            )

    def launch_tiles(self, device: torch.device, **shared: Any) -> None:
        """A pass over the layers whose D is formed here."""
        for key, group in self.tiled.items():
            (param, gradient, state), padded = key
            launch(
                _tile_update_kernel,
                (_count(group.parts),),
                device,
                table=upload(group.lines, device),
                blocks=upload(group.parts, device, _block_table),
                PARAM=ELEMENTS[param],
                GRADIENT=ELEMENTS[gradient],
                STATE=ELEMENTS[state],
                **self._tile_arguments(key, update_tile(padded)),
                **shared,
            )

    def _tile_arguments(self, key: tuple[Dtypes, int], tile: Tile) -> dict[str, Any]:
        group, (_, padded) = self.tiled[key], key
        return {
            "projections": self.projections[key],
            "ALIGNED": group.aligned,
            "EVEN": group.even,
            "BASIS": group.basis,
            "RANK": padded,
            "BLOCK_N": tile.rows,
            "BLOCK_D": tile.columns,
            "LINE": TILE_LINE,
            "PRECISION": product_precision(),
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }


def _is_tiled(streams: Sequence[Sequence[Tensor]], inverse: SubspaceInverse) -> bool:
    """Whether the update can form D itself: contiguous, alike in dtype, in float32 arithmetic."""
    if needs_reference(inverse.basis.dtype, inverse.basis.shape[1], MAX_RANK):
        return False
    for tensors in streams:
        if not all(tensor.is_contiguous() and tensor.numel() for tensor in tensors):
            return False
        if any(tensor.dtype != tensors[0].dtype for tensor in tensors):
            return False
    states = {tensors[0].dtype for tensors in streams[2:] if tensors}
    return torch.float64 not in states | {streams[0][0].dtype} and len(states) < 2


def _are_alike(tensors: Sequence[Tensor]) -> bool:
    """Whether element i of one is element i of the others, counted through memory."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return True
    return tensors[0].ndim == 4 and all(
        tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors
    )


def _count(parts: Sequence[tuple[int, int, int]]) -> int:
    return sum(blocks for _, blocks, _ in parts)


def _block_table(parts: Sequence[tuple[int, int, int]]) -> list[int]:
    """int64 [blocks, 3]: entry, part of it, slot."""
    lines: list[int] = []
    for entry, count, slot in parts:
        for part in range(count):
            lines += [entry, part, slot + part]
    return lines
