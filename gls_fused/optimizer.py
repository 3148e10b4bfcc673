"""GLS, the optimizer: `step` reads as the algorithm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Literal, TypeAlias, cast, overload

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from typing_extensions import Self

from gls_fused.diagnostics import diagnose
from gls_fused.fallback import adam_
from gls_fused.layers import Layer, find_layers
from gls_fused.preconditioner import (
    SITES,
    Preconditioner,
    check_choice,
    check_number,
    check_options,
    describe_layers,
)
from gls_fused.reference import Inverse, Normalize

Groups: TypeAlias = nn.Module | Iterable[dict[str, Any]]

NORMALIZATIONS = ("rms", "adam", "sgd", "none")
# Keys that a group may have besides the options of GLS.
FREE_KEYS = {"params", "param_names", "name", "initial_lr", "step"}


class GLS(torch.optim.Optimizer):
    """Each layer takes the damped least-squares step that makes its outputs move as asked.

        Delta = argmin 1/(2n) ||A Delta' + n G||^2 + lambda/2 ||Delta||^2
              = -D0 (A'A/n + lambda I)^-1,    lambda = damping * tr(A'A/n) / d

    A [n, d] are a layer's inputs, G [n, m] the gradients at its outputs, D0 = G'A its gradient.
    nn.Linear and nn.Conv2d (one group) are covered; other parameters take Adam's update with
    betas (momentum, beta2). The equations are in docs/method.md and in `gls_fused.reference`.

    Args:
        model: the model, or dicts whose "params" is a module, a list of modules or a list of
            parameters (which then take Adam's update), with options of their own.
        lr: > 0; with "rms" and "adam" it means what it means for Adam.
        damping: > 0, dimensionless: relative to the mean eigenvalue of A'A/n.
        momentum: in [0, 1); 0 keeps no buffer.
        beta: in [0, 1); decay of the curvature, per commit.
        beta2: in [0, 1); decay of the mean square of the directions.
        eps: > 0; added to the root mean square.
        weight_decay: >= 0; decoupled.
        normalize: what the step is divided by: "rms", one root mean square per layer; "adam",
            one per element; "sgd", scaled to the gradient's norm; "none", the plain step.
        curvature: "subspace", `rank` directions of A'A/n; "dense", all of it ([d, d] per layer).
        rank: >= 1; directions of the subspace, at most d; "auto", 32 but at most m per layer.
        curvature_every: >= 1; steps between two that gather statistics.
        site: where P applies: "step", to the gradient; "backward", to the rows, so that p.grad
            holds the direction; "auto", where it is cheaper for each layer.
        backend: a name of `gls_fused.available_backends()`, or "auto".
    Raises:
        ValueError: an option out of its range, a model or module without parameters, an unknown
            key in a group.
        TypeError: parameters where modules are expected.
        RuntimeError: the backend is not available.
    Numerics: rows with a NaN or an infinity, and rows that are all zero, do not enter the
        statistics; a gradient that is not finite does to the weights what it does with Adam.
    Source: a reconstruction of GLS by Erwan Fagnou; see docs/method.md for what is known of it.
    """

    def __init__(
        self,
        model: Groups,
        lr: float | Tensor = 1e-3,
        *,
        damping: float = 0.3,
        momentum: float = 0.9,
        beta: float = 0.9,
        beta2: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        normalize: Normalize = "rms",
        curvature: Literal["subspace", "dense"] = "subspace",
        rank: int | Literal["auto"] = "auto",
        curvature_every: int = 10,
        site: Literal["auto", "step", "backward"] = "auto",
        backend: str = "auto",
    ) -> None:
        check_choice("site", site, SITES)
        self._site, self._backend = site, backend
        self._preconditioners: list[Preconditioner] = []
        self._reasons: dict[str, str] = {}
        defaults = {
            "lr": lr,
            "damping": damping,
            "momentum": momentum,
            "beta": beta,
            "beta2": beta2,
            "eps": eps,
            "weight_decay": weight_decay,
            "normalize": normalize,
            "curvature": curvature,
            "rank": rank,
            "curvature_every": curvature_every,
        }
        _check_options(defaults, site)
        groups = [{"params": model}] if isinstance(model, nn.Module) else list(model)
        if not groups:
            raise ValueError("model: expected a module or a non-empty list of groups, got []")
        if not all(isinstance(group, dict) for group in groups):
            raise TypeError(
                "model: expected a module or dicts with modules, as GLS needs the layers' inputs; "
                f"got {type(groups[0]).__name__} (pass the model, not model.parameters())"
            )
        try:
            super().__init__(groups, defaults)
        except BaseException:
            self.detach()
            raise

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group whose "params" is a module, a list of modules or a list of parameters."""
        options = {**self.defaults, **param_group}
        unknown = sorted(set(options) - set(self.defaults) - FREE_KEYS)
        if unknown:
            known = ", ".join(self.defaults)
            raise ValueError(f"group: unknown option {unknown[0]!r}, expected one of {known}")
        _check_options(options, self._site)
        modules, params = _split(param_group["params"])
        for param in params:
            if param.is_complex():
                raise ValueError(f"params: GLS takes no complex parameters, got {param.dtype}")
        if not params:
            raise ValueError("params: got no parameters (an empty model, or one without any)")
        layers, reasons = find_layers(modules)
        super().add_param_group({**param_group, "params": params, "step": 0})
        index = len(self.param_groups) - 1
        self._preconditioners.append(
            Preconditioner(
                layers, self._state_of, options, site=self._site_for(options), backend=self._backend
            )
        )
        self._reasons.update(reasons or _bare_reasons(modules, params, index))
        self._preconditioners[-1].expect(0, options)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    # Its work is in fused kernels already, and in decisions that a traced graph would freeze.
    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; torch.compile leaves it as it is.

        Args:
            closure: evaluates the model again and returns the loss.
        Raises:
            RuntimeError: the optimizer is detached from the model, or a gradient is sparse.
        """
        loss = None
        for preconditioner in self._preconditioners:
            preconditioner.check_captured()
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, preconditioner in zip(self.param_groups, self._preconditioners, strict=True):
            ready = [
                layer
                for layer in preconditioner.layers
                if layer.weight.grad is not None and self._is_started(preconditioner, layer, group)
            ]
            self._update(preconditioner, ready, group)
            self._update_others(group, owned={p for layer in ready for p in layer.params})
            preconditioner.commit(group)
            group["step"] += 1
            preconditioner.expect(group["step"], group)
        return loss

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and forget the rows that led to them."""
        super().zero_grad(set_to_none)
        for preconditioner in self._preconditioners:
            preconditioner.discard_sums()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state that `state_dict` gave, of an optimizer over the same model."""
        super().load_state_dict(state_dict)
        self._restore_dtypes(state_dict)
        for group, preconditioner in zip(self.param_groups, self._preconditioners, strict=True):
            preconditioner.restart(group["step"], group)

    def detach(self) -> None:
        """Leave the model exactly as it was before; `step` raises from here on."""
        for preconditioner in self._preconditioners:
            preconditioner.release()

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
        """A table: per layer its rows, rank, site and backend; then why the rest takes Adam's."""
        lines = describe_layers(self._preconditioners)
        for name, reason in self._reasons.items():
            lines.append(f"{name}: Adam ({reason})")
        return "\n".join(lines)

    def diagnostics(self) -> dict[str, float]:
        """Numbers to log, by layer: `{"encoder.0/trace": ..., "encoder.0/captured": ..., ...}`.

            trace       t = tr(Sigma), the mean square norm of a layer's rows
            captured    tr(M) / t, the share of it in the directions that are solved exactly
            damping     lambda = damping t / d
            update_rms  root mean square of D = D0 P, bias-corrected; with "rms" and "adam" alone

        Computed when called, from the state; a layer without statistics yet is left out. With
        several groups, names begin with `group0/`, `group1/`, ...
        """
        return diagnose(self._preconditioners, self.param_groups, self._squares_of)

    def __repr__(self) -> str:
        return f"{super().__repr__()}\n{self.report()}"

    def _state_of(self, layer: Layer) -> dict[str, Any]:
        return cast(dict[str, Any], self.state[layer.weight])

    def _squares_of(self, layer: Layer) -> list[Tensor]:
        states = (self.state[param] for param in layer.params)
        return [state["exp_avg_sq"] for state in states if "exp_avg_sq" in state]

    def _site_for(self, options: Mapping[str, Any]) -> str:
        # The step size is the true gradient's, which the backward site does not keep.
        return "step" if options["normalize"] == "sgd" else self._site

    def _is_started(
        self, preconditioner: Preconditioner, layer: Layer, group: Mapping[str, Any]
    ) -> bool:
        if layer.inverse is not None:
            return True
        if not preconditioner.start(layer, group):
            return False
        # What the layer got so far were Adam's updates, whose averages are of another quantity.
        for param in layer.params:
            for key in ("step", "exp_avg", "exp_avg_sq"):
                self.state[param].pop(key, None)
        return True

    def _update(
        self, preconditioner: Preconditioner, layers: list[Layer], group: Mapping[str, Any]
    ) -> None:
        """One update of all layers, with P where the backward has not applied it."""
        if not layers:
            return
        params: list[Tensor] = []
        inverses: list[Inverse | None] = []
        sizes: list[int] = []
        for layer in layers:
            mine = [param for param in layer.params if param.grad is not None]
            params += mine
            sizes.append(len(mine))
            with_bias = len(mine) == len(layer.params)
            inverses.append(None if layer.at_backward else layer.inverse_for(with_bias))
            _fill_states(layer, mine, [self.state[param] for param in mine], group)
        states = [self.state[param] for param in params]
        steps = [self.state[layer.weight]["step"] for layer in layers]
        squares: list[Tensor] = []
        if group["normalize"] == "rms":
            squares = [self.state[layer.weight]["exp_avg_sq"] for layer in layers]
        elif group["normalize"] == "adam":
            squares = [state["exp_avg_sq"] for state in states]
        preconditioner.backend.update_layers_(
            params,
            [param.grad for param in params],
            [state["exp_avg"] for state in states] if group["momentum"] else [],
            squares,
            steps,
            inverses,
            layer_sizes=sizes,
            normalize=group["normalize"],
            lr=group["lr"],
            momentum=group["momentum"],
            beta2=group["beta2"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )

    def _update_others(self, group: Mapping[str, Any], owned: set[Tensor]) -> None:
        params = [p for p in group["params"] if p.grad is not None and p not in owned]
        adam_(params, [self.state[param] for param in params], group)

    def _restore_dtypes(self, state_dict: Mapping[str, Any]) -> None:
        """The base class casts state to the parameter's dtype; put the saved precision back."""
        groups = zip(state_dict["param_groups"], self.param_groups, strict=True)
        for saved_group, group in groups:
            for index, param in zip(saved_group["params"], group["params"], strict=True):
                for key, value in state_dict["state"].get(index, {}).items():
                    if isinstance(value, Tensor) and value.dtype != self.state[param][key].dtype:
                        self.state[param][key] = value.to(param.device, copy=True)


def _check_options(options: Mapping[str, Any], site: str) -> None:
    check_number("lr", options["lr"], 0)
    check_number("momentum", options["momentum"], 0, 1, closed=True)
    check_number("beta2", options["beta2"], 0, 1, closed=True)
    check_number("eps", options["eps"], 0)
    check_number("weight_decay", options["weight_decay"], 0, closed=True)
    check_choice("normalize", options["normalize"], NORMALIZATIONS)
    check_options(options)
    if options["normalize"] == "sgd" and site == "backward":
        raise ValueError(
            "site: normalize='sgd' needs the true gradient, expected auto, step, got 'backward'"
        )


def _split(entry: Any) -> tuple[list[tuple[str, nn.Module]], list[Tensor]]:
    """The modules of a group's "params", with a prefix for their names, and all its parameters."""
    entries = [entry] if isinstance(entry, nn.Module | Tensor) else list(entry)
    modules: list[tuple[str, nn.Module]] = []
    params: dict[Tensor, None] = {}
    for index, item in enumerate(entries):
        if isinstance(item, nn.Module):
            modules.append(("" if len(entries) == 1 else str(index), item))
            params.update(dict.fromkeys(item.parameters()))
        elif isinstance(item, Tensor):
            params[item] = None
        else:
            raise TypeError(f"params: expected modules or parameters, got {type(item).__name__}")
    return modules, list(params)


def _bare_reasons(
    modules: list[tuple[str, nn.Module]], params: list[Tensor], index: int
) -> dict[str, str]:
    if modules:
        return {}
    return {f"group {index}, {len(params)} parameters": "given as parameters, not as a module"}


def _fill_states(
    layer: Layer, params: list[Tensor], states: list[dict[str, Any]], group: Mapping[str, Any]
) -> None:
    """Buffers for a layer's first update: one step and, for "rms", one square on its weight."""
    first, dtype = states[0], layer.statistics_dtype
    if "step" not in first:
        first["step"] = torch.zeros((), dtype=torch.float32, device=layer.weight.device)
        if group["normalize"] == "rms":
            first["exp_avg_sq"] = torch.zeros((), dtype=dtype, device=layer.weight.device)
    for param, state in zip(params, states, strict=True):
        if group["momentum"] and "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(param, dtype=dtype)
        if group["normalize"] == "adam" and "exp_avg_sq" not in state:
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype)
