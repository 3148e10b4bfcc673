"""Every op of a backend on a model's layers: its arrays, what it has to give, its bytes and flops.

Bytes count every array once, read or written; flops are leading orders. Ops that all backends have
from the reference (convolutions' sketches, dense curvature) are torch's own and are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from gls_fused import reference
from gls_fused.backends.factors import factor_dtype
from gls_fused.curvature.estimate import Subspace, add_sums, commit
from gls_fused.reference import POLAR_EXPRESS, SubspaceInverse
from tests.tolerances import ITERATION, SOLVE, relative_error

FLOAT = 4
DAMPING, BETA = 0.3, 0.9
POWERS = (0.5, 1)
# Products of thousands of float32 terms: as tests/backends/device has it.
PRODUCT = 1e-5
UPDATE = {"lr": 0.1, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.01}
NORMALIZE = ("factored", "row", "rms", "adam", "sgd", "none")

Call = Callable[[ModuleType], Sequence[Tensor]]


@dataclass(frozen=True)
class Shapes:
    """Layers [outputs, inputs], each with a bias, the rows of a step, and the rank of P."""

    name: str
    layers: tuple[tuple[int, int], ...]
    rows: int
    rank: int


@dataclass(frozen=True)
class Case:
    """One op on one set of arrays.

    Attributes:
        make: the arrays in a dtype -> the op on them as a function of the backend.
        tolerance: of the relative error in float32.
        products: whether its flops are of bfloat16 products with tensor cores, on a GPU.
    """

    op: str
    what: str
    make: Callable[[torch.dtype], Call]
    bytes: float
    flops: float
    tolerance: float
    products: bool = False

    def fits(self, backend: ModuleType) -> bool:
        """Whether the backend has the op."""
        return hasattr(backend, self.op)

    def error(self, backend: ModuleType) -> float:
        """The largest of its results' relative errors, against the reference in float64."""
        found = self.make(torch.float32)(backend)
        exact = self.make(torch.float64)(reference)
        errors = [relative_error(one, two) for one, two in zip(found, exact, strict=True)]
        # Not their maximum, which passes over a NaN.
        return next((x for x in errors if not x <= self.tolerance), max(errors))


def make_cases(shapes: Shapes, device: torch.device) -> Iterator[Case]:
    """All of them; arrays are made when they are asked for."""
    draw = _Draw(device, shapes.rank)
    yield from _of_one_layer(shapes, draw)
    yield from _of_statistics(shapes, draw)
    for normalize in NORMALIZE:
        for formed in (False, True):
            yield _update(shapes, draw, normalize, formed=formed)
    yield _spectral(shapes, draw)
    yield _measured(shapes, draw)
    yield _grown(shapes, draw)
    yield _rounded(shapes, draw)


class _Draw:
    """Random arrays: the same numbers in every dtype."""

    def __init__(self, device: torch.device, rank: int) -> None:
        self.device, self.rank = device, rank

    def normal(self, *shape: int, seed: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).double()

    def basis(self, dim: int, dtype: torch.dtype) -> Tensor:
        rank = min(self.rank, dim)
        # By columns, as the state keeps it.
        return torch.linalg.qr(self.normal(dim, rank, seed=dim))[0].T.contiguous().to(dtype).T

    def core(self, dim: int) -> Tensor:
        rank = min(self.rank, dim)
        root = self.normal(rank, 2 * rank, seed=1)
        return root @ root.T / rank

    def inverse(self, dim: int, dtype: torch.dtype) -> SubspaceInverse:
        core = self.core(dim)
        parts = reference.invert_core(core, 2 * core.trace(), dim, DAMPING)
        return SubspaceInverse(self.basis(dim, dtype), *(x.to(dtype) for x in parts))


def _of_one_layer(shapes: Shapes, draw: _Draw) -> Iterator[Case]:
    (m, k), n = shapes.layers[0], shapes.rows
    d = k + 1
    r = min(shapes.rank, d)

    def rows(dtype: torch.dtype) -> Call:
        x, inverse = draw.normal(n, k, seed=2).to(dtype), draw.inverse(d, dtype)
        return lambda backend: backend.precondition_rows(x, inverse, ones=True)

    def gradient(dtype: torch.dtype) -> Call:
        weight, bias = draw.normal(m, k, seed=2).to(dtype), draw.normal(m, seed=3).to(dtype)
        inverse = draw.inverse(d, dtype)
        return lambda backend: backend.precondition_gradient(weight, bias, inverse)

    def sketch(dtype: torch.dtype) -> Call:
        x, basis = draw.normal(n, k, seed=2).to(dtype), draw.basis(d, dtype)
        return lambda backend: backend.sketch_rows(x, basis, ones=True)

    def add_sketch(dtype: torch.dtype) -> Call:
        x, basis = draw.normal(n, k, seed=2).to(dtype), draw.basis(d, dtype)

        def call(backend: ModuleType) -> Sequence[Tensor]:
            sums = torch.zeros(2 + r * r + r * d, dtype=dtype, device=draw.device)
            if backend is reference:
                core, sketched, trace = reference.sketch_rows(x, basis, ones=True)
                head = torch.stack([torch.full_like(trace, n), trace])
                return [sums + torch.cat([head, core.flatten(), sketched.T.flatten()])]
            backend.add_sketch_(x, basis, True, sums)
            return [sums]

        return call

    walk = FLOAT * (n * k + 2 * d * r)
    yield Case(
        "precondition_rows", f"[{n}, {k}]", rows, FLOAT * (2 * n * k + d * r),
        4 * n * d * r, PRODUCT,
    )  # fmt: skip
    yield Case(
        "precondition_gradient", f"[{m}, {k}]", gradient, FLOAT * (2 * m * d + d * r),
        4 * m * d * r, PRODUCT,
    )  # fmt: skip
    yield Case("sketch_rows", f"[{n}, {k}]", sketch, walk, 4 * n * d * r, PRODUCT)
    yield Case("add_sketch_", f"[{n}, {k}]", add_sketch, walk, 4 * n * d * r, PRODUCT)


def _of_statistics(shapes: Shapes, draw: _Draw) -> Iterator[Case]:
    """Of all layers at once."""
    dims = [k + 1 for _, k in shapes.layers]
    sizes = [(d, min(shapes.rank, d)) for d in dims]
    layers = f"{len(dims)} layers"

    def blend(dtype: torch.dtype) -> Call:
        bases = [draw.basis(d, dtype) for d in dims]
        cores = [draw.core(d).to(dtype) for d in dims]
        traces = [2 * core.trace() for core in cores]
        samples = [torch.full_like(trace, 100.0) for trace in traces]
        sums = []
        for basis in bases:
            x = draw.normal(shapes.rows, len(basis), seed=4).to(dtype)
            core, sketch, trace = reference.sketch_rows(x, basis, ones=False)
            head = torch.stack([torch.full_like(trace, len(x)), trace])
            sums.append(torch.cat([head, core.flatten(), sketch.T.flatten()]))

        def call(backend: ModuleType) -> Sequence[Tensor]:
            found = backend.blend_subspaces(bases, cores, traces, samples, sums, BETA)
            return [x for layer in found for x in layer]

        return call

    def refresh(dtype: torch.dtype) -> Call:
        cores = [draw.core(d) for d in dims]
        sketches = []
        for d, core in zip(dims, cores, strict=True):
            # Z = Sigma U for a Sigma that keeps what U does not see.
            basis = draw.basis(d, torch.float64)
            rest = draw.normal(d, basis.shape[1], seed=5)
            rest = rest - basis @ (basis.T @ rest)
            sketches.append((basis @ core + 0.1 * rest / d**0.5).to(dtype))
        cores = [core.to(dtype) for core in cores]

        def call(backend: ModuleType) -> Sequence[Tensor]:
            # U+ and M+ are unique up to the signs that QR chooses, U+ M+ U+' x is unique.
            found = []
            for basis, core in backend.refresh_subspaces(cores, sketches):
                probe = draw.normal(len(basis), 3, seed=6)
                found.append(basis.double() @ (core.double() @ (basis.double().T @ probe)))
            return found

        return call

    def invert(power: float) -> Callable[[torch.dtype], Call]:
        def make(dtype: torch.dtype) -> Call:
            cores = [draw.core(d).to(dtype) for d in dims]
            traces = [2 * core.trace() for core in cores]

            def call(backend: ModuleType) -> Sequence[Tensor]:
                found = backend.invert_cores(cores, traces, dims, DAMPING, power)
                return [x for layer in found for x in layer]

            return call

        return make

    def commit_all(dtype: torch.dtype) -> Call:
        given = []
        for d, r in sizes:
            basis, core = draw.basis(d, dtype), draw.core(d).to(dtype)
            trace = 2 * core.trace()
            rows = draw.normal(shapes.rows, d, seed=4).to(dtype)
            moments = reference.sketch_rows(rows, basis, ones=False)
            sums = add_sums(None, len(rows), moments[2], moments[:2], weight=1)
            made = {"core_inverse": torch.empty_like(core), "shift": torch.empty_like(trace)}
            samples = torch.full_like(trace, 100.0)
            state = {"basis": basis, "core": core, "trace": trace, "samples": samples, **made}
            given.append((d, r, state, sums))

        def call(backend: ModuleType) -> Sequence[Tensor]:
            states = [
                {name: value.clone() for name, value in state.items()} for _, _, state, _ in given
            ]
            layers = [
                (Subspace(d, r, backend), state, sums, [])
                for (d, r, _, sums), state in zip(given, states, strict=True)
            ]
            commit(layers, BETA, DAMPING, POWERS[0])
            found = []
            for state in states:
                # As above, of the basis' signs.
                wide = {name: value.double() for name, value in state.items()}
                seen = wide["basis"].T @ draw.normal(len(wide["basis"]), 3, seed=6)
                found += [wide["trace"], wide["samples"], wide["shift"]]
                found += [wide["basis"] @ (wide[key] @ seen) for key in ("core", "core_inverse")]
            return found

        return call

    moved = FLOAT * sum(3 * d * r + 3 * r * r for d, r in sizes)
    yield Case(
        "commit_subspaces_", layers, commit_all, 2 * moved,
        sum(6 * d * r * r + r**3 for d, r in sizes), SOLVE[torch.float32],
    )  # fmt: skip
    yield Case(
        "blend_subspaces", layers, blend, moved, sum(2 * d * r * r for d, r in sizes), PRODUCT
    )
    yield Case(
        "refresh_subspaces", layers, refresh, FLOAT * sum(2 * d * r for d, r in sizes),
        sum(4 * d * r * r for d, r in sizes), SOLVE[torch.float32],
    )  # fmt: skip
    for power in POWERS:
        yield Case(
            "invert_cores", f"{layers}, power {power}", invert(power),
            FLOAT * sum(2 * r * r for _, r in sizes), sum(r**3 for _, r in sizes),
            SOLVE[torch.float32],
        )  # fmt: skip


def _tensors(shapes: Shapes, draw: _Draw, dtype: torch.dtype) -> list[list[Tensor]]:
    """Parameters, gradients, averages."""
    parts = [shape for m, k in shapes.layers for shape in ((m, k), (m,))]
    return [
        [draw.normal(*shape, seed=10 * kind + i).to(dtype) for i, shape in enumerate(parts)]
        for kind in (1, 2, 3)
    ]


def _ones(sizes: Sequence[tuple[int, ...]], draw: _Draw, dtype: torch.dtype) -> list[Tensor]:
    """Mean squares of a training under way, by which no rounding is magnified; and counters."""
    return [torch.ones(size, dtype=dtype, device=draw.device) for size in sizes]


def _update(shapes: Shapes, draw: _Draw, normalize: str, *, formed: bool) -> Case:
    """With momentum; P applies here where `formed`."""
    layers = shapes.layers
    count = sum(m * (k + 1) for m, k in layers)
    of_squares: dict[str, list[tuple[int, ...]]] = {
        "rms": [() for _ in layers],
        "row": [(m,) for m, _ in layers],
        "factored": [size for m, k in layers for size in ((m,), (k + 1,))],
        "adam": [size for m, k in layers for size in ((m, k), (m,))],
    }

    def make(dtype: torch.dtype) -> Call:
        params, gradients, averages = _tensors(shapes, draw, dtype)
        squares = _ones(of_squares.get(normalize, []), draw, dtype)
        steps = _ones([()] * len(layers), draw, torch.float32)
        inverses = [draw.inverse(k + 1, dtype) if formed else None for _, k in layers]
        # A growth of a half, and a bound above that.
        rates = _ones([(len(layers), 2)], draw, dtype)[0]
        rates[:, 1] = 1.5

        def call(backend: ModuleType) -> Sequence[Tensor]:
            backend.update_layers_(
                params, gradients, averages, squares, steps, inverses, rates=rates,
                layer_sizes=[2] * len(layers), normalize=normalize, momentum=0.9, **UPDATE,
            )  # fmt: skip
            return [*params, *averages, *squares]

        return call

    # W and m are read and written, D0 is read; so is "adam"'s v.
    words = 5 + (2 if normalize == "adam" else 0)
    flops = 4 * sum(m * (k + 1) * min(shapes.rank, k + 1) for m, k in layers) if formed else 0
    what = f"{normalize}, {'D0 P formed' if formed else 'D given'}"
    return Case("update_layers_", what, make, FLOAT * words * count, flops, PRODUCT)


def _spectral(shapes: Shapes, draw: _Draw) -> Case:
    """Orthogonal steps with P, of all layers but the last, which never takes one."""
    hidden = Shapes(shapes.name, shapes.layers[:-1], shapes.rows, shapes.rank)
    count = sum(m * (k + 1) for m, k in hidden.layers)
    flops = 0.0
    for shape in hidden.layers:
        short, long = sorted(shape)
        # Half of X X' and of A A, and all of the last product.
        flops += len(POLAR_EXPRESS) * (3 * short**2 * long + short**3)

    def make(dtype: torch.dtype) -> Call:
        params, gradients, averages = _tensors(hidden, draw, dtype)
        squares = _ones([(m,) for m, _ in hidden.layers], draw, dtype)
        steps = _ones([()] * len(hidden.layers), draw, torch.float32)
        inverses = [draw.inverse(k + 1, dtype) for _, k in hidden.layers]
        start = [param.clone() for param in params]

        def call(backend: ModuleType) -> Sequence[Tensor]:
            backend.update_spectral_layers_(
                params, gradients, averages, squares, steps, inverses,
                layer_sizes=[2] * len(hidden.layers), momentum=0.9, **UPDATE,
            )  # fmt: skip
            # The change alone, as the tolerance is far above what it is of a weight.
            moved = [param - before for param, before in zip(params, start, strict=True)]
            return [*moved, *averages, *squares]

        return call

    dtype = factor_dtype(torch.empty(0, 0, device=draw.device))
    return Case(
        "update_spectral_layers_", f"{len(hidden.layers)} layers", make, FLOAT * 5 * count, flops,
        ITERATION[dtype], products=dtype == torch.bfloat16,
    )  # fmt: skip


def _measured(shapes: Shapes, draw: _Draw) -> Case:
    """The root mean squares that `max_change` is a share of."""
    count = sum(m * k for m, k in shapes.layers)

    def make(dtype: torch.dtype) -> Call:
        weights = [draw.normal(*shape, seed=7).to(dtype) for shape in shapes.layers]

        def call(backend: ModuleType) -> Sequence[Tensor]:
            results = _ones([()] * len(weights), draw, dtype)
            backend.measure_weights_(weights, results, [1e-3] * len(weights))
            return results

        return call

    what = f"{len(shapes.layers)} layers"
    return Case("measure_weights_", what, make, FLOAT * count, 2 * count, PRODUCT)


def _grown(shapes: Shapes, draw: _Draw) -> Case:
    """How much the mean squares have grown that `max_growth` multiplies rates by."""
    count = sum(m for m, _ in shapes.layers)

    def make(dtype: torch.dtype) -> Call:
        wide = torch.promote_types(dtype, torch.float32)
        squares = [draw.normal(m, seed=8).square().to(wide) for m, _ in shapes.layers]

        def call(backend: ModuleType) -> Sequence[Tensor]:
            growths, slows, steps = (_ones([()] * len(squares), draw, wide) for _ in range(3))
            torch._foreach_mul_(slows, 0.5)
            torch._foreach_mul_(steps, 31.0)
            backend.measure_growths_(
                squares, growths, slows, steps, beta2=0.95, every=10, most=10.0
            )
            return [*growths, *slows]

        return call

    what = f"{len(shapes.layers)} layers"
    return Case("measure_growths_", what, make, FLOAT * count, count, PRODUCT)


def _rounded(shapes: Shapes, draw: _Draw) -> Case:
    """The end of a step of parameters in bfloat16, whatever dtype is asked for."""
    count = sum(m * k for m, k in shapes.layers)

    def make(_: torch.dtype) -> Call:
        values = [draw.normal(*shape, seed=8).float() for shape in shapes.layers]
        steps = _ones([()] * len(values), draw, torch.float32)

        def call(backend: ModuleType) -> Sequence[Tensor]:
            params = [torch.empty_like(value, dtype=torch.bfloat16) for value in values]
            backend.round_params_(params, values, list(range(len(values))), steps)
            return params

        return call

    what = f"{len(shapes.layers)} layers in bfloat16"
    return Case("round_params_", what, make, (FLOAT + 2) * count, 20 * count, PRODUCT)
