"""What `step()` asks of all its tensors in every step: by the native module at once, where it is.

Python, asked one by one, takes longer for that than the update of small layers.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def holds(states: dict[Tensor, dict[str, Any]], known: list[Any]) -> bool:
    """Whether the states hold what was `held_by` them: the very objects."""
    native = native_module()
    if native is not None and native.holds(states, known):
        return True
    return are_same(held_by(states), known)


def held_by(states: Mapping[Tensor, Mapping[str, Any]]) -> list[Any]:
    """The states themselves, then what each of them holds.

    Objects, not their ids, which those of others may be once they are gone.
    """
    found: list[Any] = list(states.values())
    found += itertools.chain.from_iterable([state.values() for state in found])
    return found


def has_sparse_gradient(params: Sequence[Tensor]) -> bool:
    """Whether one of the gradients is sparse."""
    native = native_module()
    if native is not None:
        return bool(native.has_sparse_gradient(params))
    gradients = [param.grad for param in params]
    return any(gradient is not None and gradient.is_sparse for gradient in gradients)


def has_frozen_gradient(params: Sequence[Tensor]) -> bool:
    """Whether a parameter that does not train has a gradient."""
    native = native_module()
    if native is not None:
        return bool(native.has_frozen_gradient(params))
    return any(not param.requires_grad and param.grad is not None for param in params)


def match_all(
    marks: Sequence[Any], weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> bool:
    """Whether the gradients of each weight and bias are what its marks are of.

    False where it is not known.

    Args:
        marks: `LinearCapture` of the native module.
    """
    native = native_module()
    return native is not None and bool(native.match_all(marks, weights, biases))


def are_same(now: Sequence[Any], known: Sequence[Any]) -> bool:
    """Of two lists of objects."""
    return len(now) == len(known) and all(map(operator.is_, now, known))


@functools.cache
def native_module() -> Any:
    """gls_fused._C, or None where it is missing or of another torch."""
    try:
        # It says whether the module is of this torch.
        importlib.import_module("gls_fused.backends.native")
    except ImportError:
        return None
    from gls_fused import _C

    return _C
