"""Captured modules: instances of a class of their own, whose forward asks the layer.

As torch's parametrizations and fully_shard do it, a captured module's class is a subclass of the
one it had, with its name. Whatever copies the module, by copy, pickle, torch.save or by hand, gets
a plain one: the class says so to those that ask it, and the forward computes as the plain class
does unless it runs on the very module that was captured.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from gls_fused.capture.derived import source_of

if TYPE_CHECKING:
    from gls_fused.capture.layer import Layer

KEY = "_gls_capture"
# What holds the watch of `gls_fused.capture.uses`; copies leave it out as well.
WATCH_KEY = "_gls_watch"
# What a captured class holds the plain one as.
_PLAIN = "_gls_plain_class"


# Forwards of other classes that compute what their kind's own does.
ALIKE: set[Callable[..., Any]] = set()


class Capture:
    """What ties a module to the layer that captures it. Copies of it tie nothing.

    Attributes:
        forward: that of the module's class.
    """

    __slots__ = ("forward", "layer", "module")

    def __init__(self, module: nn.Module, layer: Layer) -> None:
        self.module: nn.Module | None = module
        self.layer: Layer | None = layer
        self.forward: Any = plain_class(module).forward

    def __deepcopy__(self, memo: dict[int, Any]) -> Capture:
        return self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def plain_class(module: nn.Module) -> type[Any]:
    """The class of a module without what captures it, whatever stands above that."""
    kind: type[Any] = type(module)
    plain: type[Any] = kind.__dict__.get(_PLAIN, kind)
    return plain


def describe_class(plain: type) -> str:
    """Torch's own classes by their name, others by their module's path too."""
    if plain.__module__.startswith("torch.nn."):
        return plain.__name__
    return f"{plain.__module__}.{plain.__qualname__}"


def why_not_own(module: nn.Module, forward: Callable[..., Any]) -> str | None:
    """Why a module does not compute `forward` of its own weight and bias, or None if it does."""
    own_bias = "bias" in module._parameters or getattr(module, "bias", None) is None
    own_weight = "weight" in module._parameters or source_of(module) is not None
    if not (own_weight and own_bias):
        return "its weight or bias is parametrized"
    plain = plain_class(module)
    # Those of a parametrized module are of a class on top of its own.
    if "weight" in module._parameters and (hasattr(plain, "weight") or hasattr(plain, "bias")):
        return f"{describe_class(plain)} computes its weight or bias"
    if plain.forward is not forward and plain.forward not in ALIKE:
        return (
            f"{describe_class(plain)} overrides forward, which may change the weight or the product"
            ": see gls_fused.register"
        )
    instance = getattr(module.__dict__.get("forward"), "__func__", None)
    # It may be that of a captured class, which hooks of other packages put back as they found it.
    ours = instance is plain.forward or getattr(instance, "__wrapped__", None) is plain.forward
    if "forward" in module.__dict__ and not ours:
        return "its forward is replaced on the instance"
    return None


def captured_by(module: nn.Module) -> Layer | None:
    """The layer that captures a module, if any."""
    capture = module.__dict__.get(KEY)
    return capture.layer if capture is not None and capture.module is module else None


def tie_module(module: nn.Module, layer: Layer) -> None:
    """From here on the layer is found from the module."""
    module.__dict__[KEY] = Capture(module, layer)


def capture_module(module: nn.Module, layer: Layer) -> None:
    """From here on the module's forward asks the layer."""
    tie_module(module, layer)
    kind: Any = plain_class(module)
    module.__class__ = _captured_class(kind)


def release_module(module: nn.Module, layer: Layer) -> None:
    """Make a module plain that this layer captures."""
    if captured_by(module) is not layer:
        return
    # A class that was put on top of ours since keeps it below, where it does nothing.
    module.__class__ = plain_class(module)
    capture = module.__dict__.pop(KEY)
    # Copies of the module's attributes may still hold it.
    capture.module = capture.layer = None


def recapture_module(module: nn.Module) -> None:
    """Route the forward through the layer again where a class that took its place is gone.

    Such as a parametrization's, which puts a subclass of the plain class there, and in the end the
    plain one.
    """
    kind: Any = type(module)
    capture = module.__dict__.get(KEY)
    if capture is None or kind.forward is not capture.forward:
        # Somebody has given it a class that computes something else.
        return
    if not is_captured(kind) and "weight" in module._parameters:
        module.__class__ = _captured_class(kind)


def is_captured(kind: type[Any]) -> bool:
    """Whether it is a class that `make_class` made."""
    return _PLAIN in kind.__dict__


def is_exporting() -> bool:
    """Whether torch.export traces, and is to see the plain modules."""
    # Of torch.compiler.is_exporting, which torch 2.11 takes for true in every graph that it traces.
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


def _set_class(module: Any, kind: type[Any]) -> None:
    object.__dict__["__class__"].__set__(module, kind)


def once_per_class(make: Callable[[Any], type[Any]]) -> Callable[[Any], type[Any]]:
    """The subclass that `make` makes of a class, the same as long as somebody has it.

    Neither class is kept alive: those that a function defines are gone when it is done with them.
    """
    known: weakref.WeakKeyDictionary[Any, weakref.ref[type[Any]]] = weakref.WeakKeyDictionary()

    def find(plain: Any) -> type[Any]:
        found = known[plain]() if plain in known else None
        if found is None:
            found = make(plain)
            known[plain] = weakref.ref(found)
        return found

    return find


@once_per_class
def _captured_class(plain: Any) -> type[Any]:
    # By this name the inputs may be given.
    _, first, *_ = inspect.signature(plain.forward).parameters
    key, proxy, own = KEY, fx.Proxy, plain.forward
    is_compiling = torch.compiler.is_compiling

    def forward(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        capture = getattr(self, key, None)
        if capture is not None and capture.module is self:
            layer, inputs = capture.layer, args[0] if args else kwargs.get(first)
            # Of a product that fills the caches, what is asked below takes a tenth of the time.
            alone = not is_compiling() and len(args) == 1 and not kwargs and plain.forward is own
            if alone and layer.through is not None:
                outputs = layer.through(self._parameters, inputs)
                if outputs is not None:
                    return outputs
            if alone and not (layer.gathers or layer.by_node):
                # Nothing is asked of it in this step.
                return own(self, inputs)
            # What torch.fx.symbolic_trace hands around has no rows.
            if not isinstance(inputs, proxy) and layer.watches(self):
                if plain.forward is not own:
                    return layer.forward_otherwise(self, "its forward is replaced", *args, **kwargs)
                if len(args) == 1 and not kwargs:
                    return layer.forward(self, inputs)
                more = [*args[1:], *(kwargs[name] for name in kwargs if name != first)]
                if all(each is None for each in more):
                    return layer.forward(self, inputs)
                return layer.forward_more(self, *args, **kwargs)
        return plain.forward(self, *args, **kwargs)

    return make_class(plain, as_plain(plain, forward))


def as_plain(plain: Any, forward: Any) -> Any:
    """A forward that passes for the plain class's, to torch.jit.script and torch.fx too.

    They read the source of the plain one with the names that this one knows.
    """
    names = getattr(inspect.unwrap(plain.forward), "__globals__", globals())
    found = FunctionType(forward.__code__, names, "forward", None, forward.__closure__)
    return functools.wraps(plain.forward)(found)


def make_class(plain: Any, forward: Any) -> type[Any]:
    """A subclass with another forward that passes for the plain class, and whose copies are it."""

    def reduce_ex(self: Any, protocol: Any) -> Any:
        reduced = plain.__reduce_ex__(self, protocol)
        if type(self) is not captured or isinstance(reduced, str):
            return reduced
        make, arguments, *rest = reduced
        arguments = tuple(plain if each is captured else each for each in arguments)
        if rest and isinstance(rest[0], dict):
            rest[0] = {key: value for key, value in rest[0].items() if key not in (KEY, WATCH_KEY)}
        return (make, arguments, *rest)

    captured = type(
        plain.__name__,
        (plain,),
        {
            "forward": forward,
            "__reduce_ex__": reduce_ex,
            "__module__": plain.__module__,
            "__qualname__": plain.__qualname__,
            "__doc__": plain.__doc__,
            # What pickle, parametrizations and users ask; they get, and may change, the plain one.
            "__class__": property(lambda self: plain, _set_class),
            _PLAIN: plain,
        },
    )
    return captured
