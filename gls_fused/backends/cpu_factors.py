"""Orthogonal steps on a CPU, by ops of `csrc/cpu/orthogonal.cpp` and `csrc/cpu/spectral.cpp`.

One thread takes a matrix from its norm to its factor, so the matrices of a model are shared among
the threads, and not each of their products. What that does not suit is BLAS's, by `factors`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from gls_fused.backends import factors
from gls_fused.reference import POLAR_EXPRESS, DenseInverse, Inverse, UpdatesOf, spectral_length

# s s b of a matrix from which BLAS takes as long as our op of one thread, or less.
LEAST_BLAS = 1 << 28
# The same, up to which one thread has it done before others are awake.
MOST_ALONE = 1 << 19
_COEFFICIENTS = [value for step in POLAR_EXPRESS for value in step]


def orthogonal_updates(matrices: Sequence[Tensor], split: int = 1) -> list[Tensor]:
    """See `gls_fused.backends.factors.orthogonal_updates`; on a CPU most by an op of ours."""
    parts = [matrix[: len(matrix) // split] for matrix in matrices]
    kinds = tuple((*x.shape, x.dtype, factors.factor_dtype(x), x.is_cpu) for x in parts)
    results: dict[int, Tensor] = {}
    for mine in _taken_by_us(kinds, torch.get_num_threads() / split):
        own, lengths = [matrices[i] for i in mine], [spectral_length(parts[i]) for i in mine]
        found = torch.ops.gls_fused.orthogonalize_each(own, lengths, split, _COEFFICIENTS)
        results.update(zip(mine, found, strict=True))
    rest = [i for i in range(len(matrices)) if i not in results]
    if rest:
        found = factors.orthogonal_updates([matrices[i] for i in rest], split)
        results.update(zip(rest, found, strict=True))
    return [results[i] for i in range(len(matrices))]


@functools.cache
def _taken_by_us(
    kinds: Sequence[tuple[int, int, torch.dtype, torch.dtype, bool]], threads: float
) -> list[list[int]]:
    """Which matrices our op takes, by dtype; none that would leave the other threads waiting.

    Args:
        kinds: rows, columns, dtype, that of the factor's products and whether on a CPU, of each.
        threads: for each part of a matrix.
    """
    alike: dict[torch.dtype, list[tuple[int, int]]] = {}
    for i, (rows, columns, dtype, inner, on_cpu) in enumerate(kinds):
        cost = rows * columns * min(rows, columns)
        # Those of 16 bits have products of 32, which are torch's.
        if on_cpu and dtype == inner and cost < LEAST_BLAS:
            alike.setdefault(dtype, []).append((cost, i))
    found = []
    for costs in alike.values():
        costs.sort()
        total = sum(cost for cost, _ in costs)
        while costs and costs[-1][0] > MOST_ALONE and 1.5 * total < threads * costs[-1][0]:
            total -= costs.pop()[0]
        found.append([i for _, i in costs])
    return [mine for mine in found if mine]


def update_spectral_layers_(
    precondition_gradient: factors.Precondition,
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    inverses: Sequence[Inverse | None],
    *,
    layer_sizes: Sequence[int],
    lr: float | Tensor,
    momentum: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    skip: Tensor | None = None,
    lr_bounds: Tensor | None = None,
    split: int = 1,
    updates_of: UpdatesOf | None = None,
) -> None:
    """See `gls_fused.reference.update_spectral_layers_`; two ops of ours, and what is between them.

    What does not lie in memory as they take it is for `gls_fused.backends.factors`.

    Args:
        precondition_gradient: of the backend.
    """
    updates_of = updates_of or orthogonal_updates
    if not _lie_on_cpu(params, gradients, exp_avgs, exp_avg_sqs, inverses):
        factors.update_spectral_layers_(
            precondition_gradient, updates_of, params, gradients, exp_avgs, exp_avg_sqs, steps,
            inverses, layer_sizes=layer_sizes, lr=lr, momentum=momentum, beta2=beta2, eps=eps,
            weight_decay=weight_decay, skip=skip, lr_bounds=lr_bounds, split=split,
        )  # fmt: skip
        return
    for first in itertools.accumulate(layer_sizes[:-1], initial=0):
        # Before anything is written.
        if len(params[first]) % split:
            raise ValueError(
                f"split: expected a divisor of a weight's {len(params[first])} outputs, got {split}"
            )
    if skip is not None and skip:
        return
    bases, cores, shifts = zip(
        *(inverse or (None, None, None) for inverse in inverses), strict=True
    )
    lr = float(lr)
    averages = torch.ops.gls_fused.blend_directions_(
        params, gradients, exp_avgs, exp_avg_sqs, steps, bases, cores, shifts, layer_sizes, lr,
        momentum, beta2, eps, weight_decay, lr_bounds,
    )  # fmt: skip
    firsts = itertools.accumulate(layer_sizes[:-1], initial=0)
    torch.ops.gls_fused.move_weights_(
        [params[first] for first in firsts],
        updates_of(averages, split),
        lr,
        weight_decay,
        lr_bounds,
    )
    increment_version([*params, *exp_avgs, *exp_avg_sqs, *steps])


def _lie_on_cpu(
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    inverses: Sequence[Inverse | None],
) -> bool:
    """Whether the ops for orthogonal steps take them as they lie in memory."""
    if not exp_avgs or not params[0].is_cpu:
        return False
    dtype = params[0].dtype
    bases = [inverse[0] for inverse in inverses if inverse is not None]
    return (
        dtype in (torch.float32, torch.float64)
        and not any(isinstance(inverse, DenseInverse) for inverse in inverses)
        and all(x.dtype == dtype for x in (*params, *gradients, *exp_avgs, *exp_avg_sqs, *bases))
        and all(x.is_cpu for x in (*params, *gradients))
        and all(x.is_contiguous() for x in (*exp_avgs, *exp_avg_sqs))
        and all(param.is_contiguous() or is_turned(param) for param in params)
    )


def is_turned(tensor: Tensor) -> bool:
    """Whether a matrix lies in memory by columns, and not by rows."""
    return tensor.dim() == 2 and not tensor.is_contiguous() and tensor.T.is_contiguous()
