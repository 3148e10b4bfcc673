"""Which layers of a model GLS covers, and why it does not cover the rest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from gls_fused.capture.attention import PROJECTIONS, why_not_attention
from gls_fused.capture.conv import (
    CONVOLUTIONS,
    TRANSPOSED,
    ConvLayer,
    ConvTransposeLayer,
    why_not_conv,
)
from gls_fused.capture.custom import ObservedLayer, TurnedObservedLayer, why_not_observed
from gls_fused.capture.derived import Place, source_of
from gls_fused.capture.experts import (
    ExpertsLayer,
    bias_key_of,
    known_experts,
    register_experts,
    why_not_experts,
)
from gls_fused.capture.layer import PLAIN, Found, Layer
from gls_fused.capture.lending import Lender
from gls_fused.capture.linear import LinearLayer, TurnedLinearLayer, why_not_linear
from gls_fused.capture.modules import ALIKE, describe_class, plain_class
from gls_fused.capture.products import products_layer, register_products
from gls_fused.capture.reads import normalizes
from gls_fused.capture.recurrent import RecurrentLayer, why_not_recurrent
from gls_fused.capture.standardized import SamePaddedConv2dLayer, StandardizedConv2dLayer
from gls_fused.distributed.sharding import is_sharded, sharding_problem

# What torch.compile and activation checkpointing put into the names of what they wrap.
WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}
# Their gradients have no rows to see. A head that shares the weight has.
TABLES = (nn.Embedding, nn.EmbeddingBag)

# A module's name, the module, and what the parameter is called there.
Use: TypeAlias = tuple[str, nn.Module, str]


class Kind(NamedTuple):
    """What covers the modules of a class and of its subclasses.

    Attributes:
        layer: of the modules that share a weight.
        why_not: why it cannot cover the modules that share a weight, all of this kind, or None.
        bias: the name of the parameter that is the bias, or None.
    """

    layer: type[Layer]
    why_not: Callable[[Sequence[nn.Module]], str | None]
    bias: str | None = "bias"


# The class that stands first among a module's bases decides.
KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: Kind(LinearLayer, why_not_linear),
    **dict.fromkeys(CONVOLUTIONS, Kind(ConvLayer, why_not_conv)),
    **dict.fromkeys(TRANSPOSED, Kind(ConvTransposeLayer, why_not_conv)),
}
# Of modules with weights of other names than "weight", by the name.
PARTS: dict[type[nn.Module], dict[str, Kind]] = {
    nn.MultiheadAttention: {
        layer.weight_key: Kind(layer, why_not_attention, layer.bias_key) for layer in PROJECTIONS
    },
}
# Theirs have the layer's number in their names.
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
OWN: frozenset[Any] = frozenset(
    {*KINDS, *PARTS, nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell}
)

# What `register` takes: a kind, and what its classes are subclasses of.
ALIKE_KINDS: dict[str, tuple[Kind, type[nn.Module]]] = {
    "linear": (KINDS[nn.Linear], nn.Module),
    "turned linear": (Kind(TurnedLinearLayer, why_not_linear), nn.Module),
    "conv1d": (KINDS[nn.Conv1d], nn.Conv1d),
    "conv2d": (KINDS[nn.Conv2d], nn.Conv2d),
    "conv3d": (KINDS[nn.Conv3d], nn.Conv3d),
    "observed": (Kind(ObservedLayer, why_not_observed), nn.Module),
    "turned observed": (Kind(TurnedObservedLayer, why_not_observed), nn.Module),
}
# The others that `register` takes: who is told, and whether a matrix is [inputs, outputs].
OTHER_KINDS: dict[str, tuple[Callable[..., None], bool]] = {
    "products": (register_products, False),
    "turned products": (register_products, True),
    "experts": (register_experts, False),
    "turned experts": (register_experts, True),
}
KNOWN_KINDS = {
    **ALIKE_KINDS,
    "standardized conv2d": (Kind(StandardizedConv2dLayer, why_not_conv), nn.Conv2d),
    "same-padded conv2d": (Kind(SamePaddedConv2dLayer, why_not_conv), nn.Conv2d),
}
# Classes of other packages by their path, as importing them takes seconds.
KNOWN = {
    "diffusers.models.autoencoders.autoencoder_kl_cogvideox.CogVideoXSafeConv3d": "conv3d",
    "timm.layers.conv2d_same.Conv2dSame": "same-padded conv2d",
    "timm.layers.linear.Linear": "linear",
    "timm.layers.std_conv.ScaledStdConv2d": "standardized conv2d",
    "timm.layers.std_conv.ScaledStdConv2dSame": "standardized conv2d",
    "timm.layers.std_conv.StdConv2d": "standardized conv2d",
    "timm.layers.std_conv.StdConv2dSame": "standardized conv2d",
    "torch_geometric.nn.dense.linear.Linear": "linear",
    "transformers.models.bit.modeling_bit.WeightStandardizedConv2d": "standardized conv2d",
    "transformers.models.falcon.modeling_falcon.FalconLinear": "linear",
    "transformers.pytorch_utils.Conv1D": "turned linear",
}


class Uncovered(NamedTuple):
    """A parameter that no layer owns."""

    name: str
    param: Tensor
    reason: str


class _Contents(NamedTuple):
    """What some modules hold.

    Attributes:
        users: by a parameter's id, who uses it.
        params: by their id.
        holders: by a module's id, the modules that hold it.
        normalized: whether one of them normalises activations.
    """

    users: dict[int, list[Use]]
    params: dict[int, nn.Parameter]
    holders: dict[int, list[nn.Module]]
    normalized: bool


def find_layers(
    roots: Iterable[tuple[str, nn.Module]], trained: Container[Tensor] | None = None
) -> tuple[list[Layer], list[Uncovered]]:
    """The layers GLS covers below these modules, and why it does not cover the rest.

    Args:
        roots: modules, with a prefix for the names of what is in them.
        trained: the parameters that are asked for; None for all.
    """
    contents = _read(roots)
    layers: list[Layer] = []
    owned: set[int] = set()
    reasons: dict[int, tuple[str, str]] = {}
    # Heads last, wherever a model defines its embedding: the last layer keeps its scale.
    uses_of, tables = _set_tables_apart(contents.users)
    for key, uses in sorted(uses_of.items(), key=lambda item: item[0] in tables):
        names, modules, roles = zip(*uses, strict=True)
        param = contents.params[key]
        if "weight" not in roles and not any(map(kind_of, modules, roles)):
            continue
        if isinstance(param, UninitializedParameter):
            continue
        if trained is not None and param not in trained:
            continue
        problem = _problem_of(param, modules, roles)
        if problem is None:
            layer = _make_layer(contents, uses, tables.get(key), trained)
            layers.append(layer)
            owned.update(map(id, layer.params))
            continue
        if len(contents.users[key]) > 1:
            names, _, roles = zip(*contents.users[key], strict=True)
            problem = f"shared by {', '.join(names)}: {problem}"
        reasons[key] = (_join(names[0], roles[0]), problem)

    uncovered = []
    for key, ((name, module, role), *_) in contents.users.items():
        param = contents.params[key]
        if key not in owned and (trained is None or param in trained):
            name, why = reasons.get(key) or (_join(name, role), _reason(module, role, param))
            uncovered.append(Uncovered(name, param, why))
    return layers, uncovered


def _read(roots: Iterable[tuple[str, nn.Module]]) -> _Contents:
    users: dict[int, list[Use]] = {}
    params: dict[int, nn.Parameter] = {}
    holders: dict[int, list[nn.Module]] = {}
    derived: set[Place] = set()
    seen: set[int] = set()
    normalized = False
    for root_name, root in roots:
        for name, module in root.named_modules(prefix=root_name):
            if id(module) in seen:
                continue
            seen.add(id(module))
            normalized = normalized or normalizes(plain_class(module))
            source = source_of(module)
            if source is not None and source.param is not None and kind_of(module) is not None:
                # What the module makes of it is its weight.
                params[id(source.param)] = source.param
                users.setdefault(id(source.param), []).append((plain_name(name), module, "weight"))
                derived.add(source)
            for key, param in module._parameters.items():
                if param is not None and (module, key) not in derived:
                    params[id(param)] = param
                    users.setdefault(id(param), []).append((plain_name(name), module, key))
            for child in module._modules.values():
                # Not its truth value, which torch.compile's modules do not have.
                if child is not None:
                    holders.setdefault(id(child), []).append(module)
    return _Contents(users, params, holders, normalized)


def _make_layer(
    contents: _Contents, uses: Sequence[Use], table: str | None, trained: Container[Tensor] | None
) -> Layer:
    """The layer of a weight that these use, with its bias where that belongs to it.

    Args:
        table: that looks the same weight up.
    """
    names, modules, roles = zip(*uses, strict=True)
    kind = kind_of(modules[0], roles[0])
    assert kind is not None
    biases = {id(bias): bias for bias in (_bias_of(module, kind) for module in modules)}
    # A bias belongs to the layer when it is used exactly where the weight is.
    bias = next(iter(biases.values())) if len(biases) == 1 else None
    if bias is not None and len(contents.users[id(bias)]) != len(uses):
        bias = None
    if bias is not None and trained is not None and bias not in trained:
        bias = None
    name = names[0]
    if roles[0] != "weight":
        name = _join(name, roles[0].removesuffix("_weight"))
    found = Found(name, list(modules), roles[0], bias, table, contents.normalized)
    layer = kind.layer(found)
    if bias is not None and bias.shape != (*layer.stack, layer.outputs):
        # One that is spread over the outputs, or lies otherwise, has an equation of its own.
        layer = kind.layer(found._replace(bias=None))
    if isinstance(layer, Lender):
        layer.find_holders(contents.holders)
    return layer


def _problem_of(param: Tensor, modules: Sequence[nn.Module], roles: Sequence[str]) -> str | None:
    """Why GLS does not cover a weight that these modules use by these names, or None if it does."""
    problem = next((why for why in map(_uncovered, modules, roles) if why), None)
    if problem is not None:
        return problem
    if len({plain_class(module) for module in modules}) > 1:
        return "its weight is shared by modules of different kinds"
    kind = kind_of(modules[0], roles[0])
    problem = None if kind is None else kind.why_not(modules)
    if problem is not None:
        return problem
    if kind is None or any(role != roles[0] for role in roles):
        return "its weight is used in two roles"
    if kind.layer.turned and any(map(source_of, modules)):
        # Each input has a length of its own, which the inputs' Sigma does not know of.
        return "its norm is of its inputs, not of its outputs"
    if not param.numel():
        return "its weight is empty"
    if param.is_complex():
        return "its weight is complex"
    bias = _bias_of(modules[0], kind)
    for role, own in (("weight", param), ("bias", bias)):
        if own is not None and not is_sharded(own) and type(own) not in PLAIN:
            return f"its {role} is a {type(own).__name__}, which may compute otherwise"
        if own is not None and own.is_neg():
            return f"its {role} is a view that is negated when it is read"
    return sharding_problem(param, bias)


def _bias_of(module: nn.Module, kind: Kind) -> Tensor | None:
    found: Tensor | None = None if kind.bias is None else getattr(module, kind.bias, None)
    return found


def _set_tables_apart(users: dict[int, list[Use]]) -> tuple[dict[int, list[Use]], dict[int, str]]:
    """The uses that rows may be seen of, and the name of a table that looks the same weight up.

    A weight that is only looked up keeps its uses.
    """
    found: dict[int, list[Use]] = {}
    tables: dict[int, str] = {}
    for key, uses in users.items():
        seen = [use for use in uses if not isinstance(use[1], TABLES)]
        found[key] = seen or uses
        if seen and len(seen) < len(uses):
            tables[key] = next(name for name, module, _ in uses if isinstance(module, TABLES))
    return found, tables


def plain_name(name: str) -> str:
    """A module's name without what wrappers add to it, so that states of both kinds fit."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def register(module_class: type[nn.Module], kind: str) -> None:
    """From here on, optimizers cover modules of a class that computes what a known kind does.

        "linear"         F.linear(x, self.weight, self.bias), in whatever words
        "turned linear"  x @ self.weight + self.bias, whose weight is [inputs, outputs]
        "conv1d", "conv2d", "conv3d"   what nn.Conv1d and so on compute, of which it is a subclass

    or whose forward calls `observe`, whatever else it does:

        "observed"         with a weight [outputs, inputs]
        "turned observed"  with a weight [inputs, outputs]

    or whose forward itself multiplies its parameters of two axes with rows:

        "products"         [outputs, inputs], by F.linear(x, w), x @ w.t() or w @ x.t()
        "turned products"  [inputs, outputs], by x @ w

    or whose parameters of three axes hold a matrix for each of its experts:

        "experts"         [experts, outputs, inputs]
        "turned experts"  [experts, inputs, outputs]

    For the first three, forward takes the inputs and nothing else. In a step that gathers rows, GLS
    computes the product in its stead; a class that changes weight or inputs first, or the outputs
    after, is not one of these. A bias is None or not there where it has none. Subclasses that
    override forward are classes of their own.

    Of products, `@`, torch.matmul and torch.mm are seen, of a parameter by whatever name. Biases
    are no part of it, and a parameter that no such product shows takes Adam's update.

    The rows of experts are seen in products with `weight[i]`, with `weight[whose]` and with all of
    the weight, by `@`, `torch.bmm`, `torch.matmul` or `torch.einsum`, and in torch's grouped
    product. A bias is what is called `<weight>_bias`, [experts, outputs].

    Raises:
        TypeError: no class of modules, or for a convolution none of torch's own.
        ValueError: an unknown kind, or a class of torch's that GLS covers already or that looks
            rows up.
    """
    given: Any = module_class
    asked: Any = kind
    if not (isinstance(given, type) and issubclass(given, nn.Module)):
        raise TypeError(f"module_class: expected a subclass of nn.Module, got {given!r}")
    if not isinstance(asked, str) or (kind not in ALIKE_KINDS and kind not in OTHER_KINDS):
        kinds = ", ".join([*ALIKE_KINDS, *OTHER_KINDS])
        raise ValueError(f"kind: expected {kinds}, got {kind!r}")
    name = describe_class(module_class)
    if module_class is nn.Module:
        raise ValueError("module_class: expected a class of its own, got nn.Module itself")
    if module_class in OWN:
        raise ValueError(f"module_class: {name} is covered as it is")
    if module_class in TABLES:
        raise ValueError(f"module_class: {name} looks rows up, and multiplies none")
    if kind in OTHER_KINDS:
        tell, turned = OTHER_KINDS[kind]
        tell(module_class, turned=turned)
        return
    _, base = ALIKE_KINDS[kind]
    if not issubclass(module_class, base):
        raise TypeError(
            f"module_class: expected a subclass of nn.{base.__name__} for {kind!r}, got {name}"
        )
    _cover(module_class, kind)


def _cover(module_class: type[nn.Module], kind: str) -> None:
    KINDS[module_class], _ = KNOWN_KINDS[kind]
    if "observed" not in kind:
        ALIKE.add(module_class.forward)


def kind_of(module: nn.Module, role: str = "weight") -> Kind | None:
    """What covers the parameter of this name in modules of this class."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    experts = known_experts(module)
    if experts is not None and role in experts.keys:
        return Kind(ExpertsLayer, why_not_experts, bias_key_of(role))
    products = products_layer(module, role)
    if products is not None:
        return Kind(products, lambda _: None, None)
    for base in plain_class(module).__mro__:
        if role != "weight":
            if base in RECURRENT:
                return recurrent_kind(role)
            if base in PARTS:
                return PARTS[base].get(role)
            continue
        known = KNOWN.get(f"{base.__module__}.{base.__qualname__}")
        if known is not None and base not in KINDS:
            _cover(base, known)
        if base in KINDS:
            return KINDS[base]
    return None


def recurrent_kind(role: str) -> Kind | None:
    """What covers a parameter of a recurrent module."""
    if not role.startswith("weight"):
        return None
    why_not = functools.partial(why_not_recurrent, role)
    return Kind(RecurrentLayer, why_not, role.replace("weight", "bias"))


def _uncovered(module: nn.Module, role: str) -> str | None:
    """Why GLS does not cover this parameter of a module, or None if it does."""
    kind = kind_of(module, role) or kind_of(module)
    if isinstance(module, ParametrizationList):
        norms = ", ".join(type(each).__name__ for each in module)
        return f"the parametrization {norms} is not covered"
    if kind is None:
        return f"{describe_class(plain_class(module))} is not covered"
    return kind.why_not([module])


def _reason(module: nn.Module, role: str, param: nn.Parameter) -> str:
    if role in ("original0", "weight_g"):
        return "the lengths of weight_norm"
    if role in ("bias_k", "bias_v") and isinstance(module, nn.MultiheadAttention):
        return "added beside the keys and values, no part of a product"
    if isinstance(param, UninitializedParameter):
        return "not initialised yet: run the model once before building the optimizer"
    problem = _uncovered(module, role)
    if problem is not None:
        return problem
    kind = kind_of(module)
    if kind is not None and role == kind.bias:
        return "shared otherwise than the weight it belongs to"
    return "not covered"


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
