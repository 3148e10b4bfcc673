"""Curvature: from the sums over a step's rows to the running estimate and its damped inverse.

A layer's estimate lives in a plain dict, so that an optimizer can keep it in its own state:

    dense       gram [d, d], samples                             inverse: matrix [d, d]
    subspace    basis [d, r], core [r, r], trace, samples        inverse: core_inverse [r, r], shift

Letters: see gls_fused.reference. Sums arrive as one flat tensor, [n, ||A||_F^2, moments...], so
that they can be guarded, and all-reduced, at once. The moments are A'A, or Y'Y and A'Y. The basis
is kept by columns, as products with rows want it: as [r, d] in memory.

A weight that is several matrices, such as the experts of a layer, has all of that once per matrix,
stacked along a first axis; see `Stacked`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from gls_fused.curvature.precision import without_tf32
from gls_fused.reference import (
    DenseInverse,
    Inverse,
    SubspaceInverse,
    blend_samples,
    blend_weight,
    sketch_shift,
    start_subspace,
)
from gls_fused.scaling import where_flag

State: TypeAlias = dict[str, Any]

# The test matrix is the same in every process, whatever the user's own seed.
TEST_MATRIX_SEED = 2147483647

AUTO_RANK = 32

# What `blend` takes of a subspace's state.
ESTIMATE = ("basis", "core", "trace", "samples")

# And of which a commit makes P.
COMMITTED = (*ESTIMATE, "core_inverse", "shift")


class Moments(NamedTuple):
    """An estimate before its basis moves, of Sigma + mu S; see `reference.blend_subspace`."""

    sketch: Tensor  # Z + mu S U [d, r]
    core: Tensor  # M + mu I [r, r]
    trace: Tensor  # t, 0-d
    samples: Tensor  # s, 0-d
    seen: Tensor | None = None  # whether rows have been blended in, 0-d bool; None where they have


class Curvature(Protocol):
    """One kind of running estimate; without state of its own."""

    backend: ModuleType

    @property
    def names(self) -> frozenset[str]:
        """Of the tensors of a state."""

    @property
    def inverse_names(self) -> tuple[str, ...]:
        """Of those that make up its P."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors in a state."""

    @property
    def sums_size(self) -> int:
        """The length of a layer's sums."""

    def test_matrix(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """What the rows are sketched with in place of U before there is an estimate."""

    def start(
        self, state: State, test_matrix: Tensor | None, sums: Tensor
    ) -> Moments | list[Moments | None] | None:
        """Fill `state` from the first sums, which must count at least one row.

        Args:
            test_matrix: what they were sketched with, if they were.
        Returns:
            Of a subspace, what `settle` has to be given; of a stack, for each of its matrices.
        """

    def inverse(self, state: Mapping[str, Any]) -> Inverse:
        """P, as views on `state`."""


class Dense:
    """Sigma itself. The oracle, and practical for small d."""

    names: ClassVar[frozenset[str]] = frozenset({"gram", "samples", "matrix"})
    inverse_names: ClassVar[tuple[str, ...]] = ("matrix",)

    def __init__(self, dim: int, backend: ModuleType) -> None:
        self.dim = dim
        self.backend = backend

    def shapes(self) -> dict[str, tuple[int, ...]]:
        square = (self.dim, self.dim)
        return {"gram": square, "samples": (), "matrix": square}

    @property
    def sums_size(self) -> int:
        return 2 + self.dim * self.dim

    def test_matrix(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        return None

    def start(self, state: State, test_matrix: Tensor | None, sums: Tensor) -> None:
        state["gram"] = self._gram(sums)
        state["samples"] = sums[0].clone()

    def blend(self, state: State, sums: Tensor, beta: float) -> None:
        """Blend new sums in, in place."""
        count = sums[0]
        state["gram"].lerp_(self._gram(sums), blend_weight(count, beta))
        state["samples"].copy_(blend_samples(state["samples"], count, beta))

    def inverse(self, state: Mapping[str, Any]) -> Inverse:
        return DenseInverse(state["matrix"])

    def _gram(self, sums: Tensor) -> Tensor:
        return (sums[2:] / sums[0].clamp(min=1)).view(self.dim, self.dim)


class Subspace:
    """A basis of r directions that follows the leading eigenvectors of Sigma."""

    names: ClassVar[frozenset[str]] = frozenset(
        {"basis", "core", "core_inverse", "trace", "samples", "shift"}
    )
    inverse_names: ClassVar[tuple[str, ...]] = ("basis", "core_inverse", "shift")

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
            "samples": (),
            "shift": (),
        }

    @property
    def sums_size(self) -> int:
        return 2 + self.rank * (self.rank + self.dim)

    def test_matrix(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        # Made on the CPU whatever the default device, which need not know float64.
        generator = torch.Generator("cpu").manual_seed(TEST_MATRIX_SEED)
        gaussian = torch.randn(
            self.dim, self.rank, generator=generator, dtype=torch.float64, device="cpu"
        )
        basis: Tensor = torch.linalg.qr(gaussian)[0]
        return by_columns(basis.to(dtype).to(device))

    def start(self, state: State, test_matrix: Tensor | None, sums: Tensor) -> Moments:
        assert test_matrix is not None
        return Moments(*start_subspace(test_matrix, sums))

    def inverse(self, state: Mapping[str, Any]) -> Inverse:
        return SubspaceInverse(*(state[name] for name in self.inverse_names))


class Stacked:
    """An estimate of each matrix of a stack, in tensors that have the matrices as first axis.

    A matrix that has no row when the others start takes the rows of all, of which its own will be a
    part.
    """

    def __init__(self, each: Dense | Subspace, blocks: int) -> None:
        self.each = each
        self.blocks = blocks
        self.backend = each.backend
        self.names = each.names
        self.inverse_names = each.inverse_names

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: (self.blocks, *shape) for name, shape in self.each.shapes().items()}

    @property
    def sums_size(self) -> int:
        return self.blocks * self.each.sums_size

    def test_matrix(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        return self.each.test_matrix(dtype, device)

    def start(self, state: State, test_matrix: Tensor | None, sums: Tensor) -> list[Moments | None]:
        by_block = sums.view(self.blocks, -1)
        by_block = torch.where(by_block[:, :1] > 0, by_block, by_block.sum(0))
        state.update(empty_state(self, sums.dtype, sums.device))
        moments: list[Moments | None] = []
        for own, part in zip(self.states(state), by_block, strict=True):
            found: State = {}
            moments.append(self.each.start(found, test_matrix, part))
            for name, value in found.items():
                own[name].copy_(value)
        return moments

    def states(self, state: Mapping[str, Any]) -> list[State]:
        """Of each matrix, as views on `state`."""
        parts = {name: state[name].unbind() for name in self.names}
        return [{name: part[block] for name, part in parts.items()} for block in range(self.blocks)]

    def inverse(self, state: Mapping[str, Any]) -> Inverse:
        return self.each.inverse(state)


def auto_rank(outputs: int) -> int:
    """The rank of a layer with m outputs that "auto" stands for: U is never larger than W."""
    return min(AUTO_RANK, outputs)


def make_curvature(
    kind: str,
    dim: int,
    outputs: int,
    rank: int | Literal["auto"],
    backend: ModuleType,
    blocks: int | None = None,
) -> Curvature:
    """The curvature of a name the optimizers accept, "dense" or "subspace", for a weight [m, d].

    Args:
        blocks: of so many weights in a stack; None for one that is no stack.
    """
    each: Dense | Subspace = Dense(dim, backend)
    if kind != "dense":
        each = Subspace(dim, auto_rank(outputs) if rank == "auto" else rank, backend)
    return each if blocks is None else Stacked(each, blocks)


def empty_state(curvature: Curvature, dtype: torch.dtype, device: torch.device) -> State:
    """A state of the right shapes and strides for a saved one to be read into."""
    state: State = {
        name: torch.zeros(shape, dtype=dtype, device=device)
        for name, shape in curvature.shapes().items()
    }
    if "basis" in state:
        state["basis"] = by_columns(state["basis"])
    return state


def check_device(owner: str, param: Tensor, state: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Raises RuntimeError where tensors of a state are on another device than the parameter."""
    for key in keys:
        value = state.get(key)
        if isinstance(value, Tensor) and value.device != param.device:
            raise RuntimeError(
                f"{owner} is on {param.device}, {key!r} of its state on {value.device}; nothing "
                "was changed: move the model before the optimizer is built, or bring the state to "
                "it by optimizer.load_state_dict(optimizer.state_dict())"
            )


def recast(state: State, dtype: torch.dtype, keys: Iterable[str]) -> None:
    """Bring tensors of a state to their dtype, where somebody has cast them or the parameter."""
    for key in keys:
        value = state.get(key)
        if isinstance(value, Tensor) and value.dtype != dtype:
            state[key] = value.to(dtype)


def commits_at_once(kind: Curvature, state: Mapping[str, Any]) -> bool:
    """Whether the backend commits this estimate in a call of its own, and looks at gradients."""
    commits = getattr(kind.backend, "commits", None)
    if commits is None or not isinstance(kind, Subspace):
        return False
    found: bool = commits([state[name] for name in COMMITTED])
    return found


def commit(
    layers: Sequence[tuple[Curvature, State, Tensor, Sequence[Tensor]]],
    beta: float,
    damping: float,
    power: float,
    skip: Tensor | None = None,
) -> None:
    """`blend`, then `settle`, with one call of the backend where it has one.

    Args:
        layers: with their sums and, where `commits_at_once`, the gradients that the rows led to,
            which count only where one of these is not zero; else none.
        skip: 0-d bool; where it is true the states stay as they are.
    """
    rest: list[tuple[Curvature, State, Tensor]] = []
    together: dict[Any, list[tuple[State, Tensor, Sequence[Tensor]]]] = {}
    for kind, state, sums, gradients in layers:
        if commits_at_once(kind, state):
            place = (kind.backend, sums.device)
            together.setdefault(place, []).append((state, sums, gradients))
        else:
            rest.append((kind, state, sums))
    for (backend, device), found in together.items():
        states, all_sums, gradients = zip(*found, strict=True)
        backend.commit_subspaces_(
            [[state[name] for name in COMMITTED] for state in states],
            all_sums,
            gradients,
            beta=beta,
            damping=damping,
            power=power,
            skip=None if skip is None else skip.to(device, non_blocking=True),
        )
    if rest:
        settle(blend(rest, beta), damping, power, skip)


@without_tf32()
def blend(
    layers: Sequence[tuple[Curvature, State, Tensor]], beta: float
) -> list[tuple[Curvature, State, Moments | None]]:
    """Blend new sums in; those that count no row do not change the estimate.

    Returns:
        What `settle` has to be given.
    """
    blended: list[tuple[Curvature, State, Moments | None]] = []
    moving = []
    for kind, state, sums in _by_matrix(layers):
        if isinstance(kind, Dense):
            kind.blend(state, sums, beta)
            blended.append((kind, state, None))
        else:
            moving.append((kind, state, sums))
    if moving:
        kinds, states, all_sums = zip(*moving, strict=True)
        estimates = [[state[name] for state in states] for name in ESTIMATE]
        found = kinds[0].backend.blend_subspaces(*estimates, all_sums, beta)
        pairs = zip(found, all_sums, strict=True)
        moments = [Moments(*parts)._replace(seen=sums[0] > 0) for parts, sums in pairs]
        blended += zip(kinds, states, moments, strict=True)
    return blended


@without_tf32()
def settle(
    layers: Sequence[tuple[Curvature, State, Moments | list[Moments | None] | None]],
    damping: float,
    power: float,
    skip: Tensor | None = None,
) -> None:
    """Move the bases and make the damped inverses, of a power, anew, in place where they exist.

    All subspaces' in one call each, so that a backend can make it as many launches.

    Args:
        layers: with what `start` or `blend` gave.
        skip: 0-d bool; where it is true the states stay as they are.
    """
    layers = _by_matrix(layers)
    moving = [(kind, state, found) for kind, state, found in layers if found is not None]
    if moving:
        kinds, states, moments = zip(*moving, strict=True)
        sketches, cores, traces, samples, seen = zip(*moments, strict=True)
        backend, dims = kinds[0].backend, [kind.dim for kind in kinds]
        moved, cores = zip(*backend.refresh_subspaces(cores, sketches), strict=True)
        added = [sketch_shift(trace, dim) for trace, dim in zip(traces, dims, strict=True)]
        diagonals = [core.diagonal() for core in cores]
        # Where the basis was completed by directions of no sketch there is none of it.
        found = [torch.minimum(*pair) for pair in zip(diagonals, added, strict=True)]
        torch._foreach_sub_(diagonals, found)
        # Over no row the basis would move by rounding, which adds up.
        bases = _where_seen(seen, moved, [state.get("basis") for state in states])
        kept = _where_seen(seen, cores, [state.get("core") for state in states])
        inverses = backend.invert_cores(kept, traces, dims, damping, power, samples)
        core_inverses, shifts = zip(*inverses, strict=True)
        _store(
            states,
            skip,
            basis=[by_columns(basis) for basis in bases],
            core=kept,
            trace=traces,
            samples=samples,
            core_inverse=core_inverses,
            shift=shifts,
        )
    for kind, state, _ in layers:
        if isinstance(kind, Dense):
            found = kind.backend.invert_gram(state["gram"], damping, power, state["samples"])
            _store([state], skip, matrix=[found])


def add_sums(
    sums: Tensor | None, count: int, trace: Tensor, moments: Sequence[Tensor], *, weight: float
) -> Tensor:
    """Add the sums over `count` rows, each of which stands for `weight`, to those already there.

    Rows that hold a NaN or an infinity, and rows that are all zero, say nothing of the inputs:
    sums over them add nothing, which is decided on the device.
    """
    head = (torch.full_like(trace, count)[None], trace[None])
    new = torch.cat([*head, *(moment.T.flatten() for moment in moments)]) * weight
    # The trace tells: as U is orthonormal, no entry of the moments is larger.
    usable = (trace > 0) & (trace < torch.finfo(trace.dtype).max / 4)
    new = torch.where(usable, new, 0.0)
    return new if sums is None else sums + new


def _where_seen(
    seen: Sequence[Tensor | None], now: Sequence[Tensor], before: Sequence[Any]
) -> list[Tensor]:
    """What stands in the states from here on: what it was where no row was seen."""
    found = zip(seen, now, before, strict=True)
    return [new if some is None else torch.where(some, new, old) for some, new, old in found]


def _by_matrix(layers: Sequence[tuple[Curvature, State, Any]]) -> list[tuple[Any, State, Any]]:
    """Each with what is given for it; a stack as its matrices, their states views on its own."""
    found: list[tuple[Any, State, Any]] = []
    for kind, state, given in layers:
        if isinstance(kind, Stacked):
            parts = given.view(kind.blocks, -1) if isinstance(given, Tensor) else given
            kinds = itertools.repeat(kind.each, kind.blocks)
            found += zip(kinds, kind.states(state), parts, strict=True)
        else:
            found.append((kind, state, given))
    return found


def by_columns(matrix: Tensor) -> Tensor:
    """The same matrix, or matrices, with contiguous columns."""
    return matrix.mT.contiguous().mT


def _store(states: Sequence[State], skip: Tensor | None, **results: Sequence[Tensor]) -> None:
    """In place where the tensors exist, so that views on a state stay valid."""
    kept: list[Tensor] = []
    found: list[Tensor] = []
    for name, tensors in results.items():
        for state, tensor in zip(states, tensors, strict=True):
            if name in state:
                kept.append(state[name])
                found.append(tensor)
            else:
                # Not the strides a solver left: a saved state is read into those of `empty_state`.
                state[name] = tensor if name == "basis" else tensor.contiguous()
    if skip is not None:
        found = [where_flag(skip, *pair) for pair in zip(kept, found, strict=True)]
    if kept:
        torch._foreach_copy_(kept, found)
