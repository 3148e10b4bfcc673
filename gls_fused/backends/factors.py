"""Orthogonal factors of all layers: those of one shape together, by torch's batched products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gls_fused import reference
from gls_fused.reference import POLAR_EXPRESS


def orthogonalize_all(matrices: Sequence[Tensor]) -> list[Tensor]:
    """See `gls_fused.reference.orthogonalize_all`.

    Numerics: products in the precision of `torch.get_float32_matmul_precision()`.
    """
    results: list[Tensor] = [torch.empty(0)] * len(matrices)
    alike: dict[tuple[object, ...], list[int]] = {}
    for index, matrix in enumerate(matrices):
        key = (tuple(sorted(matrix.shape)), matrix.dtype, matrix.device)
        alike.setdefault(key, []).append(index)
    for mine in alike.values():
        tall = [matrices[index].shape[0] > matrices[index].shape[1] for index in mine]
        found = _orthogonalize(
            torch.stack(
                [
                    matrices[i].T if turned else matrices[i]
                    for i, turned in zip(mine, tall, strict=True)
                ]
            )
        )
        for index, factor, turned in zip(mine, found, tall, strict=True):
            results[index] = factor.T if turned else factor
    return results


def spectral_updates(averages: Sequence[Tensor], split: int) -> list[Tensor]:
    """See `gls_fused.reference.spectral_updates`."""
    return reference.spectral_updates(averages, split, orthogonalize_all)


def _orthogonalize(x: Tensor) -> Tensor:
    """Of matrices [layers, s, b], s <= b, which are used up."""
    norms = torch.linalg.matrix_norm(x, keepdim=True)
    x /= (1.01 * norms).clamp(min=torch.finfo(x.dtype).tiny)
    for a, b, c in POLAR_EXPRESS:
        gram = torch.bmm(x, x.mT)
        # b A + c A A, and then a X + (b A + c A A) X.
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
