"""The tables of one update: its layers in groups that a launch serves, each as it is stepped.

flat     D given, elements in chunks through memory
tiled    D formed here, or mean squares of rows and columns: tiles of the weight
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from gls_fused.backends.triton.configs import (
    AXIS_BLOCK,
    CURVATURE_PRECISION,
    MAX_RANK,
    UPDATE_BLOCK,
    UPDATE_WARPS,
    Tile,
    pad_rank,
    product_precision,
    row_tile,
    update_tile,
    walks_twice,
)
from gls_fused.backends.triton.launch import ELEMENTS, launch, needs_reference, upload
from gls_fused.backends.triton.rows import precondition_gradient
from gls_fused.backends.triton.tile_kernels import (
    BY_COLUMNS,
    BY_ROWS,
    STRIDED,
    TILE_LINE,
    _blend_axes_kernel,
    _project_gradients_kernel,
    _tile_update_kernel,
    _walk_gradients_kernel,
)
from gls_fused.backends.triton.update_kernels import FLAT_LINE, _flat_update_kernel
from gls_fused.reference import Inverse, Normalize, SubspaceInverse

# Of parameter, gradient and average.
Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype]


@dataclass
class _Group:
    """What one launch serves: layers of the same dtypes (and, in tiles, padded rank)."""

    lines: list[int] = field(default_factory=list)
    # (entry, its number of blocks, its first slot)
    parts: list[tuple[int, int, int]] = field(default_factory=list)
    # Of each layer's T: (entry, its number of row blocks, 0).
    row_parts: list[tuple[int, int, int]] = field(default_factory=list)
    # Of each layer's v and c: (entry, its number of blocks, 0).
    axis_parts: list[tuple[int, int, int]] = field(default_factory=list)
    rows: int = 0
    aligned: bool = True
    even: bool = True
    by_rows: bool = True
    by_columns: bool = True

    @property
    def basis(self) -> int:
        """How the bases lie in memory, where that is the same for all."""
        return BY_ROWS if self.by_rows else BY_COLUMNS if self.by_columns else STRIDED


class Plan:
    """The launches of one update: its layers in groups, and what must outlive them."""

    def __init__(self, normalize: Normalize, shapes: Sequence[tuple[int, int, int]]) -> None:
        """Begin a plan.

        Args:
            shapes: outputs, inputs and rank of the layers whose D may be formed here.
        """
        self.normalize = normalize
        self.padded = max((pad_rank(rank) for _, _, rank in shapes), default=0)
        # Whether one kernel makes T and the sums of squares of those layers.
        self.walks = normalize not in ("none", "adam") and bool(shapes)
        if self.walks:
            rows = row_tile(self.padded).rows
            blocks = sum(triton.cdiv(outputs, rows) for outputs, _, _ in shapes)
            self.walks = walks_twice(blocks, max(inputs for _, inputs, _ in shapes))
        # Whether mean squares are of rows, which the flat kernel does not know.
        self.by_axes = normalize in ("row", "factored")
        self.slots = 0
        self.flat: dict[Dtypes, _Group] = {}
        # By padded rank too, which is 0 where D is given.
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
    ) -> int:
        """Enter a layer into the tables.

        Returns:
            How many programs there are of which the last counts the layer's step.
        """
        if self.by_axes and len(params) > 1 and params[1].shape != params[0].shape[:1]:
            raise ValueError(
                f"params: expected a bias {list(params[0].shape[:1])}, got {list(params[1].shape)}"
            )
        streams = [params, gradients, exp_avgs, exp_avg_sqs]
        if isinstance(inverse, SubspaceInverse) and _is_tiled(streams, inverse):
            return self._add_tiles(layer, streams, inverse)
        if inverse is None and self.padded and _is_contiguous(streams):
            # With the layers whose D is formed.
            return self._add_tiles(layer, streams, None)
        directions: Sequence[Tensor] = gradients
        if inverse is not None:
            weight, *bias = gradients
            found = precondition_gradient(weight.flatten(1), bias[0] if bias else None, inverse)
            shaped = zip(found, gradients, strict=False)
            # One table entry has one dtype for D and D0.
            directions = [
                part.view_as(like).to(like.dtype) for part, like in shaped if part is not None
            ]
        if self.by_axes:
            streams[1] = directions
            return self._add_tiles(layer, [self._lay_out(at, streams[at]) for at in range(4)], None)
        before = self.slots
        for index, param in enumerate(params):
            optional = [states[index] if states else None for states in (exp_avgs, exp_avg_sqs)]
            self._add_flat(layer, param, directions[index], gradients[index], *optional)
        return self.slots - before

    def _lay_out(self, stream: int, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Contiguous, and of one dtype; what is not so already is updated in a copy."""
        dtypes = [tensor.dtype for tensor in tensors]
        wide = functools.reduce(torch.promote_types, dtypes) if dtypes else None
        found = [tensor.to(wide).contiguous() for tensor in tensors]
        self.kept += found
        # Gradients are read alone.
        if stream != 1:
            pairs = zip(tensors, found, strict=True)
            self.copies += [(old, new) for old, new in pairs if old is not new]
        return found

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
        self, layer: int, streams: Sequence[Sequence[Tensor]], inverse: SubspaceInverse | None
    ) -> int:
        """A line, int64 [24]: of the weight W, D0 or D, m, v and of the bias (addresses; v of rows
        and c of columns where the mean squares are theirs), U, C, lambda', n, size, r, strides of U
        and C, layer, first row of T, whether there is a bias, tiles across, first slot of the sums
        of rows [tiles across, n] and of columns [tiles down, d], or where rows are walked [n] and
        [blocks of rows, d].
        """
        params, gradients, exp_avgs, exp_avg_sqs = streams
        weight, dim_bias = params[0], len(params) - 1
        n, size = weight.shape[0], weight.shape[1:].numel()
        state = next(
            (states[0].dtype for states in (exp_avgs, exp_avg_sqs) if states), torch.float32
        )
        dtypes = (weight.dtype, gradients[0].dtype, state)
        # A given D has rank 0 among those that are formed.
        padded = self.padded if inverse is not None or _is_contiguous(streams) else 0
        group = self.tiled.setdefault((dtypes, padded), _Group())
        tile = update_tile(padded)
        # One at least, for the bias of a weight without columns.
        across: int = max(1, triton.cdiv(size, tile.columns))
        down: int = triton.cdiv(n, tile.rows)
        entry = len(group.parts)
        group.parts.append((entry, down * across, self.slots))
        programs, walked = down * across, self.walks and padded > 0
        row_blocks = triton.cdiv(n, row_tile(padded).rows)
        if walked or inverse is not None:
            group.row_parts.append((entry, row_blocks, self.slots))
        if walked:
            # A row's sum is whole; one at least, so that a layer without rows counts its steps too.
            programs, down = row_blocks, row_blocks
        of_rows = self.slots
        of_columns = of_rows + (n if walked else across * n)
        self.slots += programs
        if self.by_axes:
            # One at least, so that a layer without elements counts its steps too.
            programs, self.slots = max(1, triton.cdiv(n, AXIS_BLOCK)), of_columns
            if self.normalize == "factored":
                programs += triton.cdiv(size + dim_bias, AXIS_BLOCK)
                self.slots += down * (size + dim_bias)
            group.axis_parts.append((entry, programs, 0))
        for index in (0, 1):
            for tensors in streams:
                group.lines.append(tensors[index].data_ptr() if len(tensors) > index else 0)
        wide = [tensors[0] for tensors in streams[: 3 if self.by_axes else 4] if tensors]
        group.even &= size % 16 == 0
        if inverse is None:
            group.lines += [0, 0, 0, n, size, 0, 0, 0, 0, 0]
        else:
            basis, core_inverse, shift = inverse
            rank = basis.shape[1]
            group.lines += [basis.data_ptr(), core_inverse.data_ptr(), shift.data_ptr()]
            group.lines += [n, size, rank, *basis.stride(), *core_inverse.stride()]
            wide.append(basis)
            group.even &= rank % 16 == 0
            group.by_rows &= basis.stride(1) == 1 and basis.stride(0) % 16 == 0
            group.by_columns &= basis.stride(0) == 1
        group.lines += [layer, group.rows, dim_bias, across, of_rows, of_columns]
        group.rows += n
        group.aligned &= all(tensor.data_ptr() % 16 == 0 for tensor in wide)
        return programs

    def empty_sums(self, device: torch.device) -> Tensor:
        """What the sums of squares go into."""
        if not self.by_axes:
            slots = 1 if self.normalize in ("none", "adam") else self.slots
            return torch.empty(slots, 2, dtype=torch.float64, device=device)
        found = [_compute_dtype(*key) for key in self.tiled]
        dtype = functools.reduce(torch.promote_types, found)
        return torch.empty(self.slots, dtype=dtype, device=device)

    def project(self, device: torch.device) -> None:
        """T = D0 U C of the layers whose D is formed here."""
        for key, group in self.tiled.items():
            (_, gradient, _), padded = key
            self.projections[key] = torch.empty(
                group.rows, padded, dtype=torch.float32, device=device
            )
            if not padded or self.walks:
                continue
            launch(
                _project_gradients_kernel,
                (_count(group.row_parts),),
                device,
                table=upload(group.lines, device),
                blocks=upload(group.row_parts, device, _block_table),
                GRADIENT=ELEMENTS[gradient],
                **self._tile_arguments(key, row_tile(padded)),
            )

    def walk(self, device: torch.device, **shared: Any) -> None:
        """T and the sums of squares of the layers whose D is formed here."""
        for key, group in self.tiled.items():
            (_, gradient, _), padded = key
            if padded:
                launch(
                    _walk_gradients_kernel,
                    (_count(group.row_parts),),
                    device,
                    table=upload(group.lines, device),
                    blocks=upload(group.row_parts, device, _block_table),
                    GRADIENT=ELEMENTS[gradient],
                    **self._tile_arguments(key, row_tile(padded)),
                    **shared,
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
                COMPUTE=ELEMENTS[_compute_dtype(dtypes)],
                ALIGNED=group.aligned,
                EVEN=group.even,
                BLOCK=UPDATE_BLOCK,
                LINE=FLAT_LINE,
                num_warps=UPDATE_WARPS,
                **shared,
            )

    def launch_tiles(self, device: torch.device, *, SUMS: bool, **shared: Any) -> None:
        """A pass over the layers in tiles; for sums over those that are not walked."""
        for key, group in self.tiled.items():
            (param, gradient, state), padded = key
            if SUMS and self.walks and padded:
                continue
            launch(
                _tile_update_kernel,
                (_count(group.parts),),
                device,
                table=upload(group.lines, device),
                blocks=upload(group.parts, device, _block_table),
                PARAM=ELEMENTS[param],
                GRADIENT=ELEMENTS[gradient],
                STATE=ELEMENTS[state],
                COMPUTE=ELEMENTS[_compute_dtype(*key)],
                SUMS=SUMS,
                FORMED=padded > 0,
                **self._tile_arguments(key, update_tile(padded)),
                **shared,
            )

    def launch_axes(self, device: torch.device, *, SQUARE: Any, **shared: Any) -> None:
        """The sums of rows and columns enter v and c, where the mean squares are theirs."""
        if not self.by_axes:
            return
        tiny = next(torch.finfo(dtype).tiny for dtype in ELEMENTS if ELEMENTS[dtype] == SQUARE)
        for (_, padded), group in self.tiled.items():
            launch(
                _blend_axes_kernel,
                (_count(group.axis_parts),),
                device,
                table=upload(group.lines, device),
                blocks=upload(group.axis_parts, device, _block_table),
                TINY=tiny,
                WALKED=self.walks and padded > 0,
                BLOCK_N=(row_tile if self.walks and padded else update_tile)(padded).rows,
                BLOCK=AXIS_BLOCK,
                LINE=TILE_LINE,
                SQUARE=SQUARE,
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
            "PRECISION": product_precision() if padded else CURVATURE_PRECISION,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }


def formed_shape(params: Sequence[Tensor], inverse: Inverse | None) -> tuple[int, int, int] | None:
    """Outputs, inputs and rank of a layer whose D the update may form; None where it does not."""
    if not isinstance(inverse, SubspaceInverse):
        return None
    rank = inverse.basis.shape[1]
    if needs_reference(inverse.basis.dtype, rank, MAX_RANK):
        return None
    return params[0].shape[0], params[0].shape[1:].numel(), rank


def _is_tiled(streams: Sequence[Sequence[Tensor]], inverse: SubspaceInverse) -> bool:
    """Whether the update can form D itself: contiguous, alike in dtype, in float32 arithmetic."""
    return formed_shape(streams[0], inverse) is not None and _is_contiguous(streams)


def _is_contiguous(streams: Sequence[Sequence[Tensor]]) -> bool:
    for tensors in streams:
        if not all(tensor.is_contiguous() and tensor.numel() for tensor in tensors):
            return False
        if any(tensor.dtype != tensors[0].dtype for tensor in tensors):
            return False
    states = {tensors[0].dtype for tensors in streams[2:] if tensors}
    dtypes = {*states, streams[0][0].dtype, streams[1][0].dtype}
    return torch.float64 not in dtypes and len(states) < 2


def _compute_dtype(dtypes: Dtypes, padded_rank: int = 0) -> torch.dtype:
    """Of the update's arithmetic; float32 where D is formed."""
    if padded_rank:
        return torch.float32
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


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
