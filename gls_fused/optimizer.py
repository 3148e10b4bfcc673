"""GLS, the optimizer: `_take_step` reads as the algorithm."""

from __future__ import annotations

import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from typing_extensions import Self

from gls_fused.apply.fallback import adam_, forget_adam
from gls_fused.apply.kept import Kept
from gls_fused.apply.layers import step_layers_
from gls_fused.apply.measure import measure_
from gls_fused.apply.spectral import MOST_SHARE
from gls_fused.capture.find import Uncovered
from gls_fused.capture.layer import Layer
from gls_fused.curvature.precision import outside_modes
from gls_fused.diagnostics import describe, describe_layers, diagnose
from gls_fused.distributed.ranks import Ranks, unwrapped
from gls_fused.followed import Followed
from gls_fused.groups import (
    SITES,
    Members,
    Scale,
    check_choice,
    check_dense,
    check_group_options,
    check_keys,
    check_split,
    describe_options,
    name_params,
    option_names,
    read_groups,
    split_group,
    warn_of_misspellings,
)
from gls_fused.host import has_frozen_gradient
from gls_fused.membership import Membership, check_splits
from gls_fused.preconditioner import (
    Preconditioner,
    release_all,
    take_sums,
)
from gls_fused.scaling import is_known_to_skip, take_flag, unscale_
from gls_fused.state import (
    MEASURED,
    VERSION,
    check_saved,
    check_state,
    copy_states,
    due_of,
    is_priming,
    prime_states,
    saved_group,
    saved_layer,
    saved_state,
    set_due,
    take_due,
    upgrade_defaults,
    upgrade_group,
    upgrade_state,
)

Params: TypeAlias = (
    nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
)


class GLS(torch.optim.Optimizer):
    """Each layer takes a damped least-squares step, half way from the gradient by default.

        Delta = argmin 1/(2n) ||A Delta' + n G||^2 + lambda/2 ||Delta||^2
              = -D0 (A'A/n + lambda I)^-1,    lambda = damping * tr(A'A/n) / min(d, s)
        step:   -D0 (A'A/n + lambda I)^-p,    p = 1/2 by default, 1 the least-squares step itself

    A [n, d] are a layer's inputs, G [n, m] the gradients at its outputs, D0 = G'A its gradient.
    Linear layers, convolutions, attention, recurrent layers, experts and heads tied to embeddings
    are covered, and what `gls_fused.register` names; other parameters take Adam's update with
    betas (momentum, beta2). The equations are in docs/method.md and in `gls_fused.reference`.

    Args:
        params: the model; or, with `model`, whatever torch.optim takes: parameters, named
            parameters, or dicts of either with options of their own. The "params" of a dict may
            also be a module or a list of modules, whose layers are then found without `model`.
        lr: >= 0; it means what it means for Adam, but with "sgd" and "none".
        model: where the layers of the parameters are found. A weight and its bias may be in
            different groups; all options but lr and weight_decay are those of the weight's.
        damping: > 0, dimensionless: relative to the mean eigenvalue of A'A/n.
        power: p, 1, .75, .5 or .25.
        momentum: in [0, 1); 0 keeps no buffer.
        beta: in [0, 1); decay of the curvature, per commit.
        beta2: in [0, 1); decay of the mean square of the directions.
        eps: > 0; added to the root mean square.
        weight_decay: >= 0; decoupled.
        normalize: what the step is divided by: "rms", one root mean square per layer; "row",
            one per output; "factored", one per output and input; "adam", one per element;
            "sgd", scaled to the gradient's norm; "none", the plain step. "spectral": its
            orthogonal factor, of weights but the last layer's; "auto": the same where it costs
            little and the weight's shorter side is 16 or more, but for linear layers, and
            convolutions of one tap, of models that normalise no activations; the others "factored".
        max_change: > 0 or None; the root mean square of a layer's step is at most so much of its
            weight's (or of 1 / sqrt(3 d) if that is more), about.
        max_growth: >= 1 or None; a layer's rate is up to so many times lr while its directions
            grow, as Adam's steps are longer then; not with "spectral", "sgd" and "none".
        split: >= 1; how many matrices a weight is, one above the other, for "spectral": 3 for a
            projection to queries, keys and values.
        spectral_head: whether "spectral" takes the last layer, too.
        spectral_share: >= 0; how large a share of the flops of a layer's forward and backward the
            orthogonal factor may take for "auto" to choose it.
        curvature: "subspace", `rank` directions of A'A/n; "dense", all of it ([d, d] per layer).
        rank: >= 1; directions of the subspace, at most d; "auto", 32 but at most m per layer.
        curvature_every: >= 1; steps between two that gather statistics.
        site: where P applies: "step", to the gradient; "backward", so that p.grad holds the
            direction; "auto", at the step but for nn.Linear and large convolutions on a CPU with
            few rows, where these are cheaper, as long as nothing else has a part in p.grad.
        backend: a name of `gls_fused.available_backends()`, or "auto".
        low_precision: how parameters of 16 bits take their step, "nearest", "stochastic" or
            "master", see `gls_fused.apply.low_precision`; averages and curvature are float32.
        seed: in [0, 2**32); of the bits that round stochastically, the same on every rank.
        process_group: whose ranks share the statistics and call `step` together; None, the
            default group where torch.distributed is initialised.
    Raises:
        ValueError: an option out of its range, a model or module without parameters,
            nn.DataParallel, FullyShardedDataParallel.
        TypeError: neither a module nor parameters, a rate or another real number that is none.
        RuntimeError: the backend is not available.
    Numerics: rows whose sums, over a call of the module, are not finite or all zero do not enter
        the statistics. A gradient that is not finite spoils all of its layer in the step that it
        takes, as P mixes inputs; Adam's would spoil the elements that it stands in.
    Source: a reconstruction of GLS by Erwan Fagnou; see docs/method.md for what is known of it.
    """

    # torch.amp.GradScaler then leaves a scale and a flag here, and waits for nothing.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Params | None = None,
        lr: float | Tensor = 1e-3,
        *,
        model: nn.Module | None = None,
        damping: float = 0.3,
        power: float = 0.5,
        momentum: float = 0.9,
        beta: float = 0.9,
        beta2: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        normalize: Scale = "auto",
        max_change: float | None = 0.1,
        max_growth: float | None = 2.0,
        split: int = 1,
        spectral_head: bool = False,
        spectral_share: float = MOST_SHARE,
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
        defaults = {
            "lr": lr,
            "damping": damping,
            "power": power,
            "momentum": momentum,
            "beta": beta,
            "beta2": beta2,
            "eps": eps,
            "weight_decay": weight_decay,
            "normalize": normalize,
            "max_change": max_change,
            "max_growth": max_growth,
            "split": split,
            "spectral_head": spectral_head,
            "spectral_share": spectral_share,
            "curvature": curvature,
            "rank": rank,
            "curvature_every": curvature_every,
            "low_precision": low_precision,
            "seed": seed,
        }
        check_group_options(defaults, site)
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a module or None, got {type(model).__name__}")
        groups = read_groups(params, model)
        model = params if model is None and isinstance(params, nn.Module) else model
        # What the groups hold, until all are known.
        self._waiting: list[Members] | None = []
        preconditioner = Preconditioner(site=site, backend=backend, ranks=Ranks(process_group))
        self._open(preconditioner, None if model is None else unwrapped(model), defaults)
        membership = self._membership
        try:
            super().__init__(groups, defaults)
            waiting, self._waiting = self._waiting, None
            if not any(group["params"] for group in self.param_groups):
                raise ValueError("params: got no parameters")
            self._cover(*membership.find(waiting, set(self._owners())))
        except BaseException:
            self.detach()
            raise
        self._warn_of_unseen(waiting)

    def _warn_of_unseen(self, added: Sequence[Members]) -> None:
        """Warns of groups that no layer can be found of."""
        model, held = self._membership.model, set(self._membership.held())
        known = any(members.modules or held.intersection(members.params) for members in added)
        if not known:
            given, mend = (
                ("without the model", "GLS(params, model=model)")
                if model is None
                else ("with a model that holds none of them", "the model whose parameters they are")
            )
            warnings.warn(
                f"params: given {given}, so that GLS sees no layer and all parameters "
                f"take Adam's update; pass {mend}",
                stacklevel=3,
            )

    def _open(
        self, preconditioner: Preconditioner, model: nn.Module | None, defaults: Mapping[str, Any]
    ) -> None:
        """Begin without layers, and leave the model alone once nobody refers to the optimizer."""
        self._preconditioner = preconditioner
        self._membership = Membership(preconditioner, model, defaults)
        self._followed = Followed()
        # A shallow copy shares the preconditioner, so its layers are released with that.
        self._finalizer = weakref.finalize(preconditioner, release_all, preconditioner.layers)
        self._finalizer.atexit = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of modules, parameters or named parameters, with options of its own."""
        check_keys(param_group)
        membership = self._membership
        members = split_group(param_group["params"])
        options = {**self.defaults, **param_group}
        # Who called this, or the constructor, by way of torch's.
        warn_of_misspellings(param_group, self.defaults, 2 if self._waiting is None else 4)
        check_group_options(options, self._preconditioner.site)
        if members.modules and not members.params:
            raise ValueError("params: got no parameters (an empty model, or one without any)")
        # Before anything is changed; at first a bias may be in a group that is still to come.
        found = None
        if self._waiting is None:
            found = membership.find([members], {*self._owners(), *members.params})
            check_splits(found[0], dict.fromkeys(members.params, options))
        params = (
            list(zip(members.names, members.params, strict=True))
            if members.names
            else members.params
        )
        super().add_param_group({**param_group, "params": params, "step": 0, "version": VERSION})
        index = len(self.param_groups) - 1
        membership.names.update(name_params(members, index, membership.model))
        if found is None:
            assert self._waiting is not None
            self._waiting.append(members)
            return
        try:
            self._cover(*found)
        except BaseException:
            # To be added once more.
            del self.param_groups[index]
            for param in members.params:
                membership.names.pop(param, None)
            raise
        if any(param.ndim > 1 for param in members.params):
            self._warn_of_unseen([members])

    def _cover(self, layers: Sequence[Layer], uncovered: Sequence[Uncovered]) -> None:
        self._membership.add(layers, uncovered, self._owners())
        self._expect()

    def _expect(self) -> None:
        """Tell the layers what the coming step asks of them."""
        for group, layers in self._groups():
            self._preconditioner.expect(layers, self.state, group["step"], group)

    def _groups(self) -> list[tuple[dict[str, Any], list[Layer]]]:
        """Every group with the layers whose weights it holds now."""
        for layer in self._membership.follow(self.param_groups):
            # Its gradient was made without it.
            layer.finish_step()
            group = self._membership.owners[layer.weight]
            self._preconditioner.expect([layer], self.state, group["step"], group)
        return self._membership.parts

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
            RuntimeError: the optimizer is detached from the model, a gradient is sparse, or a state
                is on another device than its parameter; nothing has moved then.
        Numerics: where a torch.amp.GradScaler found a gradient that is not finite, nothing changes,
            and the rows of the step are forgotten; a device decides that by itself, so that there
            the skipped step still counts for `curvature_every`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with outside_modes():
            rested = self._rest_gradients()
            try:
                self._take_step()
            finally:
                for param, gradient in rested:
                    param.grad = gradient
        return loss

    def _rest_gradients(self) -> list[tuple[Tensor, Tensor | None]]:
        """Take away the gradients of layers' parameters that rest, see `Layer.rested`."""
        if not any(has_frozen_gradient(group["params"]) for group in self.param_groups):
            return []
        params = [param for layer in self._preconditioner.layers for param in layer.rested()]
        found = [(param, param.grad) for param in params]
        for param in params:
            param.grad = None
        return found

    def _take_step(self) -> None:
        groups = self._groups()
        preconditioner, membership = self._preconditioner, self._membership
        preconditioner.check_captured()
        check_dense(self.param_groups)
        membership.check_options()
        kept = self._follow_states()
        for group, layers in groups:
            if preconditioner.adopt(layers, self.state, known=bool(kept)):
                kept.clear()
            if group["normalize"] == "sgd":
                # Where it was another scale in the backward, p.grad may hold D.
                preconditioner.leave_backward_sites(layers)
        unscale_(self, membership.owners)
        if is_priming(self.param_groups, self.state):
            prime_states(groups, self.state)
            preconditioner.discard_sums()
            return
        skip = take_flag(self)
        skipped = is_known_to_skip(skip)
        sums = self._take_sums(groups, skip)
        # By identity, as a tensor's own hash is a call of Python's.
        ready: set[int] = set()
        for group, layers in groups:
            started = preconditioner.start(layers, self.state, sums, group)
            if self._forget_earlier(layers, started):
                kept.clear()
            if group["max_change"] is not None:
                self._measure_new(layers, started, group, kept[id(group)])
            mine = [p for p in layers if p.weight.grad is not None and p.inverse is not None]
            ready.update(id(param) for layer in mine for param in layer.params)
        seed_of = membership.seed_of
        for group, layers in groups:
            stepping = [layer for layer in layers if id(layer.weight) in ready]
            step_layers_(
                stepping, self.state, group, membership.owners, kept[id(group)], seed_of, skip
            )
            others = [p for p in group["params"] if id(p) not in ready and p.grad is not None]
            known = kept[id(group)].others
            if others and not known.step_(others, group, skip):
                own, backend = [self.state[p] for p in others], preconditioner.backend_for(others)
                adam_(others, own, group, seed_of, skip, backend)
                known.keep(others, own, backend)
        for group, layers in groups:
            summed = [layer for layer in layers if layer in sums]
            if summed:
                preconditioner.commit(summed, self.state, sums, group, skip)
            taken = kept[id(group)].alike
            grown = [alike for alike in taken if any(layer.growth_due for layer in alike.layers)]
            weights = summed if group["max_change"] is not None else []
            if weights or grown:
                measure_(weights, grown, self.state, group, skip)
            for layer in (layer for alike in grown for layer in alike.layers):
                layer.growth_due &= skipped
            if not skipped:
                group["step"] += 1
            for layer in layers:
                layer.finish_step()
            preconditioner.expect(layers, self.state, group["step"], group)
        self._followed.finish(self.state)

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and forget the rows that led to them."""
        # The gradients of a group that has been taken out are somebody else's.
        self._groups()
        super().zero_grad(set_to_none)
        self._preconditioner.discard_sums()
        self._followed.drop_replaced(self.state)

    def state_dict(self) -> dict[str, Any]:
        """Tensors, plain numbers and names, by torch's keys; see `gls_fused.state`."""

        def lay_out(_: torch.optim.Optimizer, found: dict[str, Any]) -> dict[str, Any]:
            states = {key: saved_state(state) for key, state in found["state"].items()}
            saved = list(map(saved_group, found["param_groups"]))
            for (group, layers), numbers in zip(self._checked_groups(), saved, strict=True):
                places = dict(zip(group["params"], numbers["params"], strict=True))
                for layer in layers:
                    place = places[layer.weight]
                    if place in states:
                        states[place] = saved_layer(layer, states[place], group)
            return {**found, "state": states, "param_groups": saved}

        # Before the hooks that may change what is saved.
        hook = self.register_state_dict_post_hook(lay_out, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state that `state_dict` gave, of an optimizer over the same model.

        Raises:
            ValueError, TypeError: it is of another model, rank, curvature or later version, or
                holds options or numbers that are none; nothing changes.
        """
        check_saved(state_dict)
        checked: dict[str, Any] = {}
        copies: dict[Tensor, dict[str, Any]] = {}
        layers = [layers for _, layers in self._groups()]

        def check(_: torch.optim.Optimizer, found: dict[str, Any]) -> dict[str, Any]:
            checked.update(upgrade_state(found, option_names(self.defaults)))
            for group in checked["param_groups"]:
                check_group_options(group, self._preconditioner.site)
            check_state(checked, self.param_groups, layers, self._membership.names)
            for mine, group in zip(layers, checked["param_groups"], strict=True):
                for layer in mine:
                    check_split(layer, group, last=layer.last)
            # torch casts what it loads to the parameters' dtypes, and shares what it has not to.
            copies.update(copy_states(checked, self.param_groups))
            return checked

        def restore(_: torch.optim.Optimizer) -> None:
            self._preconditioner.restore_gradients(self._preconditioner.layers)
            self.state.update(copies)
            for _group, layers in self._groups():
                take_due(layers, self.state)
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
        release_all(self._preconditioner.layers)
        self._followed.drop()

    def __copy__(self) -> Self:
        """Another with the same groups, states and layers, as a shallow copy of torch's own."""
        copied = type(self).__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        preconditioner, membership = self._preconditioner, self._membership
        return {
            **super().__getstate__(),
            "_own": {
                "site": preconditioner.site,
                "backend": preconditioner.backend,
                "ranks": preconditioner.ranks,
                "layers": preconditioner.layers,
                "captured": [layer.captured for layer in preconditioner.layers],
                "due": [due_of(layer) for layer in preconditioner.layers],
                "model": membership.model,
                "names": membership.names,
                "uncovered": membership.uncovered,
            },
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For a copy or a pickle, which captures the copied model; and for `load_state_dict`."""
        theirs = dict(state)
        own = theirs.pop("_own", None)
        super().__setstate__(theirs)
        if own is None:
            if "_preconditioner" not in vars(self):
                raise ValueError(
                    "pickle: expected one with layers, got an optimizer of an earlier version; "
                    "load its state_dict() instead"
                )
            return
        upgrade_defaults(self.defaults)
        for index, group in enumerate(self.param_groups):
            group.update(upgrade_group(group, index, option_names(self.defaults)))
        self._waiting = None
        parts = {key: own[key] for key in ("site", "backend", "ranks")}
        self._open(Preconditioner(**parts), own["model"], self.defaults)
        self._membership.names, self._membership.uncovered = own["names"], own["uncovered"]
        groups = self._owners()
        for layer, captured, due in zip(own["layers"], own["captured"], own["due"], strict=True):
            self._preconditioner.add([layer], groups.get(layer.weight, self.defaults))
            set_due(layer, due)
            if not captured:
                layer.release()
        self._membership.mark_last()
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
        """Per layer its rows, rank, site and backend; then why the rest takes Adam's update.

        A line says how many norms, biases and other parameters of one dimension there are, the
        last one how large a share of the parameters the layers hold.
        """
        self._checked_groups()
        membership, layers = self._membership, self._preconditioner.layers
        lines = describe_layers(self._preconditioner, self.state, membership.owners)
        return describe(lines, layers, membership.uncovered, list(membership.owners), "Adam")

    def diagnostics(self) -> dict[str, float]:
        """Numbers to log, by layer: `{"encoder.0/trace": ..., "encoder.0/captured": ..., ...}`.

            trace       t = tr(Sigma), the mean square norm of a layer's rows
            captured    tr(M) / t, the share of it in the directions that are solved exactly
            damping     lambda = damping t / min(d, s)
            samples     s, how many rows of equal weight its statistics stand for
            update_rms  root mean square of D = D0 P, bias-corrected; not with "sgd" and "none",
                        nor of orthogonal steps
            growth      how many times lr its rate is; only where max_growth has a part in it
            lr_share    the share of that rate that max_change leaves its step, 1 where it does not
                        hold; only with max_change, and not with "sgd" and "none"
            held        in what share of the steps max_change held: of those that gather, of late,
                        a mean with the statistics' decay beta; only with max_change

        Computed when called, from the state; a layer without statistics yet is left out. Under
        fully_shard it is a collective: every rank has to call it. With several groups and no
        `model`, names begin with `group0/`, `group1/`, ...
        """
        groups = self._checked_groups()
        apart = self._membership.model is None and len(groups) > 1
        prefixes = [f"group{index}/" if apart else "" for index in range(len(groups))]
        return diagnose(
            [
                (prefix, layers, group)
                for prefix, (group, layers) in zip(prefixes, groups, strict=True)
            ],
            self.state,
            self._squares_of,
        )

    def __repr__(self) -> str:
        return f"{super().__repr__()}\n{self.report()}"

    def _owners(self) -> dict[Tensor, dict[str, Any]]:
        return {param: group for group in self.param_groups for param in group["params"]}

    def _checked_groups(self) -> list[tuple[dict[str, Any], list[Layer]]]:
        """`_groups`, whose options are in range."""
        groups = self._groups()
        self._membership.check_options()
        return groups

    def _restart(self) -> None:
        self._followed.drop()
        self._preconditioner.restart()
        self._expect()

    def _squares_of(self, layer: Layer) -> list[Tensor]:
        states = (self.state[param] for param in layer.params if param in self.state)
        return [state["exp_avg_sq"] for state in states if "exp_avg_sq" in state]

    def _follow_states(self) -> dict[int, Kept]:
        """What is kept of the states, by a group's id; before anything is changed.

        Raises:
            RuntimeError: a state is not where its parameter is.
        """
        if type(self.state) is not defaultdict:
            self.state = defaultdict(dict, self.state)
        membership = self._membership
        self._followed.follow(self.state, membership.owners, membership.seen)
        self._followed.recast(self.state, membership.names)
        return self._followed.kept

    def _measure_new(
        self,
        layers: Sequence[Layer],
        started: Sequence[Layer],
        group: Mapping[str, Any],
        kept: Kept,
    ) -> None:
        """The weights of layers that have just started, or that were loaded without that."""
        if kept.measured and not started:
            return
        settled = [layer for layer in layers if layer.inverse is not None]
        new = [p for p in settled if p in started or "weight_rms" not in self.state[p.weight]]
        measure_(new, (), self.state, group)
        kept.measured = True

    def _take_sums(
        self, groups: Sequence[tuple[dict[str, Any], list[Layer]]], skip: Tensor | None
    ) -> dict[Layer, Tensor]:
        """The sums of this step over the rows of all ranks."""
        preconditioner = self._preconditioner
        if preconditioner.ranks.size > 1:
            preconditioner.ranks.agree(
                lambda: [
                    *map(describe_options, self.param_groups),
                    *describe_layers(preconditioner, self.state, whys=False),
                ]
            )
        layers = [layer for _, layers in groups for layer in layers]
        return take_sums(layers, preconditioner.ranks, skip)

    def _forget_earlier(self, layers: Sequence[Layer], started: Sequence[Layer]) -> bool:
        """What layers got before they started were Adam's updates, averages of another quantity.

        Or zeros for a saved state to fill, which Adam would take for averages.

        Returns:
            Whether there is such a layer.
        """
        waiting = [layer for layer in layers if layer.inverse is None]
        primed = [layer for layer in waiting if "rows" in self.state.get(layer.weight, {})]
        for param in (param for layer in (*started, *primed) for param in layer.params):
            forget_adam(self.state[param])
        for layer in primed:
            plain = "rows", "outputs", "at_step", "lent", *MEASURED
            for key in (*plain, *layer.curvature.shapes()):
                self.state[layer.weight].pop(key, None)
        return bool(started or primed)
