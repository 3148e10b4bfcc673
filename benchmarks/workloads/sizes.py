"""Sizes of the tasks' layers, from which models count bytes and flops without building anything."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.workloads.shapes import VOCABULARY
from benchmarks.workloads.tasks import CLASSES
from benchmarks.workloads.text import CONTEXT
from benchmarks.workloads.transformer import BLOCKS, WIDTH
from gls_fused.capture.rows import SKETCH_ROWS
from gls_fused.curvature.estimate import auto_rank

FLOAT = 4
# Steps from one gathering of GLS's statistics to the next.
GATHER_EVERY = 10
# A parameter's, with torch's fused Adam: p, g, m and v read, p, m and v written.
ADAM_BYTES = 28


def flops_of_factor(short: int, long: int) -> int:
    """Of the orthogonal factor of a matrix on a CPU, in the fewer of two ways, in five steps.

    Of A = X X', A A and other products that are symmetric half is formed: s^2 b + s^3, and 2 s^2 b
    for (b A + c A A) X. Where polynomials of A alone go on, 14 times s^3, and X is formed twice.
    """
    return short**2 * min(15 * long + 5 * short, 6 * long + 14 * short)


@dataclass(frozen=True)
class Layer:
    """A weight [outputs, inputs], and its rows."""

    outputs: int
    inputs: int
    rows: int
    convolution: bool = False
    bias: bool = True

    @property
    def sketched(self) -> int:
        """The rows that the sketch takes."""
        return min(self.rows, SKETCH_ROWS)

    @property
    def dim(self) -> int:
        """Of a row, with the one that a bias appends."""
        return self.inputs + self.bias

    @property
    def parameters(self) -> int:
        return self.outputs * self.dim

    @property
    def rank(self) -> int:
        """As rank="auto" decides."""
        return min(auto_rank(self.outputs), self.dim)

    @property
    def at_backward(self) -> bool:
        """As site="auto" decides."""
        return not self.convolution and self.rows < self.outputs


@dataclass(frozen=True)
class Model:
    """Layers that GLS covers, and the parameters that take Adam's update."""

    title: str
    layers: tuple[Layer, ...]
    others: int = 0

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers) + self.others


def _mlp(title: str, widths: Sequence[int], rows: int) -> Model:
    pairs = itertools.pairwise(widths)
    return Model(title, tuple(Layer(after, before, rows) for before, after in pairs))


def _cnn(batch: int) -> Model:
    """3x32x32 images."""
    return Model(
        "CNN, 2 convolutions and 2 linear layers",
        (
            Layer(16, 75, batch * 1024, convolution=True),
            Layer(32, 400, batch * 256, convolution=True),
            Layer(128, 2048, batch),
            Layer(10, 128, batch),
        ),
    )


def _resnet(batch: int) -> Model:
    """3x32x32 images; batch norm takes Adam's update."""
    width = 40

    def convolution(outputs: int, channels: int, window: int, side: int) -> Layer:
        rows = batch * side * side
        return Layer(outputs, channels * window**2, rows, convolution=True, bias=False)

    layers, norms, before = [convolution(width, 3, 3, 32)], width, width
    for stage in range(3):
        after, side = width * 2**stage, 32 // 2**stage
        for _ in range(2):
            layers += [convolution(after, before, 3, side), convolution(after, after, 3, side)]
            norms += 2 * after
            if before != after:
                layers.append(convolution(after, before, 1, side))
                norms += after
            before = after
    layers.append(Layer(CLASSES, before, batch))
    return Model("Residual network, 15 convolutions", tuple(layers), 2 * norms)


def _character_transformer(batch: int) -> Model:
    """A task's batch of sequences; embeddings and norms take Adam's update."""
    width, rows = WIDTH, batch * CONTEXT
    shapes = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
    layers = [Layer(m, k, rows) for _ in range(BLOCKS) for m, k in shapes]
    layers.append(Layer(VOCABULARY, width, rows))
    others = (VOCABULARY + CONTEXT) * width + (2 * BLOCKS + 1) * 2 * width
    return Model("Character transformer, 4 blocks", tuple(layers), others)


def transformer() -> Model:
    """GPT-2's smallest shape: 12 blocks of width 768, vocabulary 50,257 and 1,024 positions.

    One GPU's step of 8 sequences of 1,024 tokens holds more rows than outputs, so P applies at the
    step, and 1,024 rows are sketched; the embedding, tied to the head, and the norms take Adam's.
    """
    width, rows = 768, 8 * 1024
    shapes = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
    layers = tuple(Layer(m, k, rows) for _ in range(12) for m, k in shapes)
    return Model("Transformer, 124M parameters", layers, (50257 + 1024) * width + 25 * 2 * width)


# The tasks at CIFAR-10's shape, and at the text's, by name, as functions of the batch size.
TASK_MODELS: Mapping[str, Callable[[int], Model]] = {
    "mlp": lambda batch: _mlp("MLP, 3 linear layers", (3072, 1024, 512, 10), batch),
    "cnn": _cnn,
    "autoencoder": lambda batch: _mlp(
        "Autoencoder, 4 linear layers", (3072, 1024, 128, 1024, 3072), batch
    ),
    "resnet": _resnet,
    "transformer": _character_transformer,
}
