"""Classes of other packages that compute what a kind of layer computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from gls_fused.capture.layer import Layer
from gls_fused.capture.linear import LinearLayer, TurnedLinearLayer
from gls_fused.capture.modules import why_not_own

# By what they compute of their weight and bias.
LAYERS: dict[str, type[Layer]] = {
    "linear": LinearLayer,  # F.linear(x, weight, bias)
    "turned linear": TurnedLinearLayer,  # x @ weight + bias
}
# By path, as importing them takes seconds.
KNOWN = {"transformers.pytorch_utils.Conv1D": "turned linear"}


def why_not_alike(base: Any, modules: Sequence[nn.Module]) -> str | None:
    """See `gls_fused.capture.find.Kind`: of `base` and its subclasses that compute the same."""
    return next(filter(None, (why_not_own(module, base.forward) for module in modules)), None)
