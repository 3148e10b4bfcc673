"""Parameters that no layer owns take Adam's update, by torch's own fused op or the backend's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from gls_fused.apply.low_precision import Seeds, close_copies, open_copies, widen
from gls_fused.capture.layer import PLAIN
from gls_fused.distributed.sharding import gradient_here, rows_here
from gls_fused.host import are_same

# Parameters, gradients, averages and mean squares, in one order.
Lists: TypeAlias = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]


def start_adam(param: Tensor, state: dict[str, Any]) -> None:
    """Fill a state with step, exp_avg and exp_avg_sq, unless it has them."""
    # A bias whose weight was frozen since has averages, but no step of its own; a weight whose
    # estimate somebody has taken away has one mean square for all of it.
    averages = (state.get("exp_avg"), state.get("exp_avg_sq"))
    whole = all(found is not None and found.shape == param.shape for found in averages)
    if "step" in state and whole:
        return
    dtype = torch.promote_types(param.dtype, torch.float32)
    state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
    state["exp_avg"] = torch.zeros_like(param, dtype=dtype)
    state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype)


def forget_adam(state: dict[str, Any]) -> None:
    """Drop what `start_adam` filled, where there is any."""
    for key in ("step", "exp_avg", "exp_avg_sq", "exp_avg_sq_columns"):
        state.pop(key, None)


def adam_(
    params: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
    options: Mapping[str, Any],
    seeds: Seeds,
    skip: Tensor | None = None,
    backend: ModuleType | None = None,
) -> None:
    """One Adam step with decoupled weight decay, in place, for parameters that have a gradient.

    Args:
        params: at least one, of any shapes, floating point or complex, dense gradients. Real and
            imaginary parts of complex ones are scaled each by its own mean square, as torch does.
        states: of the same length; filled at the first step with step, exp_avg and exp_avg_sq.
        options: lr, momentum (Adam's beta1), beta2, eps, weight_decay, low_precision.
        seeds: of what rounds stochastically.
        skip: 0-d bool; where it is true nothing changes.
        backend: of the layers. Where it says so it takes these parameters at once, for which
            torch's op has a launch, or wakes its threads, for every few of them.
    """
    for param, state in zip(params, states, strict=True):
        start_adam(param, state)
    copies = open_copies(params, states, options)
    # Element by element, so a rank's parts are enough; torch refuses a mix of shards and the rest.
    mine = [rows_here(copy) for copy in copies]
    gradients = widen([gradient_here(param) for param in params])
    averages, squares = (
        [rows_here(state[key]) for state in states] for key in ("exp_avg", "exp_avg_sq")
    )
    steps = [state["step"] for state in states]
    given: Lists = mine, gradients, averages, squares
    # Kernels take memory as it lies, and real numbers.
    unlike = any(param.is_complex() or param.is_neg() for param in mine)
    found = _each(_resolve, given) if unlike else given
    lists = _each(_as_real, found) if unlike else given
    if getattr(backend, "TAKES_OTHERS", False) and options["momentum"]:
        _update_by_(backend, lists, steps, options, skip)
    else:
        _update_by_torch_(lists, steps, options, skip)
    for place in (0, 2, 3) if unlike else ():
        for tensor, values in zip(given[place], found[place], strict=True):
            if values is not tensor:
                tensor.copy_(values)
    # torch's fused kernel does not tell autograd.
    torch.autograd.graph.increment_version(params)
    close_copies(params, copies, options, seeds, steps, backend)


class Others:
    """What the backend takes of other parameters' states, from one step to the next.

    To be dropped when the states or the parameters' group have changed. To look all up and to look
    at each of them takes longer than their update.
    """

    def __init__(self) -> None:
        self._params: list[Tensor] = []
        self._dtype: torch.dtype | None = None
        self._lists: tuple[list[Tensor], ...] = ()
        self._backend: Any = None

    def keep(
        self, params: Sequence[Tensor], states: Sequence[dict[str, Any]], backend: ModuleType | None
    ) -> None:
        """What `adam_` has taken, where it took the parameters as they are.

        Args:
            backend: of `adam_`.
        """
        first = params[0]
        plain = getattr(backend, "TAKES_OTHERS", False) and all(
            type(param) in PLAIN and param.dtype is first.dtype and param.device == first.device
            for param in params
        )
        self._dtype = None
        if plain and first.dtype in (torch.float32, torch.float64):
            self._params, self._backend = list(params), backend
            keys = "exp_avg", "exp_avg_sq", "step"
            self._lists = tuple([state[key] for state in states] for key in keys)
            # Last, as an interrupt may come in between.
            self._dtype = first.dtype

    def step_(
        self, params: Sequence[Tensor], options: Mapping[str, Any], skip: Tensor | None
    ) -> bool:
        """`adam_`, if these were kept and are as they were; else nothing, and False."""
        dtype = self._dtype
        if dtype is None or not options["momentum"] or not are_same(params, self._params):
            return False
        gradients = [param.grad for param in params]
        for param, gradient in zip(params, gradients, strict=True):
            if type(gradient) is not Tensor or gradient.dtype is not dtype:
                return False
            if param.is_neg() or gradient.is_neg():
                return False
        averages, squares, steps = self._lists
        self._backend.update_layers_(
            params, gradients, averages, squares, steps, **_by_element(params, options, skip)
        )
        torch.autograd.graph.increment_version(params)
        return True


def _each(change: Callable[[Tensor], Tensor], lists: Lists) -> Lists:
    params, gradients, averages, squares = (list(map(change, tensors)) for tensors in lists)
    return params, gradients, averages, squares


def _resolve(tensor: Tensor) -> Tensor:
    """A copy of a view that is conjugated or negated when it is read, else the tensor."""
    return tensor.resolve_conj().resolve_neg()


def _as_real(tensor: Tensor) -> Tensor:
    """Of a complex tensor a view with its two parts in a last axis, else the tensor."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _update_by_torch_(
    lists: Lists, steps: Sequence[Tensor], options: Mapping[str, Any], skip: Tensor | None
) -> None:
    given = list(zip(*lists, strict=True))
    alike = [_lie_alike(tensors) for tensors in given]
    params, gradients, averages, squares = map(list, zip(*alike, strict=True))
    adamw(
        params,
        gradients,
        averages,
        squares,
        [],
        list(steps),
        fused=True,
        found_inf=None if skip is None else skip.float(),
        amsgrad=False,
        maximize=False,
        beta1=options["momentum"],
        **_alike_in_both(options),
    )
    for tensors, written in zip(given, alike, strict=True):
        for place in (0, 2, 3):
            if written[place] is not tensors[place]:
                tensors[place].copy_(written[place])


def _lie_alike(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A parameter, its gradient and averages, or copies of them, that lie in memory alike.

    torch's fused op goes through the memory of each as it lies.
    """
    first = tensors[0]
    if all(each.stride() == first.stride() for each in tensors):
        return tensors
    if not torch.ops.aten.is_non_overlapping_and_dense(first):
        return tuple(each.contiguous() for each in tensors)
    return tuple(
        each
        if each.stride() == first.stride()
        else torch.empty_like(first, dtype=each.dtype).copy_(each)
        for each in tensors
    )


def _update_by_(
    backend: Any,
    lists: Lists,
    steps: Sequence[Tensor],
    options: Mapping[str, Any],
    skip: Tensor | None,
) -> None:
    """Each parameter as a layer that is scaled by element, those of a device and dtype at once."""
    places: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, param in enumerate(lists[0]):
        places.setdefault((param.device, param.dtype), []).append(index)
    for mine in places.values():
        parts = [[tensors[index] for index in mine] for tensors in (*lists, steps)]
        backend.update_layers_(*parts, **_by_element(parts[0], options, skip))


def _by_element(
    params: Sequence[Tensor], options: Mapping[str, Any], skip: Tensor | None
) -> dict[str, Any]:
    """What `update_layers_` takes beside the tensors of parameters of one device."""
    return {
        "inverses": [None] * len(params),
        "layer_sizes": [1] * len(params),
        "normalize": "adam",
        "momentum": options["momentum"],
        "skip": None if skip is None else skip.to(params[0].device, non_blocking=True),
        **_alike_in_both(options),
    }


def _alike_in_both(options: Mapping[str, Any]) -> dict[str, Any]:
    """What torch's op and the backends' take by the same names."""
    return {key: options[key] for key in ("lr", "beta2", "eps", "weight_decay")}
