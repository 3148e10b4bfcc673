"""The matrices that layers are to a backend: most are one, a stack is as many as it has blocks.

Of a stack that is spread over ranks, each has its own matrices, whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from gls_fused.capture.layer import Layer
from gls_fused.distributed.sharding import rows_here


class Copied(NamedTuple):
    """A tensor of a layer, and a copy of it with its outputs first."""

    layer: Layer
    tensor: Tensor
    matrix: Tensor


def by_matrix(
    layers: Sequence[Layer],
    counts: Sequence[int],
    tensors: Sequence[Tensor],
    copies: list[Copied] | None = None,
) -> list[Tensor]:
    """Views of the tensors, outputs first, those of one matrix after those of the other.

    Args:
        counts: how many of the tensors each layer has: weight and bias, or what is kept on them.
        tensors: of all layers, or none.
        copies: where they are to be written to: takes what `write_back_` then needs.
    """
    if not any(layer.stacked or layer.turned for layer in layers):
        return list(tensors)
    found: list[Tensor] = []
    remaining = iter(tensors)
    for layer, count in zip(layers, counts if tensors else (), strict=bool(tensors)):
        whole = [next(remaining) for _ in range(count)]
        own = [_matrices_here(layer, tensor) for tensor in whole]
        found += [each for matrix in zip(*own, strict=True) for each in matrix]
        if copies is not None and layer.turns_by_copy:
            pairs = zip(whole, found[-count:], strict=True)
            copies += [Copied(layer, *pair) for pair in pairs if pair[0] is not pair[1]]
    return found


def write_back_(copies: Sequence[Copied]) -> None:
    """What has been written to copies, into the tensors that they are of."""
    for layer, tensor, matrix in copies:
        written = layer.turn(matrix)
        # Of groups that have one output each it is a view, after all.
        if rows_here(written).data_ptr() != rows_here(tensor).data_ptr():
            tensor.copy_(written)


class Steps:
    """The counts of steps by matrix, each of which a backend advances.

    Args:
        counts: 0-d, by layer.
    """

    def __init__(self, layers: Sequence[Layer], counts: Sequence[Tensor]) -> None:
        self._stacks: list[Tensor] = []
        self.by_matrix: list[Tensor] = []
        for layer, count in zip(layers, counts, strict=True):
            if layer.blocks is None:
                self.by_matrix.append(count)
            else:
                self._stacks.append(count)
                self.by_matrix += count.repeat(layer.matrices_here).unbind()

    def close_(self, skip: Tensor | None) -> None:
        """Advance the counts of stacks, whose matrices have had copies of them."""
        for count in self._stacks:
            count += 1 if skip is None else (~skip).to(count)


def of_each_matrix(layers: Sequence[Layer], values: Sequence[int]) -> list[int]:
    """The layers' values, by matrix."""
    pairs = zip(layers, values, strict=True)
    return [value for layer, value in pairs for _ in range(layer.matrices_here)]


def _matrices_here(layer: Layer, tensor: Tensor) -> list[Tensor]:
    # One matrix that is spread over ranks stays whole for the update, which knows of them.
    return layer.matrices(rows_here(tensor) if layer.stacked else tensor)
