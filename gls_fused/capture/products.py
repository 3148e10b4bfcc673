"""Weights that the forward of their own module multiplies with its inputs, beside other things.

The module is watched as one that uses the weight of another; see `gls_fused.capture.uses`. So are
nn.MultiheadAttention's projections (`gls_fused.capture.attention`), the routers of transformers'
mixtures of experts, and classes that `gls_fused.register` has been told of.
"""

from __future__ import annotations

from torch import nn

from gls_fused.capture.linear import LinearLayer
from gls_fused.capture.modules import plain_class


class ProductsLayer(LinearLayer):
    """A weight [m, k]. A bias is no part of it, as it may be added to something else."""

    kind = "products"
    own_op = False
    bias_key: str | None = None
    missed = "its module's forward multiplies no rows with it that are seen"


class TurnedProductsLayer(ProductsLayer):
    """A weight [k, m]."""

    kind = "turned products"
    turned = True


# Of classes that `register_products` has been told of, whether a weight is [k, m].
_REGISTERED: dict[type[nn.Module], bool] = {}


def register_products(module_class: type[nn.Module], *, turned: bool) -> None:
    """See `gls_fused.register`."""
    _REGISTERED[module_class] = turned


def products_layer(module: nn.Module, role: str) -> type[ProductsLayer] | None:
    """The kind of layer that a parameter of this name is, of a module that multiplies it itself."""
    param = module._parameters.get(role)
    if param is None or param.ndim != 2:
        return None
    for base in plain_class(module).__mro__:
        if base in _REGISTERED:
            return TurnedProductsLayer if _REGISTERED[base] else ProductsLayer
        of_transformers = base.__module__.startswith("transformers.models.")
        if of_transformers and base.__qualname__.lower().endswith("topkrouter"):
            return ProductsLayer
    return None
