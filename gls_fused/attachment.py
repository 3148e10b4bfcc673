"""attach: any torch optimizer steps on GLS directions."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn
from torch._compile import _disable_dynamo
from typing_extensions import Self

from gls_fused.diagnostics import diagnose
from gls_fused.layers import Layer, find_layers
from gls_fused.preconditioner import Preconditioner, check_options, describe_layers


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
) -> Attachment:
    """From here on the model's backward leaves D = D0 P in p.grad, for any optimizer to step on.

    With an optimizer the handle follows its steps by its hooks; without one, call the handle's
    `pre_step()` before and `commit()` after each step. The other arguments are those of `GLS`.

    Args:
        model: its nn.Linear and nn.Conv2d layers are covered; other gradients stay as they are.
        optimizer: a torch optimizer over the model's parameters.
    Raises:
        ValueError: an option out of its range, or a model without a layer that GLS covers.
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
    layers, reasons = find_layers([("", model)])
    if not layers:
        raise ValueError("model: got a model without an nn.Linear or nn.Conv2d that GLS covers")
    return Attachment(layers, reasons, optimizer, options, backend)


class Attachment:
    """What `attach` returns: keeps the statistics, and takes them off the model again."""

    def __init__(
        self,
        layers: list[Layer],
        reasons: dict[str, str],
        optimizer: torch.optim.Optimizer | None,
        options: dict[str, Any],
        backend: str,
    ) -> None:
        self._states: dict[str, dict[str, Any]] = {layer.name: {} for layer in layers}
        self._options = options
        self._reasons = reasons
        self._step = 0
        self._preconditioner = Preconditioner(
            layers,
            lambda layer: self._states[layer.name],
            options,
            site="backward",
            backend=backend,
        )
        self._preconditioner.expect(0, options)
        self._hooks = []
        if optimizer is not None:
            self._hooks = [
                optimizer.register_step_pre_hook(lambda *_: self.pre_step()),
                optimizer.register_step_post_hook(lambda *_: self.commit()),
            ]

    @_disable_dynamo
    @torch.no_grad()
    def pre_step(self) -> None:
        """Before the optimizer's step: layers that start their statistics get D into p.grad."""
        self._preconditioner.check_captured()
        for layer in self._preconditioner.layers:
            if layer.inverse is None and layer.weight.grad is not None:
                if not self._preconditioner.start(layer, self._options):
                    continue
                gradients = [param.grad for param in layer.params if param.grad is not None]
                for gradient, sought in zip(gradients, layer.direction(gradients), strict=True):
                    gradient.copy_(sought)

    @_disable_dynamo
    @torch.no_grad()
    def commit(self) -> None:
        """After the optimizer's step: the rows of the step enter the statistics."""
        self._preconditioner.commit(self._options)
        self._step += 1
        self._preconditioner.expect(self._step, self._options)

    def state_dict(self) -> dict[str, Any]:
        """The statistics by layer, and the step: tensors and plain numbers only."""
        return {"step": self._step, "layers": {k: dict(v) for k, v in self._states.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: the layers are not those of this model.
        """
        if set(state_dict["layers"]) != set(self._states):
            raise ValueError(
                f"state_dict: expected the layers {sorted(self._states)}, "
                f"got {sorted(state_dict['layers'])}"
            )
        self._step = state_dict["step"]
        for layer in self._preconditioner.layers:
            self._states[layer.name] = {
                key: value.to(layer.weight.device, copy=True)
                if isinstance(value, torch.Tensor)
                else value
                for key, value in state_dict["layers"][layer.name].items()
            }
        self._preconditioner.restart(self._step, self._options)

    def detach(self) -> None:
        """Leave the model and the optimizer exactly as they were."""
        self._preconditioner.release()
        for hook in self._hooks:
            hook.remove()

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
