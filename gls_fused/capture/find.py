"""Which layers of a model GLS covers, and why it does not cover the rest."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter

from gls_fused.capture.conv import Conv2dLayer, window_of
from gls_fused.capture.layer import Layer
from gls_fused.capture.linear import LinearLayer
from gls_fused.capture.modules import plain_class
from gls_fused.distributed.sharding import is_sharded, sharding_problem

# What torch.compile and activation checkpointing put into the names of what they wrap.
WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}
PLAIN_TENSORS = (Tensor, nn.Parameter)


class Uncovered(NamedTuple):
    """A parameter that no layer owns."""

    name: str
    param: Tensor
    reason: str


def find_layers(
    roots: Iterable[tuple[str, nn.Module]], trained: Container[Tensor] | None = None
) -> tuple[list[Layer], list[Uncovered]]:
    """The layers GLS covers below these modules, and why it does not cover the rest.

    Args:
        roots: modules, with a prefix for the names of what is in them.
        trained: the parameters that are asked for; None for all.
    """
    users: dict[int, list[tuple[str, nn.Module, str]]] = {}
    params: dict[int, nn.Parameter] = {}
    seen: set[int] = set()
    for root_name, root in roots:
        for name, module in root.named_modules(prefix=root_name):
            if id(module) in seen:
                continue
            seen.add(id(module))
            for key, param in module._parameters.items():
                if param is not None:
                    params[id(param)] = param
                    users.setdefault(id(param), []).append((plain_name(name), module, key))

    layers: list[Layer] = []
    owned: set[int] = set()
    reasons: dict[int, tuple[str, str]] = {}
    for key, uses in users.items():
        names, modules, roles = zip(*uses, strict=True)
        param = params[key]
        if "weight" not in roles or isinstance(param, UninitializedParameter):
            continue
        if trained is not None and param not in trained:
            continue
        problem = next(filter(None, map(_uncovered, modules)), None)
        if problem is None and len({plain_class(module) for module in modules}) > 1:
            problem = "its weight is shared by modules of different kinds"
        if problem is None and isinstance(modules[0], nn.Conv2d):
            geometry = window_of(modules[0])
            if any(window_of(module) != geometry for module in modules):
                problem = "its modules differ in stride, padding or dilation"
        if problem is None and any(role != "weight" for role in roles):
            problem = "its weight is used in two roles"
        if problem is None and not param.numel():
            problem = "its weight is empty"
        if problem is None and not is_sharded(param) and type(param) not in PLAIN_TENSORS:
            problem = f"its weight is a {type(param).__name__}, which may compute otherwise"
        if problem is None:
            problem = sharding_problem(param, modules[0].bias)
        if problem is not None:
            if len(uses) > 1:
                problem = f"shared by {', '.join(names)}: {problem}"
            reasons[key] = (_join(names[0], roles[0]), problem)
            continue
        biases = {id(module.bias): module.bias for module in modules}
        # A bias belongs to the layer when it is used exactly where the weight is.
        bias = next(iter(biases.values())) if len(biases) == 1 else None
        if bias is not None and len(users[id(bias)]) != len(uses):
            bias = None
        if bias is not None and trained is not None and bias not in trained:
            bias = None
        kind = LinearLayer if isinstance(modules[0], nn.Linear) else Conv2dLayer
        layers.append(kind(names[0], list(modules), bias))
        owned.update((key,) if bias is None else (key, id(bias)))

    uncovered = []
    for key, uses in users.items():
        if key in owned or (trained is not None and params[key] not in trained):
            continue
        name, module, role = uses[0]
        named = (_join(name, role), _reason(module, role, params[key]))
        uncovered.append(
            Uncovered(reasons.get(key, named)[0], params[key], reasons.get(key, named)[1])
        )
    return layers, uncovered


def plain_name(name: str) -> str:
    """A module's name without what wrappers add to it, so that states of both kinds fit."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _uncovered(module: nn.Module) -> str | None:
    """Why GLS does not cover this module, or None if it does."""
    plain = plain_class(module)
    name = describe_class(plain)
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention uses its weight without calling it"
    forward: Callable[..., Tensor]
    if isinstance(module, nn.Linear):
        forward = nn.Linear.forward
    elif isinstance(module, nn.Conv2d):
        forward = nn.Conv2d.forward
        if module.groups > 1:
            return f"it has {module.groups} groups"
        if plain._conv_forward is not nn.Conv2d._conv_forward:
            return f"{name} overrides _conv_forward"
    else:
        return f"{name} is not covered"
    if "weight" not in module._parameters or "bias" not in module._parameters:
        return "its weight or bias is parametrized"
    if plain.forward is not forward:
        return f"{name} overrides forward"
    instance = module.__dict__.get("forward")
    if instance is not None and getattr(instance, "__func__", None) is not forward:
        return "its forward is replaced on the instance"
    return None


def describe_class(plain: type) -> str:
    """Torch's own classes by their name, others by their module's path too."""
    if plain.__module__.startswith("torch.nn."):
        return plain.__name__
    return f"{plain.__module__}.{plain.__qualname__}"


def _reason(module: nn.Module, role: str, param: nn.Parameter) -> str:
    if isinstance(param, UninitializedParameter):
        return "not initialised yet: run the model once before building the optimizer"
    problem = _uncovered(module)
    if problem is not None:
        return problem
    return "shared otherwise than the weight it belongs to" if role == "bias" else "not covered"


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
