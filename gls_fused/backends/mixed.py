"""Backend `mixed`: on CUDA devices each op of Triton's or of the C++ kernels, as `CHOICES` says.

What `auto` takes where both can be used. What one has written the other reads: tensors of a state
have the shapes, dtypes and strides of `curvature.estimate.empty_state`, and nothing is padded.
A basis or core whose rank only one backend has kernels for is that one's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gls_fused.backends import factors, native, triton
from gls_fused.backends.choices import CHOICES
from gls_fused.backends.triton.configs import (
    MAX_CORE_RANK,
    MAX_RANK,
    MAX_REFRESH_RANK,
    MAX_ROOT_RANK,
)
from gls_fused.reference import invert_gram, sum_gram, take_patches

__all__ = [
    "TAKES_OTHERS",
    "blend_subspace",
    "blend_subspaces",
    "commit_subspaces_",
    "commits",
    "invert_core",
    "invert_cores",
    "invert_gram",
    "measure_growths_",
    "measure_weights_",
    "orthogonal_updates",
    "precondition_gradient",
    "precondition_rows",
    "refresh_subspace",
    "refresh_subspaces",
    "round_params_",
    "sketch_rows",
    "sum_gram",
    "take_patches",
    "update_layers_",
    "update_spectral_layers_",
]


def _chosen(op: str) -> ModuleType:
    return native if CHOICES[op][0] == "native" else triton


precondition_rows = _chosen("precondition_rows").precondition_rows
precondition_gradient = _chosen("precondition_gradient").precondition_gradient
sketch_rows = _chosen("sketch_rows").sketch_rows
blend_subspace = _chosen("blend_subspaces").blend_subspace
blend_subspaces = _chosen("blend_subspaces").blend_subspaces
commits = _chosen("commit_subspaces_").commits
commit_subspaces_ = _chosen("commit_subspaces_").commit_subspaces_
update_layers_ = _chosen("update_layers_").update_layers_
TAKES_OTHERS = _chosen("update_layers_").TAKES_OTHERS
# The C++ kernels have none of these: there they are a few of torch's ops.
measure_weights_, measure_growths_ = triton.measure_weights_, triton.measure_growths_
# A launch of either.
round_params_ = triton.round_params_
orthogonal_updates = _chosen("orthogonal_updates").orthogonal_updates
update_spectral_layers_ = functools.partial(
    factors.update_spectral_layers_, precondition_gradient, orthogonal_updates
)

# Ops that only one of them has, beyond those of gls_fused.reference.
measure_layers_, sum_images = triton.measure_layers_, triton.sum_images
if _chosen("sketch_rows") is native:
    add_sketch_ = native.add_sketch_
else:
    sum_rows = triton.sum_rows
if _chosen("precondition_rows") is native and _chosen("precondition_gradient") is native:
    # An autograd function in C++, which calls these two.
    LinearCapture, captured_linear = native.LinearCapture, native.captured_linear


def refresh_subspace(core: Tensor, sketch: Tensor) -> tuple[Tensor, Tensor]:
    """See `gls_fused.reference.refresh_subspace`."""
    (result,) = refresh_subspaces([core], [sketch])
    return result


def refresh_subspaces(
    cores: Sequence[Tensor], sketches: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """See `gls_fused.reference.refresh_subspaces`."""

    def call(backend: ModuleType, *layers: Any) -> Any:
        return backend.refresh_subspaces(*layers)

    return _by_backend("refresh_subspaces", _widest_basis, call, cores, sketches)


def invert_core(
    core: Tensor,
    trace: Tensor,
    dim: int,
    damping: float,
    power: float = 1,
    samples: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `gls_fused.reference.invert_core`."""
    rows = None if samples is None else [samples]
    (result,) = invert_cores([core], [trace], [dim], damping, power, rows)
    return result


def invert_cores(
    cores: Sequence[Tensor],
    traces: Sequence[Tensor],
    dims: Sequence[int],
    damping: float,
    power: float = 1,
    samples: Sequence[Tensor] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """See `gls_fused.reference.invert_cores`."""

    def call(backend: ModuleType, cores: Any, traces: Any, dims: Any, *rows: Any) -> Any:
        return backend.invert_cores(cores, traces, dims, damping, power, *rows)

    widest = functools.partial(_widest_core, power)
    parts = [traces, dims] if samples is None else [traces, dims, samples]
    return _by_backend("invert_cores", widest, call, cores, *parts)


def _widest_basis(backend: ModuleType, dtype: torch.dtype) -> int:
    if backend is native:
        return native.CUDA_BASIS_RANKS.get(dtype, 0)
    return MAX_REFRESH_RANK if dtype == torch.float32 else 0


def _widest_core(power: float, backend: ModuleType, dtype: torch.dtype) -> int:
    if backend is native:
        ranks = native.CUDA_CORE_RANKS if power == 1 else native.CUDA_ROOT_RANKS
        return ranks.get(dtype, 0)
    if power != 1:
        return MAX_ROOT_RANK
    return MAX_RANK if dtype == torch.float64 else MAX_CORE_RANK


def _by_backend(
    op: str,
    widest: Callable[[ModuleType, torch.dtype], int],
    call: Callable[..., list[tuple[Tensor, Tensor]]],
    cores: Sequence[Tensor],
    *parts: Sequence[Any],
) -> list[tuple[Tensor, Tensor]]:
    """A result per layer, of the chosen backend unless only the other one has kernels for its rank.

    Args:
        widest: the largest rank with kernels.
        call: the op, of a backend and what the layers of one call have.
        cores, parts: the arguments, of each layer one.
    """
    first = _chosen(op)
    second = triton if first is native else native
    shares: dict[ModuleType, list[int]] = {first: [], second: []}
    for index, core in enumerate(cores):
        rank = len(core)
        beyond = widest(first, core.dtype) < rank <= widest(second, core.dtype)
        shares[second if beyond else first].append(index)
    results: dict[int, tuple[Tensor, Tensor]] = {}
    for backend, mine in shares.items():
        if mine:
            found = call(backend, *([part[index] for index in mine] for part in (cores, *parts)))
            results.update(zip(mine, found, strict=True))
    return [results[index] for index in range(len(cores))]
