"""The matrices that layers are to a backend: most are one, a stack is as many as it has blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gls_fused.capture.layer import Layer


def by_matrix(
    layers: Sequence[Layer], counts: Sequence[int], tensors: Sequence[Tensor]
) -> list[Tensor]:
    """Views of the tensors, outputs first, those of one matrix after those of the other.

    Args:
        counts: how many of the tensors each layer has: weight and bias, or what is kept on them.
        tensors: of all layers, or none.
    """
    found: list[Tensor] = []
    remaining = iter(tensors)
    for layer, count in zip(layers, counts if tensors else (), strict=bool(tensors)):
        own = [layer.matrices(next(remaining)) for _ in range(count)]
        found += [each for matrix in zip(*own, strict=True) for each in matrix]
    return found


class Steps:
    """The counts of steps by matrix, each of which a backend advances.

    Args:
        counts: 0-d, by layer.
    """

    def __init__(self, layers: Sequence[Layer], counts: Sequence[Tensor]) -> None:
        self._stacks: list[tuple[Tensor, Tensor]] = []
        self.by_matrix: list[Tensor] = []
        for layer, count in zip(layers, counts, strict=True):
            if layer.blocks is None:
                self.by_matrix.append(count)
            else:
                copies = count.repeat(layer.blocks)
                self._stacks.append((count, copies))
                self.by_matrix += copies.unbind()

    def close_(self) -> None:
        """Bring the counts of the layers to where those of their matrices are, which are alike."""
        for count, copies in self._stacks:
            count.copy_(copies[0])


def of_each_matrix(layers: Sequence[Layer], values: Sequence[int]) -> list[int]:
    """The layers' values, by matrix."""
    pairs = zip(layers, values, strict=True)
    return [value for layer, value in pairs for _ in range(layer.blocks or 1)]


def norms_of(layer: Layer) -> Tensor:
    """Of the weight, 0-d; of each matrix of a stack, [blocks]; of a sharded one, sharded."""
    axes = None if layer.blocks is None else (1, 2)
    norms: Tensor = torch.linalg.vector_norm(layer.weight, dim=axes, dtype=layer.statistics_dtype)
    return norms
