"""What the code of a module's class tells of what it does: the names that it reads."""

from __future__ import annotations

import functools
import inspect
import re
import weakref
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

from torch import nn

# Of classes that normalise activations; "normal" and "normalizing" are other words.
_NORM = re.compile(r"norm(?!al)", re.IGNORECASE)
# Their functions in torch.nn.functional.
_NORMS = {"batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"}


def _asked_once(ask: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Of each class, which is not kept alive."""
    known: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()

    @functools.wraps(ask)
    def answer(plain: Any) -> bool:
        if plain not in known:
            known[plain] = ask(plain)
        return known[plain]

    return answer


@_asked_once
def reads_weights(plain: Any) -> bool:
    """Whether a module's forward, or a method that it names, reads an attribute named weight.

    Those that do not may get hold of one in another way, and those that do may do anything with it.
    """
    if issubclass(plain, nn.MultiheadAttention):
        return True
    # Torch's own are containers, or look at weights only to choose a fast path of evaluation.
    return not _is_torchs(plain) and "weight" in _names_read(plain)


@_asked_once
def normalizes(plain: Any) -> bool:
    """Whether modules of this class normalise activations: by its name, or by what they call."""
    if plain.__module__.startswith("torch.nn.utils."):
        # Of weights.
        return False
    if _NORM.search(plain.__name__):
        return True
    if _is_torchs(plain):
        return False
    # The class of torch.jit.script's modules has none.
    forward: Any = getattr(plain, "forward", None)
    known = getattr(inspect.unwrap(forward), "__globals__", {})
    names = _names_read(plain)
    # A function of the user's own, as `def norm(x): return F.rms_norm(x, (x.shape[-1],))`.
    own = (name for name in names if name.endswith("norm"))
    return bool(names & _NORMS) or any(isinstance(known.get(name), FunctionType) for name in own)


def _is_torchs(plain: Any) -> bool:
    return bool(plain.__module__.startswith("torch.nn."))


def _names_read(plain: Any) -> set[str]:
    """By a class's forward, and by the methods that it names."""
    found: set[str] = set()
    done: set[str] = set()
    pending = ["forward"]
    while pending:
        name = pending.pop()
        method = inspect.unwrap(getattr(plain, name, None))  # type: ignore[arg-type]
        theirs = name != "forward" and hasattr(nn.Module, name)
        if name in done or theirs or not inspect.isfunction(method):
            continue
        done.add(name)
        names = _names_in(method.__code__)
        found |= names
        pending += names
    return found


def _names_in(code: CodeType) -> set[str]:
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return set(code.co_names).union(*map(_names_in, inner))
