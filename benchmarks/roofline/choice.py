"""Whose kernels an op takes on CUDA devices: the launches of both backends, timed by a model.

A launch takes LAUNCH and the longer of its bytes over the memory's bandwidth and its flops over the
peak of its arithmetic; one of fewer blocks than the GPU has multiprocessors reaches their share of
both. What a device has measured stands in the place of that.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.roofline.model import MODELS, TARGETS, Target
from benchmarks.workloads.sizes import FLOAT, Layer, Model
from gls_fused.reference import POLAR_EXPRESS

BACKENDS = ("triton", "native")
# Seconds from the end of a launch to the next one's first block, which reads what it wrote. The
# table is the same from 1 to 5 microseconds, which a test holds.
LAUNCH = 2.5e-6
# Ops of torch's on the device that `reference.blend_subspace` is, and those that choose the rows of
# a sample; a test counts them.
BLEND_OPS, SAMPLE_OPS = 37, 20
# Triton's configs.py: rows of a program that walks d, its tiles of the update, columns of a
# program's sketch and, of a basis, of d. A test compares them.
WALK_ROWS, UPDATE_ROWS, UPDATE_COLUMNS, SKETCH_COLUMNS, BASIS_ROWS = 16, 32, 64, 32, 32
# csrc/cuda: rows of a block of project_kernel, a tile of the update, columns of a block that moves
# a basis, and the most parts of a sketch's rows. Its tables hold all layers of these models.
PROJECT_ROWS, TILE_ROWS, TILE_COLUMNS, MOVE_COLUMNS, GRAM_PARTS = 32, 64, 128, 128, 128
# Steps of Newton's method for the core's root, each of four products.
ROOT_STEPS, ROOT_PRODUCTS = 20, 4


@dataclass(frozen=True)
class Launch:
    """One launch; `products` are flops of bfloat16 products, `wide` of float64 ones."""

    bytes: float = 0
    flops: float = 0
    blocks: float = math.inf
    products: float = 0
    wide: float = 0

    def seconds(self, target: Target, launch: float = LAUNCH) -> float:
        """Its own and what it takes to start."""
        return launch + self.work(target)

    def work(self, target: Target) -> float:
        """Its own."""
        computing = self.flops / target.flops + self.products / target.products
        computing += self.wide / target.doubles
        share = min(1.0, self.blocks / target.processors)
        return max(self.bytes / target.bandwidth, computing) / share


Launches = list[Launch]
# Of all layers of a model, whose parameters and rows have elements of so many bytes.
Op = Callable[[Model, int], Launches]


def _rows(layer: Layer) -> tuple[int, int]:
    return layer.sketched, layer.inputs


def _weight(layer: Layer) -> tuple[int, int]:
    return layer.outputs, layer.inputs


def _product(sizes: Callable[[Layer], tuple[int, int]]) -> tuple[Op, Op]:
    """X P of a matrix for each layer; the same with either backend."""

    def triton(model: Model, width: int) -> Launches:
        found = []
        for layer in _by_rows(model):
            (n, k), r = sizes(layer), layer.rank
            flops = 4 * n * k * r + 2 * n * r**2
            found.append(Launch(3 * width * n * k, flops, math.ceil(n / WALK_ROWS)))
        return found

    def native(model: Model, width: int) -> Launches:
        found = []
        for layer in _by_rows(model):
            (n, k), r = sizes(layer), layer.rank
            tiles = math.ceil(n / TILE_ROWS) * math.ceil(k / TILE_COLUMNS)
            found += [_project(n, k, r, width), Launch(2 * width * n * k, 2 * n * k * r, tiles)]
        return found

    return triton, native


def _project(n: int, k: int, r: int, width: int) -> Launch:
    """X U in parts of the columns, each times C."""
    rows = math.ceil(n / PROJECT_ROWS)
    parts = min(64, math.ceil(k / 512), math.ceil(128 / rows))
    flops = 2 * n * k * r + 2 * parts * n * r**2
    return Launch(width * n * k + FLOAT * parts * n * r, flops, rows * parts)


def _sketch_triton(model: Model, width: int) -> Launches:
    """`sum_rows`, which samples and adds, too."""
    found = []
    for layer in _by_rows(model):
        n, k, r = layer.sketched, layer.inputs, layer.rank
        blocks, parts = math.ceil(n / WALK_ROWS), min(64, max(1, n // 512))
        found += [
            Launch(width * n * k + FLOAT * n * r, 2 * n * k * r + 2 * n * r**2, blocks),
            Launch(width * n * k, 2 * n * k * r, math.ceil(k / SKETCH_COLUMNS) * parts),
        ]
    return found


def _sketch_native(model: Model, width: int) -> Launches:
    """`add_sketch_`, into sums that begin as zeros, of a sample that torch's ops make."""
    found = []
    for layer in _by_rows(model):
        n, k, r = layer.sketched, layer.inputs, layer.rank
        parts = min(GRAM_PARTS, math.ceil(n / PROJECT_ROWS))
        if layer.rows > layer.sketched:
            found += [*[Launch()] * SAMPLE_OPS, Launch(2 * width * n * k), Launch(8 * k * r)]
        found += [
            _project(n, k, r, width),
            Launch(FLOAT * n * r, 2 * n * r**2, parts),
            *[Launch((width + FLOAT) * n * k)] * (width < FLOAT),
            Launch(FLOAT * n * k, 2 * n * k * r),
            Launch(FLOAT * k * r),
            Launch(FLOAT * (2 * k * r + parts * r**2)),
        ]
    return found


def _blend_triton(model: Model, width: int) -> Launches:
    return [Launch(3 * FLOAT * _basis_size(model))] * _padded_ranks(model)


def _blend_native(model: Model, width: int) -> Launches:
    return [Launch(FLOAT * layer.dim * layer.rank) for layer in model.layers] * BLEND_OPS


def _commit_triton(model: Model, width: int) -> Launches:
    """Three passes over d; in the second a layer's last program does what is the layer's."""
    blocks = sum(math.ceil(layer.dim / BASIS_ROWS) for layer in model.layers)
    squares = 2 * sum(layer.dim * layer.rank**2 for layer in model.layers)
    moved = 8 * _basis_size(model)
    second = Launch(moved, blocks=len(model.layers), wide=squares + _roots(model))
    return [Launch(moved, blocks=blocks, wide=squares), second, Launch(moved, blocks=blocks)]


def _commit_native(model: Model, width: int) -> Launches:
    """Blended by torch's ops; mu taken off, and results copied into the states."""
    rest = [Launch()] * (2 * len(model.layers)) + [Launch(8 * _basis_size(model))]
    parts = (_blend_native, _refresh_native, _invert_native)
    return [*(launch for part in parts for launch in part(model, width)), *rest]


def _refresh(model: Model, columns: int, calls: int) -> Launches:
    """Three passes over d, and two launches of a block to a layer between them."""
    blocks = sum(math.ceil(layer.dim / columns) for layer in model.layers)
    squares = sum(layer.dim * layer.rank**2 for layer in model.layers)
    cubes = sum(layer.rank**3 for layer in model.layers)
    pass_ = Launch(8 * _basis_size(model) / calls, 0, blocks / calls, wide=2 * squares / calls)
    factor = Launch(0, 0, len(model.layers) / calls, wide=2 * cubes / calls)
    return [pass_, factor, pass_, factor, pass_] * calls


def _refresh_triton(model: Model, width: int) -> Launches:
    return _refresh(model, BASIS_ROWS, _padded_ranks(model))


def _refresh_native(model: Model, width: int) -> Launches:
    return _refresh(model, MOVE_COLUMNS, 1)


def _invert_triton(model: Model, width: int) -> Launches:
    calls = _padded_ranks(model)
    work, blocks = _roots(model) / calls, len(model.layers) / calls
    return [Launch(blocks=blocks, wide=work)] * calls


def _invert_native(model: Model, width: int) -> Launches:
    """Halves of symmetric products, in float32."""
    return [Launch(flops=_roots(model) / 2, blocks=len(model.layers))]


def _roots(model: Model) -> float:
    return sum(ROOT_STEPS * ROOT_PRODUCTS * 2 * layer.rank**3 for layer in model.layers)


def _update(model: Model, width: int, rows: int, columns: int) -> Launches:
    """Of "factored" with momentum, D formed: T, squares, their blending, the step."""
    count = sum(layer.parameters for layer in model.layers)
    tiles = sum(
        math.ceil(layer.outputs / rows) * math.ceil(layer.inputs / columns)
        for layer in model.layers
    )
    flops = sum(2 * layer.parameters * layer.rank for layer in model.layers)
    moved = [width * count, width * count, (3 * width + 2 * FLOAT) * count]
    project, square, step = (Launch(x, flops, tiles) for x in moved)
    return [project, square, Launch(), step]


def _update_triton(model: Model, width: int) -> Launches:
    """T in a launch of WALK_ROWS to a program; the squares too where that is `walks_twice`."""
    project, square, *rest = _update(model, width, UPDATE_ROWS, UPDATE_COLUMNS)
    blocks = sum(math.ceil(layer.outputs / WALK_ROWS) for layer in model.layers)
    if blocks >= 128 or max(layer.inputs for layer in model.layers) <= 2048:
        return [Launch(project.bytes, project.flops + square.flops, blocks), *rest]
    return [Launch(project.bytes, project.flops, blocks), square, *rest]


def _update_native(model: Model, width: int) -> Launches:
    return _update(model, width, TILE_ROWS, TILE_COLUMNS)


def _orthogonal(model: Model, symmetric: float) -> Launches:
    """Five steps of three products for all weights of a shape; a share of two of them is needed."""
    shapes = {tuple(sorted(_weight(layer))) for layer in model.layers}
    found = []
    for short, long in shapes:
        count = sum(tuple(sorted(_weight(layer))) == (short, long) for layer in model.layers)
        products = [symmetric * 2 * short**2 * long, symmetric * 2 * short**3, 2 * short**2 * long]
        moved = [2 * short * long, 4 * short**2, 4 * short * long]
        found += [
            Launch(count * a, products=count * b) for a, b in zip(moved, products, strict=True)
        ]
    return found * len(POLAR_EXPRESS)


def _orthogonal_triton(model: Model, width: int) -> Launches:
    return _orthogonal(model, 0.5)


def _orthogonal_native(model: Model, width: int) -> Launches:
    return _orthogonal(model, 1)


def _basis_size(model: Model) -> int:
    return sum(layer.dim * layer.rank for layer in model.layers)


def _padded_ranks(model: Model) -> int:
    """Triton's launches are of layers whose ranks are padded to 16 or to 32."""
    return len({layer.rank > 16 for layer in model.layers})


def _by_rows(model: Model) -> list[Layer]:
    """Whose sketch, and product with rows, is not torch's own convolution."""
    return [layer for layer in model.layers if not layer.convolution]


# Of Triton, and of the C++ kernels.
OPS: Mapping[str, tuple[Op, Op]] = {
    "precondition_rows": _product(_rows),
    "precondition_gradient": _product(_weight),
    "sketch_rows": (_sketch_triton, _sketch_native),
    "blend_subspaces": (_blend_triton, _blend_native),
    "commit_subspaces_": (_commit_triton, _commit_native),
    "refresh_subspaces": (_refresh_triton, _refresh_native),
    "invert_cores": (_invert_triton, _invert_native),
    "update_layers_": (_update_triton, _update_native),
    "orthogonal_updates": (_orthogonal_triton, _orthogonal_native),
}


@dataclass(frozen=True)
class Decision:
    """Whose kernels an op takes.

    Attributes:
        ratio: the time of the native backend to Triton's.
        why: where the ratio is from.
    """

    op: str
    ratio: float
    why: str

    @property
    def backend(self) -> str:
        return "native" if self.ratio < 1 else "triton"


@dataclass(frozen=True)
class Measured:
    """What a GPU has shown of the ops.

    Attributes:
        seconds: by op, case and backend.
    """

    gpu: str
    seconds: Mapping[str, Mapping[str, Mapping[str, float]]]

    @classmethod
    def of(cls, results: Mapping[str, Any]) -> Measured:
        """Of results.json of device_check.sh.

        Raises:
            ValueError: they are of a dry run, which measures nothing.
        """
        if results["dry_run"]:
            raise ValueError("a dry run measures nothing")
        tables = {
            name: part["result"]["tables"]
            for name, part in results["parts"].items()
            if name in ("environment", "kernels")
        }
        facts = {row["what"]: row["value"] for row in tables["environment"]["Machine"]}
        seconds: dict[str, dict[str, dict[str, float]]] = {}
        for row in tables["kernels"]["Kernels"]:
            cases = seconds.setdefault(row["op"], {})
            cases.setdefault(f"{row['layers']}: {row['of']}", {})[row["backend"]] = row["µs"]
        return cls(facts["device"], seconds)

    def ratio(self, op: str) -> float | None:
        """The native backend's to Triton's, over the cases of both; None where there is none."""
        cases = self.seconds.get(op, {}).values()
        ratios = [case["native"] / case["triton"] for case in cases if len(case) == 2]
        return statistics.geometric_mean(ratios) if ratios else None


def decide(measured: Measured | None = None, launch: float = LAUNCH) -> list[Decision]:
    """For every op: by what was measured of both backends, or else by the model."""
    found = []
    for op in OPS:
        ratio = None if measured is None else measured.ratio(op)
        if measured is not None and ratio is not None:
            found.append(Decision(op, ratio, f"measured on {measured.gpu}"))
            continue
        ratio = model_ratio(op, launch)
        found.append(Decision(op, ratio, f"modelled: {_reason(op, ratio < 1)}"))
    return found


def model_ratio(op: str, launch: float = LAUNCH, widths: Iterable[int] = (4, 2)) -> float:
    """The native backend's time to Triton's: the geometric mean over models, GPUs and dtypes."""
    ratios = []
    for model, target, width in itertools.product(MODELS, TARGETS, widths):
        triton, native = (
            sum(x.seconds(target, launch) for x in make(model, width)) for make in OPS[op]
        )
        if triton:
            ratios.append(native / triton)
    return statistics.geometric_mean(ratios)


def count_launches(op: str, model: Model) -> tuple[int, int]:
    """Of Triton's, and of the C++ kernels."""
    triton, native = (len(make(model, FLOAT)) for make in OPS[op])
    return triton, native


def _reason(op: str, native: bool) -> str:
    """What of the choice is better: the number of launches, or what a launch takes."""
    counts = (count_launches(op, model) for model in MODELS)
    triton, cpp = map(sum, zip(*counts, strict=True))
    chosen, other = (cpp, triton) if native else (triton, cpp)
    return "fewer launches" if chosen < other else "launches that take less time"


def render(decisions: Iterable[Decision]) -> str:
    """gls_fused/backends/choices.py."""
    lines = "".join(f'    "{x.op}": ("{x.backend}", {json.dumps(x.why)}),\n' for x in decisions)
    return f'''"""Whose kernels an op takes on CUDA devices that both have kernels for, and why.

Written by `python -m benchmarks roofline --choose`; docs/backends.md says from what.
"""

CHOICES: dict[str, tuple[str, str]] = {{
{lines}}}
'''
