"""GLS, the optimizer: `step` reads as the algorithm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Literal, TypeAlias, cast, overload

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from typing_extensions import Self

from gls_fused.apply.fallback import adam_, forget_adam
from gls_fused.apply.layers import step_layers_
from gls_fused.apply.low_precision import make_bits
from gls_fused.backends.dispatch import resolve_backend
from gls_fused.capture.find import find_layers
from gls_fused.capture.layer import Layer
from gls_fused.diagnostics import diagnose
from gls_fused.distributed.ranks import Ranks
from gls_fused.groups import (
    check_dense,
    check_group_options,
    check_site,
    describe_bare,
    describe_options,
    name_params,
    split_group,
)
from gls_fused.preconditioner import (
    SITES,
    Preconditioner,
    check_choice,
    describe_layers,
    take_sums,
)
from gls_fused.reference import Normalize
from gls_fused.scaling import take_flag, unscale_
from gls_fused.state import (
    VERSION,
    check_state,
    copy_state,
    is_priming,
    prime_states,
    upgrade_group,
    upgrade_state,
)

Groups: TypeAlias = nn.Module | Iterable[dict[str, Any]]

# Keys that a group may have besides the options of GLS.
FREE_KEYS = {"params", "param_names", "name", "initial_lr", "step", "version"}


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
        low_precision: how parameters of 16 bits take their step, "nearest", "stochastic" or
            "master", see `gls_fused.apply.low_precision`; averages and curvature are float32.
        seed: in [0, 2**32); of the bits that round stochastically, the same on every rank.
        process_group: whose ranks share the statistics and call `step` together; None, the
            default group where torch.distributed is initialised.
    Raises:
        ValueError: an option out of its range, a model or module without parameters, an unknown
            key in a group, nn.DataParallel, FullyShardedDataParallel.
        TypeError: parameters where modules are expected.
        RuntimeError: the backend is not available.
    Numerics: rows with a NaN or an infinity, and rows that are all zero, do not enter the
        statistics; a gradient that is not finite does to the weights what it does with Adam.
    Source: a reconstruction of GLS by Erwan Fagnou; see docs/method.md for what is known of it.
    """

    # torch.amp.GradScaler then leaves a scale and a flag here, and waits for nothing.
    _step_supports_amp_scaling = True

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
        low_precision: Literal["nearest", "stochastic", "master"] = "stochastic",
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        check_choice("site", site, SITES)
        self._site, self._backend = site, backend
        self._ranks = Ranks(process_group)
        self._preconditioners: list[Preconditioner] = []
        self._reasons: dict[str, str] = {}
        self._names: dict[Tensor, str] = {}
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
            "low_precision": low_precision,
            "seed": seed,
        }
        check_group_options(defaults, site)
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
        check_group_options(options, self._site)
        modules, params = split_group(param_group["params"])
        for param in params:
            if param.is_complex():
                raise ValueError(f"params: GLS takes no complex parameters, got {param.dtype}")
        if not params:
            raise ValueError("params: got no parameters (an empty model, or one without any)")
        layers, reasons = find_layers(modules)
        # Before anything is changed.
        resolve_backend(self._backend, {layer.weight.device.type for layer in layers})
        new = {**param_group, "params": params, "step": 0, "version": VERSION}
        super().add_param_group(new)
        index = len(self.param_groups) - 1
        self._preconditioners.append(
            Preconditioner(
                layers,
                self._state_of,
                options,
                site=self._site_for(options),
                backend=self._backend,
                ranks=self._ranks,
            )
        )
        self._ranks.disagree()
        self._reasons.update(reasons or describe_bare(modules, params, index))
        self._names.update(name_params(modules, params, index))
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
        Numerics: where a torch.amp.GradScaler found a gradient that is not finite, nothing changes,
            and the rows of the step are forgotten; a device decides that by itself, so that there
            the skipped step still counts for `curvature_every`.
        """
        loss = None
        for preconditioner in self._preconditioners:
            preconditioner.check_captured()
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_dense(self.param_groups)
        unscale_(self, (param for group in self.param_groups for param in group["params"]))
        if is_priming(self.param_groups, self.state):
            for group, preconditioner in zip(self.param_groups, self._preconditioners, strict=True):
                prime_states(group, preconditioner.layers, self.state)
                preconditioner.discard_sums()
            return loss
        skip = take_flag(self)
        sums = self._take_sums(skip)
        for group, preconditioner in zip(self.param_groups, self._preconditioners, strict=True):
            self._forget_earlier(preconditioner, preconditioner.start(sums, group))
            ready = [
                layer
                for layer in preconditioner.layers
                if layer.weight.grad is not None and layer.inverse is not None
            ]
            bits = make_bits(group)
            step_layers_(preconditioner.backend, ready, self.state, group, bits, skip)
            owned = {param for layer in ready for param in layer.params}
            others = [p for p in group["params"] if p.grad is not None and p not in owned]
            adam_(others, [self.state[p] for p in others], group, bits, skip)
            preconditioner.commit(sums, group, skip)
            if skip is None or not (skip.is_cpu and skip):
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
        """Restore a state that `state_dict` gave, of an optimizer over the same model.

        Raises:
            ValueError: it is of another model, rank, curvature or later version; nothing changes.
        """
        checked: dict[str, Any] = {}
        layers = [preconditioner.layers for preconditioner in self._preconditioners]

        def check(_: torch.optim.Optimizer, found: dict[str, Any]) -> dict[str, Any]:
            checked.update(upgrade_state(found, self._options))
            for group in checked["param_groups"]:
                check_site(group["normalize"], self._site)
            check_state(checked, self.param_groups, layers, self._names)
            return checked

        def restore(_: torch.optim.Optimizer) -> None:
            # torch has cast the state to the parameters' dtypes, and shares what it had not to.
            copy_state(checked, self.param_groups, self.state)
            self._restart()

        # After the hooks that may change what is loaded, before those that see it loaded.
        hooks = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def detach(self) -> None:
        """Leave the model exactly as it was before; `step` raises from here on."""
        for preconditioner in self._preconditioners:
            preconditioner.release()

    def __getstate__(self) -> dict[str, Any]:
        captured = [[layer.captured for layer in p.layers] for p in self._preconditioners]
        return {
            **super().__getstate__(),
            "_site": self._site,
            "_backend": self._backend,
            "_ranks": self._ranks,
            "_reasons": self._reasons,
            "_names": self._names,
            "_layers": [preconditioner.layers for preconditioner in self._preconditioners],
            "_captured": captured,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For a copy or a pickle, which captures the copied model; and for `load_state_dict`."""
        own = dict(state)
        layers, captured = own.pop("_layers", None), own.pop("_captured", None)
        super().__setstate__(own)
        if layers is None:
            if "_preconditioners" not in vars(self):
                raise ValueError(
                    "pickle: expected one with layers, got an optimizer of an earlier version; "
                    "load its state_dict() instead"
                )
            return
        for index, group in enumerate(self.param_groups):
            group.update(upgrade_group(group, index, self._options))
        self._preconditioners = []
        pairs = zip(self.param_groups, layers, captured, strict=True)
        for group, mine, flags in pairs:
            preconditioner = Preconditioner(
                mine,
                self._state_of,
                group,
                site=self._site_for(group),
                backend=self._backend,
                ranks=self._ranks,
            )
            self._preconditioners.append(preconditioner)
            for layer, flag in zip(mine, flags, strict=True):
                if not flag:
                    layer.release()
        self._restart()

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

    @property
    def _options(self) -> list[str]:
        # torch's own mark, which it gives to the defaults of every optimizer.
        return [option for option in self.defaults if option != "differentiable"]

    def _state_of(self, layer: Layer, keep: bool) -> dict[str, Any]:
        if keep or layer.weight in self.state:
            return cast(dict[str, Any], self.state[layer.weight])
        return {}

    def _restart(self) -> None:
        for group, preconditioner in zip(self.param_groups, self._preconditioners, strict=True):
            preconditioner.site = self._site_for(group)
            preconditioner.restart(group["step"], group)

    def _squares_of(self, layer: Layer) -> list[Tensor]:
        states = (self.state[param] for param in layer.params if param in self.state)
        return [state["exp_avg_sq"] for state in states if "exp_avg_sq" in state]

    def _site_for(self, options: Mapping[str, Any]) -> str:
        # The step size is the true gradient's, which the backward site does not keep.
        return "step" if options["normalize"] == "sgd" else self._site

    def _take_sums(self, skip: Tensor | None) -> dict[Layer, Tensor]:
        """The sums of this step over the rows of all ranks."""
        if self._ranks.size > 1:
            self._ranks.agree(
                lambda: [
                    *map(describe_options, self.param_groups),
                    *describe_layers(self._preconditioners),
                ]
            )
        layers = [layer for p in self._preconditioners for layer in p.layers]
        return take_sums(layers, self._ranks, skip)

    def _forget_earlier(self, preconditioner: Preconditioner, started: list[Layer]) -> None:
        """What layers got before they started were Adam's updates, averages of another quantity.

        Or zeros for a saved state to fill, which Adam would take for averages.
        """
        waiting = [layer for layer in preconditioner.layers if layer.inverse is None]
        primed = [layer for layer in waiting if "rows" in self._state_of(layer, False)]
        for param in (param for layer in started + primed for param in layer.params):
            forget_adam(self.state[param])
        for layer in primed:
            self.state[layer.weight].clear()
