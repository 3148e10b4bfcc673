"""Curvature: from the sums over a step's rows to the running estimate and its damped inverse.

A layer's estimate lives in a plain dict, so that an optimizer can keep it in its own state:

    dense       gram [d, d]                                      inverse: matrix [d, d]
    subspace    basis [d, r], core [r, r], trace                 inverse: core_inverse [r, r], shift

Letters: see gls_fused.reference. Sums arrive as one flat tensor, [n, ||A||_F^2, moments...], so
that they can be guarded, and all-reduced, at once. The moments are A'A, or Y'Y and A'Y. The basis
is kept by columns, as products with rows want it: as [r, d] in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from gls_fused.reference import DenseInverse, Inverse, SubspaceInverse
from gls_fused.scaling import where_flag

State: TypeAlias = dict[str, Any]

# The test matrix is the same in every process, whatever the user's own seed.
TEST_MATRIX_SEED = 2147483647

AUTO_RANK = 32


class Curvature(Protocol):
    """One kind of running estimate; without state of its own."""

    backend: ModuleType

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors in a state."""

    @property
    def sums_size(self) -> int:
        """The length of a layer's sums."""

    def test_matrix(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """What the rows are sketched with in place of U before there is an estimate."""

    def start(self, state: State, sums: Tensor) -> Tensor | None:
        """Fill `state` from the first sums, which must count at least one row.

        Returns:
            Of a subspace, Z [d, r]; `settle` has to follow.
        """

    def blend(self, state: State, sums: Tensor, beta: float) -> Tensor | None:
        """Blend new sums in, in place; sums that count no row do not change the estimate.

        Returns:
            As `start`.
        """

    def inverse(self, state: Mapping[str, Any]) -> Inverse:
        """P, as views on `state`."""


class Dense:
    """Sigma itself. The oracle, and practical for small d."""

    def __init__(self, dim: int, backend: ModuleType) -> None:
        self.dim = dim
        self.backend = backend

    def shapes(self) -> dict[str, tuple[int, ...]]:
        square = (self.dim, self.dim)
        return {"gram": square, "matrix": square}

    @property
    def sums_size(self) -> int:
        return 2 + self.dim * self.dim

    def test_matrix(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        return None

    def start(self, state: State, sums: Tensor) -> Tensor | None:
        state["gram"] = self._gram(sums / sums[0])
        return None

    def blend(self, state: State, sums: Tensor, beta: float) -> Tensor | None:
        means, weight = _means(sums, beta)
        state["gram"].lerp_(self._gram(means), weight)
        return None

    def inverse(self, state: Mapping[str, Any]) -> Inverse:
        return DenseInverse(state["matrix"])

    def _gram(self, means: Tensor) -> Tensor:
        return means[2:].view(self.dim, self.dim)


class Subspace:
    """A basis of r directions that follows the leading eigenvectors of Sigma."""

    def __init__(self, dim: int, rank: int, backend: ModuleType) -> None:
        self.dim = dim
        self.rank = min(rank, dim)
        self.backend = backend

    def shapes(self) -> dict[str, tuple[int, ...]]:
        square = (self.rank, self.rank)
        return {
            "basis": (self.dim, self.rank),
            "core": square,
            "core_inverse": square,
            "trace": (),
            "shift": (),
        }

    @property
    def sums_size(self) -> int:
        return 2 + self.rank * (self.rank + self.dim)

    def test_matrix(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        generator = torch.Generator().manual_seed(TEST_MATRIX_SEED)
        gaussian = torch.randn(self.dim, self.rank, generator=generator, dtype=torch.float64)
        basis: Tensor = torch.linalg.qr(gaussian)[0]
        return _by_columns(basis.to(device, dtype))

    def start(self, state: State, sums: Tensor) -> Tensor:
        trace, core, sketch = self._moments(sums / sums[0])
        state.update(trace=trace.clone(), core=core.clone())
        return sketch

    def blend(self, state: State, sums: Tensor, beta: float) -> Tensor:
        means, weight = _means(sums, beta)
        trace, core, sketch = self._moments(means)
        state["trace"].lerp_(trace, weight)
        # The basis moved with the last commit, so the estimate is U M U', and its sketch is U M.
        earlier = (state["core"] @ state["basis"].T).T
        state["core"].lerp_(core, weight)
        blended: Tensor = earlier.lerp(sketch, weight)
        return blended

    def inverse(self, state: Mapping[str, Any]) -> Inverse:
        return SubspaceInverse(state["basis"], state["core_inverse"], state["shift"])

    def _moments(self, means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Trace (0-d), core [r, r] and sketch [d, r]."""
        split = 2 + self.rank * self.rank
        core = means[2:split].view(self.rank, self.rank)
        return means[1], core, means[split:].view(self.rank, self.dim).T


def auto_rank(outputs: int) -> int:
    """The rank of a layer with m outputs that "auto" stands for: U is never larger than W."""
    return min(AUTO_RANK, outputs)


def make_curvature(
    kind: str, dim: int, outputs: int, rank: int | Literal["auto"], backend: ModuleType
) -> Curvature:
    """The curvature of a name the optimizers accept, "dense" or "subspace", for a weight [m, d]."""
    if kind == "dense":
        return Dense(dim, backend)
    return Subspace(dim, auto_rank(outputs) if rank == "auto" else rank, backend)


def empty_state(curvature: Curvature, dtype: torch.dtype, device: torch.device) -> State:
    """A state of the right shapes and strides for a saved one to be read into."""
    state: State = {
        name: torch.zeros(shape, dtype=dtype, device=device)
        for name, shape in curvature.shapes().items()
    }
    if "basis" in state:
        state["basis"] = _by_columns(state["basis"])
    return state


def settle(
    layers: Sequence[tuple[Curvature, State, Tensor | None]],
    damping: float,
    skip: Tensor | None = None,
) -> None:
    """Move the bases and make the damped inverses anew, in place where they exist.

    All subspaces' in one call each, so that a backend can make it as many launches.

    Args:
        layers: with what `start` or `blend` gave.
        skip: 0-d bool; where it is true the states stay as they are.
    """
    moving = [(kind, state, z) for kind, state, z in layers if isinstance(kind, Subspace)]
    if moving:
        kinds, states, sketches = zip(*moving, strict=True)
        backend, dims = kinds[0].backend, [kind.dim for kind in kinds]
        moved = backend.refresh_subspaces([state["core"] for state in states], sketches)
        for state, (basis, core) in zip(states, moved, strict=True):
            _store(state, skip, basis=_by_columns(basis), core=core)
        cores, traces = ([state[key] for state in states] for key in ("core", "trace"))
        inverses = backend.invert_cores(cores, traces, dims, damping)
        for state, (core_inverse, shift) in zip(states, inverses, strict=True):
            _store(state, skip, core_inverse=core_inverse, shift=shift)
    for kind, state, _ in layers:
        if isinstance(kind, Dense):
            _store(state, skip, matrix=kind.backend.invert_gram(state["gram"], damping))


def add_sums(
    sums: Tensor | None, count: int, trace: Tensor, moments: tuple[Tensor, ...], *, weight: int
) -> Tensor:
    """Add the sums over `count` rows, each of which stands for `weight`, to those already there.

    Rows that hold a NaN or an infinity, and rows that are all zero, say nothing of the inputs:
    sums over them add nothing, which is decided on the device.
    """
    head = torch.stack([torch.full_like(trace, count), trace])
    new = torch.cat([head, *(moment.T.flatten() for moment in moments)]) * weight
    usable = new.sum().isfinite() & (trace > 0)
    new = torch.where(usable, new, torch.zeros((), dtype=new.dtype, device=new.device))
    return new if sums is None else sums + new


def _means(sums: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Sums over n, and the weight with which they blend in: 1 - beta, or 0 where n is 0."""
    count = sums[0]
    return sums / count.clamp(min=1), (count > 0) * torch.full_like(count, 1 - beta)


def _by_columns(matrix: Tensor) -> Tensor:
    """The same matrix, its columns contiguous."""
    return matrix.T.contiguous().T


def _store(state: State, skip: Tensor | None, **tensors: Tensor) -> None:
    """In place where the tensor exists, so that views on the state stay valid."""
    for name, tensor in tensors.items():
        if name not in state:
            # Not the strides a solver left: a saved state is read into those of `empty_state`.
            state[name] = tensor if name == "basis" else tensor.contiguous()
            continue
        kept = state[name]
        kept.copy_(tensor if skip is None else where_flag(skip, kept, tensor))
