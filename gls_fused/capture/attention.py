"""nn.MultiheadAttention: what its input projections see of query, key and value is rows.

Its weights are used by torch.nn.functional: the packed one, [3 e, e], whole in self-attention, and
else in parts. Each product that torch makes with it, or with a part, adds its rows to one Sigma.
Its out_proj is an nn.Linear whose weight is used alike; see `gls_fused.capture.uses`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gls_fused.capture.products import ProductsLayer


class InputProjection(ProductsLayer):
    """The packed weight of query, key and value."""

    kind = "MultiheadAttention"
    weight_key = "in_proj_weight"
    bias_key: str | None = "in_proj_bias"


class QueryProjection(InputProjection):
    """The query's weight, where keys or values have other sizes; the bias is three weights'."""

    weight_key, bias_key = "q_proj_weight", None


class KeyProjection(InputProjection):
    """The key's, as `QueryProjection`."""

    weight_key, bias_key = "k_proj_weight", None


class ValueProjection(InputProjection):
    """The value's, as `QueryProjection`."""

    weight_key, bias_key = "v_proj_weight", None


def why_not_attention(modules: Sequence[nn.Module]) -> str | None:
    """See `gls_fused.capture.find.Kind`."""
    known = {"in_proj_weight", "in_proj_bias"}
    if any(not module._parameters.keys() >= known for module in modules):
        return "its weight or bias is parametrized"
    return None


PROJECTIONS: tuple[type[InputProjection], ...] = (
    InputProjection,
    QueryProjection,
    KeyProjection,
    ValueProjection,
)
