"""attach: any torch optimizer steps on GLS directions."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from gls_fused.apply.matrices import Copied, by_matrix, write_back_
from gls_fused.backends.dispatch import resolve_backend
from gls_fused.capture.find import Uncovered, find_layers, plain_name
from gls_fused.capture.layer import Layer
from gls_fused.curvature.estimate import State
from gls_fused.curvature.precision import outside_modes
from gls_fused.diagnostics import describe, describe_layers, diagnose
from gls_fused.distributed.ranks import Ranks, unwrapped
from gls_fused.distributed.sharding import rows_here
from gls_fused.groups import check_options
from gls_fused.preconditioner import (
    Preconditioner,
    release_all,
    take_sums,
)
from gls_fused.scaling import take_flag
from gls_fused.state import (
    VERSION,
    check_curvature,
    check_mapping,
    check_version,
    copy_tensors,
    due_of,
    is_priming,
    read_step,
    saved_state,
    set_due,
    take_due,
    upgrade_layer,
)


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    damping: float = 0.3,
    power: float = 0.5,
    beta: float = 0.9,
    curvature: Literal["subspace", "dense"] = "subspace",
    rank: int | Literal["auto"] = "auto",
    curvature_every: int = 10,
    backend: str = "auto",
    process_group: Any = None,
) -> Attachment:
    """From here on the model's backward leaves D = D0 P in p.grad, for any optimizer to step on.

    With an optimizer the handle follows its steps by its hooks, in the place of an earlier one;
    without one, call the handle's `pre_step()` before and `commit()` after each step. The other
    arguments are those of `GLS`.

    Args:
        model: the layers that GLS covers have their gradients changed; others stay as they are.
        optimizer: a torch optimizer over the model's parameters.
    Raises:
        ValueError: an option out of its range, a model without a layer that GLS covers, an
            optimizer of other parameters, nn.DataParallel, FullyShardedDataParallel.
        TypeError: no module, no optimizer of torch's, an option that is no number.
        RuntimeError: the backend is not available.
    """
    options = {
        "damping": damping,
        "power": power,
        "beta": beta,
        "curvature": curvature,
        "rank": rank,
        "curvature_every": curvature_every,
    }
    check_options(options)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    layers, uncovered = find_layers([("", unwrapped(model))])
    if not layers:
        raise ValueError("model: got a model without a layer that GLS covers")
    if optimizer is not None:
        _check_optimizer(optimizer, layers)
    return Attachment(layers, uncovered, optimizer, options, backend, Ranks(process_group))


def _check_optimizer(optimizer: Any, layers: Sequence[Layer]) -> None:
    if isinstance(optimizer, type) or not hasattr(optimizer, "register_step_pre_hook"):
        kind = optimizer if isinstance(optimizer, type) else type(optimizer).__name__
        raise TypeError(f"optimizer: expected one of torch's, or None, got {kind}")
    held = {param for group in optimizer.param_groups for param in group["params"]}
    if held.isdisjoint(layer.weight for layer in layers):
        raise ValueError(
            "optimizer: expected one over the model's parameters, got one that holds the weight of "
            "no layer that GLS covers"
        )


# Who follows an optimizer, as it can be followed once.
_followers: weakref.WeakKeyDictionary[Any, weakref.ref[Attachment]] = weakref.WeakKeyDictionary()


class Attachment:
    """What `attach` returns: keeps the statistics, and takes them off the model again.

    It lives as long as somebody refers to it, or to the optimizer that it follows.
    """

    def __init__(
        self,
        layers: list[Layer],
        uncovered: list[Uncovered],
        optimizer: torch.optim.Optimizer | None,
        options: dict[str, Any],
        backend: str,
        ranks: Ranks,
    ) -> None:
        self._states: dict[Tensor, State] = {layer.weight: {} for layer in layers}
        self._options = options
        self._uncovered = uncovered
        # The optimizer's hooks refer to this, which must not keep the optimizer alive in return.
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        self._step = 0
        self._primes = False
        self._preconditioner = Preconditioner(site="backward", backend=backend, ranks=ranks)
        resolve_backend(backend, {layer.weight.device.type for layer in layers})
        self._hooks: list[RemovableHandle] = []
        self._finalizer = weakref.finalize(self, release_all, self._layers)
        self._finalizer.atexit = False
        try:
            self._preconditioner.add(layers, options)
            self._expect()
        except BaseException:
            self.detach()
            raise
        if optimizer is not None:
            # As where a cell of a notebook has run before.
            earlier = _followers.get(optimizer, lambda: None)()
            if earlier is not None:
                earlier.detach()
            _followers[optimizer] = weakref.ref(self)
            self._hooks = [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]

    @property
    def _layers(self) -> list[Layer]:
        return self._preconditioner.layers

    def _before_step(
        self, own: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """`pre_step`, once the gradients are there: after the closure that the step evaluates."""
        # The first is the optimizer.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        self._primes = closure is None and is_priming(own.param_groups, own.state)
        if self._primes:
            return None
        if closure is None:
            self.pre_step(take_flag(own))
            return None

        def evaluate() -> Any:
            loss = closure()
            self.pre_step(take_flag(own))
            return loss

        if len(args) > 1:
            return (args[0], evaluate, *args[2:]), kwargs
        return args, {**kwargs, "closure": evaluate}

    def _after_step(
        self, own: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """`commit`, unless the step made room for a state that is to be loaded."""
        if not self._primes:
            self.commit(take_flag(own))

    def _expect(self) -> None:
        self._preconditioner.expect(self._layers, self._states, self._step, self._options)

    @_disable_dynamo
    @torch.no_grad()
    def pre_step(self, skip: Tensor | None = None) -> None:
        """Before the optimizer's step: layers that start their statistics get D into p.grad.

        Args:
            skip: 0-d bool; where it is true the rows of the step do not start any.
        """
        with outside_modes():
            self._preconditioner.check_captured()
            self._preconditioner.adopt(self._layers, self._states)
            waiting = [layer for layer in self._layers if layer.inverse is None]
            started = self._start(self._take_sums(waiting, skip))
            # Where a gradient is of rows only in part, backward leaves D0: see `Layer.stays_whole`.
            whole = [
                layer for layer in self._layers if layer.stays_whole and layer.inverse is not None
            ]
            for layer in dict.fromkeys([*started, *whole]):
                _precondition_gradients_(layer)
            for layer in started:
                # A closure may be evaluated once more in this step: backward leaves D, and of the
                # rows the statistics have theirs.
                layer.expect(layer.inverse, gathers=False, at_backward=not layer.stays_whole)

    @_disable_dynamo
    @torch.no_grad()
    def commit(self, skip: Tensor | None = None) -> None:
        """After the optimizer's step: the rows of the step enter the statistics.

        Args:
            skip: 0-d bool; where it is true they are forgotten, without the host knowing.
        """
        with outside_modes():
            sums = self._take_sums(self._layers, skip)
            # An optimizer that evaluates the model in its step shows layers their first rows there.
            self._start(sums)
            summed = [layer for layer in self._layers if layer in sums]
            self._preconditioner.commit(summed, self._states, sums, self._options, skip)
            self._step += 1
            self._expect()

    def _start(self, sums: dict[Layer, Tensor]) -> list[Layer]:
        return self._preconditioner.start(self._layers, self._states, sums, self._options)

    def _take_sums(self, layers: list[Layer], skip: Tensor | None) -> dict[Layer, Tensor]:
        ranks = self._preconditioner.ranks
        if ranks.size > 1:
            terms = f"step {self._step}, {self._options}"
            ranks.agree(
                lambda: [terms, *describe_layers(self._preconditioner, self._states, whys=False)]
            )
        return take_sums(layers, ranks, skip)

    def state_dict(self) -> dict[str, Any]:
        """The statistics by layer, the step and the version: tensors and plain numbers only."""
        layers = {}
        for layer in self._layers:
            state = saved_state(self._states[layer.weight])
            layers[layer.name] = {**state, "due": due_of(layer)} if state else state
        return {"version": VERSION, "step": self._step, "layers": layers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError, TypeError: the state is of other layers, another rank or a later version, or
                holds numbers that are none; nothing changes.
        """
        check_mapping("state_dict", state_dict)
        layers = state_dict.get("layers")
        if not isinstance(layers, Mapping):
            keys = sorted(map(str, state_dict))
            raise ValueError(f"state_dict: expected one of attach, got keys {keys}")
        check_version(state_dict)
        step = read_step("state_dict", state_dict.get("step"))
        saved = {
            plain_name(name): upgrade_layer(f"layer {name!r}", state)
            for name, state in layers.items()
        }
        names = {layer.name for layer in self._layers}
        if set(saved) != names:
            raise ValueError(
                f"state_dict: expected the layers {sorted(names)}, got {sorted(saved)}"
            )
        for layer in self._layers:
            check_curvature(layer, saved[layer.name])
        copies = {p.weight: copy_tensors(saved[p.name], p.weight) for p in self._layers}
        self._step = step
        self._states.update(copies)
        take_due(self._layers, self._states)
        self._restart()

    def detach(self) -> None:
        """Leave the model and the optimizer exactly as they were."""
        release_all(self._layers)
        for hook in self._hooks:
            hook.remove()

    def _restart(self) -> None:
        self._preconditioner.restart()
        self._expect()

    def __getstate__(self) -> dict[str, Any]:
        preconditioner = self._preconditioner
        optimizer = None if self._optimizer is None else self._optimizer()
        return {
            "layers": self._layers,
            "captured": all(layer.captured for layer in self._layers),
            "arguments": (
                self._uncovered,
                optimizer,
                self._options,
                preconditioner.backend,
                preconditioner.ranks,
            ),
            "states": [self._states[layer.weight] for layer in self._layers],
            "due": [due_of(layer) for layer in self._layers],
            "step": self._step,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For a copy or a pickle, which follows the copied model and optimizer."""
        Attachment.__init__(self, state["layers"], *state["arguments"])
        pairs = zip(self._layers, state["states"], strict=True)
        self._states, self._step = {layer.weight: own for layer, own in pairs}, state["step"]
        for layer, due in zip(self._layers, state["due"], strict=True):
            set_due(layer, due)
        self._restart()
        if not state["captured"]:
            self.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def report(self) -> str:
        """A line per layer; then the parameters whose gradients stay as they are, and why."""
        lines = describe_layers(self._preconditioner, self._states)
        params = [param for layer in self._layers for param in layer.params]
        params += [each.param for each in self._uncovered]
        return describe(lines, self._layers, self._uncovered, params, "true gradient")

    def diagnostics(self) -> dict[str, float]:
        """See `GLS.diagnostics`; without `update_rms`, as the optimizer scales its own updates."""
        return diagnose([("", self._layers, self._options)], self._states, lambda _: [])

    __repr__ = report


def _precondition_gradients_(layer: Layer) -> None:
    """D0 in p.grad becomes D, of what a layer has on this rank."""
    rested = set(map(id, layer.rested()))
    gradients = [p.grad for p in layer.params if p.grad is not None and id(p) not in rested]
    if not gradients or gradients[0] is not layer.weight.grad:
        # P acts on the weight's.
        return
    size, copied = len(gradients), list[Copied]()
    matrices = list(map(rows_here, by_matrix([layer], [size], gradients, copied)))
    for place, inverse in enumerate(layer.inverses_for(size == len(layer.params))[layer.here]):
        mine = matrices[place * size : (place + 1) * size]
        for gradient, sought in zip(mine, layer.upright_direction(mine, inverse), strict=True):
            gradient.copy_(sought)
    write_back_(copied)
