"""What a step must move and compute on a GPU: a model from data sheets, nothing of it measured.

Bytes count each operand once per pass over it; a basis and small matrices stay in L2. Launches are
those of the Triton backend. A floor is the longer of bytes over the memory's bandwidth and flops
over the peak of float32 without tensor cores, which the kernels' "ieee" products use, or of
bfloat16 with them, which orthogonal factors use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.workloads.sizes import (
    ADAM_BYTES,
    FLOAT,
    GATHER_EVERY,
    TASK_MODELS,
    Layer,
    Model,
    transformer,
)
from gls_fused.curvature.estimate import AUTO_RANK
from gls_fused.reference import POLAR_EXPRESS

RANK = AUTO_RANK
BATCH = 128
MODELS = (*(model(BATCH) for model in TASK_MODELS.values()), transformer())
# torch's fused Adam: launches of at most 320 blocks of 65,536 elements
# (ATen/native/cuda/MultiTensorApply.cuh), and one for the step counters.
ADAM_ELEMENTS_PER_LAUNCH = 320 * 65536
# Of all layers at the end of a gathering step: the estimates in three, and what is measured.
COMMIT_LAUNCHES = 4
# torch's ops that make the bounds of all layers' rates, and the one that fills in the number of the
# next sample.
BOUND_OPS, SAMPLE_OPS = 2, 1
# Rows of D0 that a program of the update walks, and when it does so twice: `walks_twice` of
# gls_fused.backends.triton.configs, which is not imported as it needs Triton.
WALKED_ROWS, LEAST_WALKS, MOST_COLUMNS = 16, 128, 2048


@dataclass(frozen=True)
class Target:
    """A GPU's data-sheet figures: bytes per second, flops per second of float32 without tensor
    cores, of dense bfloat16 products with them, and of float64 without, and multiprocessors.
    """

    name: str
    bandwidth: float
    flops: float
    products: float
    doubles: float
    processors: int
    source: str


TARGETS = (
    Target(
        "A100 SXM 80 GB",
        2.039e12,
        19.5e12,
        312e12,
        9.7e12,
        108,
        "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/"
        "nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf",
    ),
    Target("H100 SXM", 3.35e12, 67e12, 989e12, 34e12, 132, "NVIDIA H100 data sheet, 2023"),
    # 7,680 bits at 3,996 MHz, as the driver says; data sheets round 7.67 TB/s to 7.7 or to 8.
    Target(
        "B200 (of HGX B200)",
        7.672e12,
        75e12,
        2250e12,
        37e12,
        148,
        "NVIDIA HGX B200 data sheet, 2025; bandwidth: https://github.com/pytorch/ao/pull/4002",
    ),
)


@dataclass(frozen=True)
class Cost:
    """Of one or several launches; `products` are flops of bfloat16 products."""

    bytes: float
    flops: float
    launches: float
    products: float = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.bytes + other.bytes,
            self.flops + other.flops,
            self.launches + other.launches,
            self.products + other.products,
        )

    def __mul__(self, share: float) -> Cost:
        parts = (self.bytes, self.flops, self.launches, self.products)
        return Cost(*(share * part for part in parts))

    def floor(self, target: Target) -> float:
        """Seconds, at the least."""
        computing = self.flops / target.flops + self.products / target.products
        return max(self.bytes / target.bandwidth, computing)


NOTHING = Cost(0, 0, 0)


def precondition(rows: int, inputs: int, rank: int = RANK) -> Cost:
    """X P of [rows, inputs]: X read in two walks, the product written."""
    return Cost(12 * rows * inputs, 4 * rows * inputs * rank + 2 * rows * rank**2, 1)


def sketch(rows: int, inputs: int, rank: int = RANK) -> Cost:
    """Y'Y, A'Y, ||A||^2: A read twice, Y written and read, A'Y written; parts of both, too.

    The patches of images are counted one by one, as they hardly overlap where they are a sample.
    """
    splits, heads = min(64, max(1, rows // 512)), min(256, math.ceil(rows / 16))
    moved = 2 * rows * inputs + 2 * rows * rank + inputs * rank
    moved += 2 * heads * rank * (rank + 1) + 2 * splits * inputs * rank * (splits > 1)
    return Cost(FLOAT * moved, 4 * rows * inputs * rank + 2 * rows * rank**2, 2)


def refresh(inputs: int, rank: int = RANK) -> Cost:
    """Over Z, in float64 between, by the op alone."""
    return Cost(FLOAT * 5 * inputs * rank, 8 * inputs * rank**2, 5)


def commit(layer: Layer) -> Cost:
    """U and the sums read, Z and Q written and read, U written; parts of Z'Z and Q'Q in float64,
    one for 32 of d; W read for its root mean square. The launches are those of all layers.
    """
    basis = layer.dim * layer.rank
    parts = 2 * 2 * 8 * layer.rank**2 * layer.dim / 32
    moved = FLOAT * (7 * basis + layer.parameters) + parts
    return Cost(moved, 10 * basis * layer.rank, 0)


def update(parameters: int, *, walks: bool, momentum: bool = True) -> Cost:
    """normalize="factored" of D formed at the step: D's squares, their blending, then the update.

    T first, but where rows are walked twice: there D0 comes from L2 for the squares. Sums of
    squares are written and read once each, one for 64 elements of a row and for 32 of a column;
    where rows are walked one for 16 of a column.
    """
    sums = 2 / 16 if walks else 2 / 64 + 2 / 32
    words = 4 + sums + (2 if momentum else 0) + (not walks)
    flops = 14 * parameters + 6 * parameters * RANK
    return Cost(FLOAT * words * parameters, flops, 3 if walks else 4)


def walks_twice(layers: Sequence[Layer]) -> bool:
    """Whether the update of the layers walks rows twice."""
    programs = sum(math.ceil(layer.outputs / WALKED_ROWS) for layer in layers)
    return programs >= LEAST_WALKS or max(layer.inputs for layer in layers) <= MOST_COLUMNS


def orthogonal_step(layer: Layer) -> Cost:
    """What "spectral" takes in the place of `update`, with P at the step.

    In float32: D formed (D0 read twice, D written), m, N, their stack, its norm and its bfloat16
    copy, the update as float32, W. In bfloat16 five times: X read for A, and read and written for
    a X + R X; the small A and R stay in L2.
    """
    short, long = sorted((layer.outputs, layer.inputs))
    around = 12 + 12 + 12 + 8 + 4 + 6 + 6 + 12
    each = around + len(POLAR_EXPRESS) * 3 * 2
    # Half of X X' and of A A, and all of the last product.
    products = len(POLAR_EXPRESS) * (3 * short**2 * long + short**3)
    return Cost(each * layer.parameters, (6 * layer.rank + 12) * layer.parameters, 8, products)


def forward_and_backward(layer: Layer, rows: int) -> Cost:
    """Three products of bfloat16; inputs, outputs and their gradients, and the weight three times.

    The least that they can be: no attention, no activation.
    """
    moved = 2 * (3 * layer.parameters + 3 * rows * (layer.inputs + layer.outputs))
    return Cost(moved, 0, 3, 6 * rows * layer.outputs * layer.inputs)


def adam(parameters: int) -> Cost:
    """torch's fused Adam."""
    launches = 1 + math.ceil(parameters / ADAM_ELEMENTS_PER_LAUNCH)
    return Cost(ADAM_BYTES * parameters, 12 * parameters, launches)


def gls_step(model: Model, *, momentum: bool = True) -> dict[str, Cost]:
    """The pieces of GLS's step with its defaults, statistics spread over the steps between.

    On a GPU P acts at the step.
    """
    share = 1 / GATHER_EVERY
    pieces = dict.fromkeys(("statistics", "update", "others"), NOTHING)
    for layer in model.layers:
        gathered = sketch(layer.sketched, layer.inputs, layer.rank)
        pieces["statistics"] += (gathered + commit(layer)) * share
    pieces["statistics"] += Cost(0, 0, COMMIT_LAUNCHES + SAMPLE_OPS) * share
    count = sum(layer.parameters for layer in model.layers)
    pieces["update"] = update(count, walks=walks_twice(model.layers), momentum=momentum)
    pieces["update"] += Cost(0, 0, BOUND_OPS)
    if model.others:
        # By a kernel of ours, in one launch.
        moved = adam(model.others)
        pieces["others"] = Cost(moved.bytes, moved.flops, 1)
    return pieces


def total(pieces: Sequence[Cost]) -> Cost:
    """All of them."""
    return sum(pieces, NOTHING)
