"""Which layers of a model GLS covers, and why it does not cover the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter

from gls_fused.capture.conv import Conv2dLayer, window_of
from gls_fused.capture.layer import CapturedForward, Layer
from gls_fused.capture.linear import LinearLayer
from gls_fused.distributed.sharding import sharding_problem


def find_layers(roots: Iterable[tuple[str, nn.Module]]) -> tuple[list[Layer], dict[str, str]]:
    """The layers GLS covers below these modules, and why it does not cover the rest.

    Returns:
        The layers, and for every other parameter, by its qualified name, the reason.
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
                    users.setdefault(id(param), []).append((name, module, key))

    layers: list[Layer] = []
    owned: set[int] = set()
    reasons: dict[str, str] = {}
    for key, uses in users.items():
        names, modules, roles = zip(*uses, strict=True)
        if "weight" not in roles or isinstance(params[key], UninitializedParameter):
            continue
        problem = next(filter(None, map(_uncovered, modules)), None)
        if problem is None and len({type(module) for module in modules}) > 1:
            problem = "its weight is shared by modules of different kinds"
        if problem is None and isinstance(modules[0], nn.Conv2d):
            geometry = window_of(modules[0])
            if any(window_of(module) != geometry for module in modules):
                problem = "its modules differ in stride, padding or dilation"
        if problem is None and any(role != "weight" for role in roles):
            problem = "its weight is used in two roles"
        if problem is None and not params[key].numel():
            problem = "its weight is empty"
        if problem is None:
            problem = sharding_problem(params[key], modules[0].bias)
        if problem is not None:
            if len(uses) > 1:
                problem = f"shared by {', '.join(names)}: {problem}"
            reasons[_join(names[0], roles[0])] = problem
            continue
        biases = {id(module.bias): module.bias for module in modules}
        # A bias belongs to the layer when it is used exactly where the weight is.
        bias = next(iter(biases.values())) if len(biases) == 1 else None
        if bias is not None and len(users[id(bias)]) != len(uses):
            bias = None
        kind = LinearLayer if isinstance(modules[0], nn.Linear) else Conv2dLayer
        layers.append(kind(names[0], list(modules), bias))
        owned.update((key,) if bias is None else (key, id(bias)))

    for key, uses in users.items():
        name, module, role = uses[0]
        if key not in owned and _join(name, role) not in reasons:
            reasons[_join(name, role)] = _reason(module, role, params[key])
    return layers, reasons


def _uncovered(module: nn.Module) -> str | None:
    """Why GLS does not cover this module, or None if it does."""
    name = type(module).__name__
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention uses its weight without calling it"
    forward: Callable[..., Tensor]
    if isinstance(module, nn.Linear):
        forward = nn.Linear.forward
    elif isinstance(module, nn.Conv2d):
        forward = nn.Conv2d.forward
        if module.groups > 1:
            return f"it has {module.groups} groups"
        if type(module)._conv_forward is not nn.Conv2d._conv_forward:
            return f"{name} overrides _conv_forward"
    else:
        return f"{name} is not covered"
    if type(module).forward is not forward:
        return f"{name} overrides forward"
    instance = module.__dict__.get("forward")
    # A copy of a captured module has its class's own forward on the instance.
    plain = isinstance(instance, CapturedForward) or getattr(instance, "__func__", None) is forward
    if instance is not None and not plain:
        return "its forward is replaced on the instance"
    if "weight" not in module._parameters or "bias" not in module._parameters:
        return "its weight or bias is parametrized"
    return None


def _reason(module: nn.Module, role: str, param: nn.Parameter) -> str:
    if isinstance(param, UninitializedParameter):
        return "not initialised yet: run the model once before building the optimizer"
    problem = _uncovered(module)
    if problem is not None:
        return problem
    return "shared otherwise than the weight it belongs to" if role == "bias" else "not covered"


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
