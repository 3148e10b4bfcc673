"""attach: any torch optimizer steps on GLS directions."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from typing_extensions import Self

from gls_fused.capture.find import find_layers
from gls_fused.capture.layer import Layer
from gls_fused.curvature.estimate import State
from gls_fused.diagnostics import diagnose
from gls_fused.distributed.ranks import Ranks, unwrapped
from gls_fused.distributed.sharding import rows_here
from gls_fused.preconditioner import Preconditioner, check_options, describe_layers, take_sums
from gls_fused.scaling import take_flag
from gls_fused.state import VERSION, check_curvature, check_version, copy_tensors


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    damping: float = 0.3,
    beta: float = 0.9,
    curvature: Literal["subspace", "dense"] = "subspace",
    rank: int | Literal["auto"] = "auto",
    curvature_every: int = 10,
    backend: str = "auto",
    process_group: Any = None,
) -> Attachment:
    """From here on the model's backward leaves D = D0 P in p.grad, for any optimizer to step on.

    With an optimizer the handle follows its steps by its hooks; without one, call the handle's
    `pre_step()` before and `commit()` after each step. The other arguments are those of `GLS`.

    Args:
        model: its nn.Linear and nn.Conv2d layers are covered; other gradients stay as they are.
        optimizer: a torch optimizer over the model's parameters.
    Raises:
        ValueError: an option out of its range, a model without a layer that GLS covers,
            nn.DataParallel, FullyShardedDataParallel.
        RuntimeError: the backend is not available.
    """
    options = {
        "damping": damping,
        "beta": beta,
        "curvature": curvature,
        "rank": rank,
        "curvature_every": curvature_every,
    }
    check_options(options)
    layers, reasons = find_layers([("", unwrapped(model))])
    if not layers:
        raise ValueError("model: got a model without an nn.Linear or nn.Conv2d that GLS covers")
    return Attachment(layers, reasons, optimizer, options, backend, Ranks(process_group))


class Attachment:
    """What `attach` returns: keeps the statistics, and takes them off the model again."""

    def __init__(
        self,
        layers: list[Layer],
        reasons: dict[str, str],
        optimizer: torch.optim.Optimizer | None,
        options: dict[str, Any],
        backend: str,
        ranks: Ranks,
    ) -> None:
        self._states: dict[str, dict[str, Any]] = {layer.name: {} for layer in layers}
        self._options = options
        self._reasons = reasons
        self._optimizer = optimizer
        self._backend = backend
        self._step = 0
        self._preconditioner = Preconditioner(
            layers,
            self._state_of,
            options,
            site="backward",
            backend=backend,
            ranks=ranks,
        )
        self._ranks = ranks
        self._started: list[Layer] = []
        self._preconditioner.expect(0, options)
        self._hooks = []
        if optimizer is not None:
            self._hooks = [
                optimizer.register_step_pre_hook(lambda own, *_: self.pre_step(take_flag(own))),
                optimizer.register_step_post_hook(lambda own, *_: self.commit(take_flag(own))),
            ]

    @_disable_dynamo
    @torch.no_grad()
    def pre_step(self, skip: Tensor | None = None) -> None:
        """Before the optimizer's step: layers that start their statistics get D into p.grad.

        Args:
            skip: 0-d bool; where it is true the rows of the step do not start any.
        """
        self._preconditioner.check_captured()
        waiting = [layer for layer in self._preconditioner.layers if layer.inverse is None]
        sums = self._take_sums(waiting, skip)
        self._started = self._preconditioner.start(sums, self._options)
        for layer in self._started:
            gradients = [rows_here(p.grad) for p in layer.params if p.grad is not None]
            if layer.weight.grad is not None:
                for gradient, sought in zip(gradients, layer.direction(gradients), strict=True):
                    gradient.copy_(sought)

    @_disable_dynamo
    @torch.no_grad()
    def commit(self, skip: Tensor | None = None) -> None:
        """After the optimizer's step: the rows of the step enter the statistics.

        Args:
            skip: 0-d bool; where it is true they are forgotten, without the host knowing.
        """
        # Rows that came after the start were sketched with the test matrix still.
        for layer in self._started:
            layer.take_sums()
        settled = [layer for layer in self._preconditioner.layers if layer not in self._started]
        self._started = []
        sums = self._take_sums(settled, skip)
        # An optimizer that evaluates the model in its step shows layers their first rows there.
        self._preconditioner.start(sums, self._options)
        self._preconditioner.commit(sums, self._options, skip)
        self._step += 1
        self._preconditioner.expect(self._step, self._options)

    def _take_sums(self, layers: list[Layer], skip: Tensor | None) -> dict[Layer, Tensor]:
        if self._ranks.size > 1:
            terms = f"step {self._step}, {self._options}"
            self._ranks.agree(lambda: [terms, *describe_layers([self._preconditioner])])
        return take_sums(layers, self._ranks, skip)

    def state_dict(self) -> dict[str, Any]:
        """The statistics by layer, the step and the version: tensors and plain numbers only."""
        layers = {name: dict(state) for name, state in self._states.items()}
        return {"version": VERSION, "step": self._step, "layers": layers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: the state is of other layers, another rank or a later version; nothing
                changes.
        """
        check_version(state_dict)
        if set(state_dict["layers"]) != set(self._states):
            raise ValueError(
                f"state_dict: expected the layers {sorted(self._states)}, "
                f"got {sorted(state_dict['layers'])}"
            )
        for layer in self._preconditioner.layers:
            check_curvature(layer, state_dict["layers"][layer.name])
        self._step = state_dict["step"]
        for layer in self._preconditioner.layers:
            saved = state_dict["layers"][layer.name]
            self._states[layer.name] = copy_tensors(saved, layer.weight)
        self._preconditioner.restart(self._step, self._options)

    def detach(self) -> None:
        """Leave the model and the optimizer exactly as they were."""
        self._preconditioner.release()
        for hook in self._hooks:
            hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "layers": self._preconditioner.layers,
            "captured": all(layer.captured for layer in self._preconditioner.layers),
            "arguments": (
                self._reasons,
                self._optimizer,
                self._options,
                self._backend,
                self._ranks,
            ),
            "states": self._states,
            "step": self._step,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For a copy or a pickle, which follows the copied model and optimizer."""
        Attachment.__init__(self, state["layers"], *state["arguments"])
        self._states, self._step = state["states"], state["step"]
        self._preconditioner.restart(self._step, self._options)
        if not state["captured"]:
            self.detach()

    def _state_of(self, layer: Layer, keep: bool) -> State:
        return self._states[layer.name]

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
        lines = describe_layers([self._preconditioner])
        lines += [f"{name}: true gradient ({why})" for name, why in self._reasons.items()]
        return "\n".join(lines)

    def diagnostics(self) -> dict[str, float]:
        """See `GLS.diagnostics`; without `update_rms`, as the optimizer scales its own updates."""
        return diagnose([self._preconditioner], [self._options], lambda _: [])

    __repr__ = report
