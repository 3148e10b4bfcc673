"""Values as they are beneath forward-mode differentiation and torch.func's transforms.

A model may be called inside `vmap`, `jacrev`, `jvp` and the like over its inputs, with a loss of
what they give. The weights are outside of these transforms, and so is the node that observes them:
autograd comes there with the whole gradient, once the transforms are done.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext


def in_transform() -> bool:
    """Whether a transform of torch.func runs."""
    return torch._C._are_functorch_transforms_active()


def in_function_mode() -> bool:
    """Whether somebody's torch function mode, which sees torch's ops and not ours, is on."""
    count = torch._C._len_torch_function_stack()
    modes = map(torch._C._get_function_stack_at, range(count))
    # That of torch.set_default_device looks at what makes tensors alone.
    return any(type(mode) is not DeviceContext for mode in modes)


def outside_transforms() -> AbstractContextManager[Any]:
    """A context in which ops are not transformed."""
    return temporarily_clear_interpreter_stack() if in_transform() else nullcontext()


def has_level() -> bool:
    """Whether forward-mode differentiation is on."""
    return forward_ad._current_level >= 0


def beneath(tensor: Tensor) -> Tensor:
    """What transforms that differentiate have wrapped, such as a view of a weight."""
    while _is_wrapped(tensor) and not _functorch.is_batchedtensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def values_of(inputs: Tensor) -> Tensor:
    """The values of inputs, outside of transforms: without tangents, and of all mapped calls.

    What `vmap` maps over is the first axis: of a call with a row [k] the values are [n, k].
    """
    while _is_wrapped(inputs):
        batched = _functorch.is_batchedtensor(inputs)
        axis = _functorch.maybe_get_bdim(inputs) if batched else 0
        inputs = _functorch.get_unwrapped(inputs)
        if batched:
            inputs = inputs.movedim(axis, 0)
    if not has_level():
        return inputs
    values: Tensor = forward_ad.unpack_dual(inputs).primal  # type: ignore[no-untyped-call]
    return values


def _is_wrapped(tensor: Tensor) -> bool:
    # Dynamo knows no such question, and in its graphs no layer is watched inside of a transform.
    return not torch.compiler.is_compiling() and _functorch.is_functorch_wrapped_tensor(tensor)
