"""Which layers take an orthogonal step, and what its factor costs.

    "spectral"  all but the last covered layer of the model, which is most often its head: what
                Muon's author found to train better with a scale per element. `spectral_head` of
                its group says otherwise. A head that is tied to an embedding counts as last. Nor do
                grouped convolutions and recurrent layers, whose weights are no one matrix.
    "auto"      of these, the layers whose factor takes at most `spectral_share` of the flops of
                their forward and backward for the rows they saw in their first step, and whose
                shorter side is `LEAST_SIDE` or more: narrower ones, as low-rank adapters, train
                better with scales. So do linear layers, and convolutions of one tap, where nothing
                in the model normalises activations: physics-informed nets, coordinate networks.

The others take the step of "factored".
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from gls_fused.capture.layer import Layer
from gls_fused.curvature.estimate import State
from gls_fused.reference import POLAR_EXPRESS

# The default of `spectral_share`.
MOST_SHARE = 0.33
LEAST_SIDE = 16


def normalize_of(layer: Layer, state: State, group: Mapping[str, Any]) -> str:
    """How a layer with statistics is scaled: what its group asks for, "auto" and heads resolved."""
    asked: str = group["normalize"]
    if asked not in ("spectral", "auto"):
        return asked
    if _keeps_scale(layer, group):
        return "factored"
    if asked == "auto" and not _pays(layer, state.get("rows", 0), group):
        return "factored"
    return "spectral"


def kept_by(layer: Layer, group: Mapping[str, Any]) -> str:
    """Whose mean squares a layer's state has, which is known before its first step."""
    asked: str = group["normalize"]
    return "factored" if asked == "spectral" and _keeps_scale(layer, group) else asked


def _keeps_scale(layer: Layer, group: Mapping[str, Any]) -> bool:
    return not layer.one_matrix or (layer.last and not group["spectral_head"])


def _pays(layer: Layer, rows: int, group: Mapping[str, Any]) -> bool:
    split = group["split"]
    narrow = min(layer.outputs // split, layer.size) < LEAST_SIDE
    plain = layer.pointwise and not layer.found.normalized
    return not (narrow or plain) and factor_share(layer, rows, split) <= group["spectral_share"]


def factor_share(layer: Layer, rows: int, split: int) -> float:
    """Flops of the orthogonal factor over those of the layer's forward and backward.

    A step of the iteration takes 2 s^2 b for A = X X', 2 s^3 for A A and 2 s^2 b for the last
    product, for the shorter side s and the longer b; forward and backward take 6 n m k, less what
    rows have of zeros between pixels. A stack has a factor for each of its matrices, and n is the
    rows of all.
    """
    filled = rows * layer.filled
    return _factor_share(layer.outputs, layer.size, layer.blocks or 1, filled, split)


@functools.cache
def _factor_share(outputs: int, inputs: int, blocks: int, rows: float, split: int) -> float:
    short, long = sorted((outputs // split, inputs))
    factor = blocks * split * len(POLAR_EXPRESS) * (4 * short**2 * long + 2 * short**3)
    return factor / max(1, 6 * rows * outputs * inputs)
