"""The life of the statistics: started, applied, committed. Shared by GLS and attach."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from types import ModuleType
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F

from gls_fused.capture.layer import Layer
from gls_fused.capture.modules import captured_by, is_captured
from gls_fused.curvature.estimate import (
    State,
    check_device,
    commit,
    commits_at_once,
    recast,
    settle,
)
from gls_fused.distributed.ranks import Ranks
from gls_fused.distributed.sharding import knows_shards
from gls_fused.reference import Inverse
from gls_fused.scaling import is_known_to_skip, where_flag

# A layer that trains but has not been called in so many steps takes part in no statistics.
MOST_MISSES = 3

States: TypeAlias = MutableMapping[Tensor, State]


class Preconditioner:
    """Layers and their statistics, which live in states by weight that the caller hands over.

    The states are looked at anew each time, as somebody may replace, move, cast or clear them.

    Args:
        site: "auto", "step" or "backward".
        backend: a name that `resolve_backend` knows.
        ranks: who share the statistics.
    """

    def __init__(self, *, site: str, backend: str, ranks: Ranks) -> None:
        self.layers: list[Layer] = []
        self.site = site
        self.backend = backend
        self.ranks = ranks
        # What the layers' sites and gathering were decided from last.
        self._told: dict[Layer, tuple[Any, ...]] = {}
        self._draws: dict[torch.device, Tensor] = {}

    def backend_for(self, params: Sequence[Tensor]) -> ModuleType | None:
        """The backend of all layers, where it has kernels for the parameters' devices; or None."""
        backends = {layer.backend for layer in self.layers}
        devices = {layer.device.type for layer in self.layers}
        alike = len(backends) == 1 and all(
            param.device.type in devices and (param.is_floating_point() or param.is_complex())
            for param in params
        )
        return backends.pop() if alike else None

    def add(self, layers: Sequence[Layer], options: Mapping[str, Any]) -> None:
        """Capture layers, which share these options."""
        for layer in layers:
            promised = self.site == "backward"
            for earlier in filter(None, map(captured_by, layer.modules)):
                # Of a weight that has been replaced, by this one.
                if earlier is not layer and earlier in self.layers:
                    self.drop([earlier])
            layer.assign(options["curvature"], options["rank"], self.backend, promised=promised)
            layer.capture()
            self.layers.append(layer)

    def drop(self, layers: Sequence[Layer]) -> None:
        """Leave layers alone for good."""
        for layer in layers:
            self.layers.remove(layer)
            self._told.pop(layer, None)
            layer.release()

    def mark_last(self, place: Callable[[Layer], Any]) -> None:
        """Tell the layers which of them has the greatest place; of equals, the one added last."""
        places = [(place(layer), index) for index, layer in enumerate(self.layers)]
        for layer in self.layers:
            layer.last = False
        if places:
            self.layers[max(places)[1]].last = True

    def check_captured(self) -> None:
        """Raises RuntimeError if the modules have been detached, taken over or replaced."""
        sharded = knows_shards()
        for layer in self.layers:
            if not layer.captured:
                raise RuntimeError(
                    f"layer {layer.name!r} is no longer captured: the optimizer was detached, or "
                    "another one was built on the same model"
                )
            if sharded and (layer.resharded or layer.flattened):
                how = "flattened, as by FullyShardedDataParallel," if layer.flattened else "sharded"
                raise RuntimeError(
                    f"layer {layer.name!r}: its weight was {how} after the optimizer was built; "
                    "call fully_shard first. GLS does not cover tensor parallelism: pass such "
                    "parameters as a list"
                )
            routed = layer.routed
            if layer.watched or not (routed and all(map(is_captured, map(type, routed)))):
                layer.recapture()

    def discard_sums(self) -> None:
        """Forget the rows of this step."""
        for layer in self.layers:
            layer.forget()

    # ---- one step, in this order -----------------------------------------------------------------

    def adopt(self, layers: Sequence[Layer], states: States, *, known: bool = False) -> bool:
        """Follow what was done to weights and states since the last step.

        Args:
            known: that the states hold what they held then.
        Returns:
            Whether anything was.
        Raises:
            RuntimeError: a layer's statistics are on another device than its weight.
        """
        changed = False
        for layer in layers:
            # Where the user asked for D in p.grad, it is there already.
            at_backward = layer.at_backward and layer.promised
            if not layer.fits:
                layer.fit()
                changed = True
            elif known and layer.inverse is not None:
                continue
            state = states.get(layer.weight) or {}
            if _is_in_force(layer, state):
                continue
            keys = layer.curvature.shapes()
            check_device(f"layer {layer.name!r}: its weight", layer.weight, state, keys)
            recast(state, layer.statistics_dtype, keys)
            found = _inverse(layer, state)
            if _is_in_force(layer, state) or (layer.inverse is None and found is None):
                continue
            if _are_equal(found, layer.inverse):
                # Somebody has moved the states away and back: nothing has changed but where it is.
                layer.take_over(found)
                changed = True
                continue
            # Another estimate: the rows of this step were sketched with a basis that is gone, and D
            # in p.grad was made with its P.
            self.restore_gradients([layer])
            layer.forget()
            self._told.pop(layer, None)
            at_backward = at_backward and found is not None
            layer.expect(found, gathers=found is None, at_backward=at_backward)
            changed = True
        return changed

    def start(
        self,
        layers: Sequence[Layer],
        states: States,
        sums: dict[Layer, Tensor],
        options: Mapping[str, Any],
    ) -> list[Layer]:
        """Start the statistics of the layers that have none yet, from their first sums.

        This reads one number per layer on the host, once in its life; with several ranks, at each
        step until the layer has seen a row on one of them.

        Args:
            sums: of `take_sums`; those of layers without statistics are taken out. An idle layer
                that is among them starts with its next rows.
        Returns:
            The layers that have a P from here on.
        """
        started = []
        for layer in layers:
            if layer.inverse is not None:
                continue
            mine = sums.pop(layer, None)
            if layer.idle is not None:
                if mine is not None and mine[-1] > 0:
                    self._wake(layer)
            elif mine is not None and (rows := int(layer.count_rows(mine[:-1]))) > 0:
                state: State = {"rows": rows, "outputs": layer.outputs, "at_step": 0, "lent": 0}
                moments = layer.curvature.start(state, layer.sketched_with(), mine[:-1])
                started.append((layer, state, moments))
                layer.misses = 0
            elif mine is not None and mine[-1] > 0:
                # On some rank: all of them count alike.
                layer.misses = 0
            elif layer.weight.grad is not None:
                self._miss(layer)
        if started:
            settle(
                [(layer.curvature, state, moments) for layer, state, moments in started],
                options["damping"],
                options["power"],
            )
        for layer, state, _ in started:
            # At once, so that no error leaves a part of it.
            states.setdefault(layer.weight, {}).update(state)
            layer.expect(layer.curvature.inverse(state), gathers=layer.gathers, at_backward=False)
            self._told.pop(layer, None)
        return [layer for layer, _, _ in started]

    def commit(
        self,
        layers: Sequence[Layer],
        states: States,
        sums: Mapping[Layer, Tensor],
        options: Mapping[str, Any],
        skip: Tensor | None = None,
    ) -> None:
        """Blend the sums of a step into the statistics, and make the inverses anew.

        Args:
            layers: that have sums.
            sums: of `take_sums`.
            skip: 0-d bool; where it is true the states stay as they are.
        """
        own = []
        for layer in layers:
            kind, state, found = layer.curvature, states[layer.weight], sums[layer]
            gradients: list[Tensor] = []
            if self.ranks.size == 1:
                if commits_at_once(kind, state):
                    gradients = layer.led_to()
                else:
                    found = _counting(layer, found, skip)
            own.append((kind, state, found, gradients))
        commit(own, options["beta"], options["damping"], options["power"], skip)

    def expect(
        self, layers: Sequence[Layer], states: States, step: int, options: Mapping[str, Any]
    ) -> None:
        """Tell the layers what the coming step asks of them: to gather, and where P applies."""
        now, normalize = step % options["curvature_every"] == 0, options.get("normalize")
        grows = options.get("max_growth") is not None
        for layer in layers:
            known = self._told.get(layer)
            if known is None or layer.watched:
                layer.settle_uses(states.get(layer.weight) or {})
            # One that had no part in the step in which it was due gathers in its next one. Several
            # ranks would not know of one another's.
            layer.due = due = now or (layer.due and self.ranks.size == 1)
            layer.growth_due |= now and grows
            if due or layer.inverse is None:
                layer.draw = self._draw(layer.device, step)
            told = (
                due,
                layer.inverse is None,
                layer.weight.requires_grad,
                layer.stays_at_step,
                layer.midway,
                layer.compiled,
                layer.lent,
                normalize,
            )
            if known != told:
                state = states.get(layer.weight) or {}
                inverse = _inverse(layer, state)
                layer.expect(
                    inverse,
                    gathers=due or inverse is None,
                    at_backward=inverse is not None and self._at_backward(layer, state, options),
                )
                if layer.stays_at_step and inverse is not None:
                    state["at_step"] = 1
                if layer.lent and inverse is not None:
                    state["lent"] = 1
                # Not before, as an interrupt may come in between.
                self._told[layer] = told

    def leave_backward_sites(self, layers: Sequence[Layer]) -> None:
        """p.grad holds the gradient from here on, but for layers whose user asked for D there."""
        for layer in layers:
            if layer.at_backward and not layer.promised:
                layer.leave_backward_site()

    def rest(self, layers: Sequence[Layer]) -> None:
        """Layers that nobody trains: their gradients are true, and their rows are not looked at."""
        self.restore_gradients(layers)
        for layer in layers:
            layer.forget()
            self._told.pop(layer, None)
            layer.expect(None, gathers=False, at_backward=False)

    @staticmethod
    def restore_gradients(layers: Iterable[Layer]) -> None:
        """Where p.grad holds D by the site's own choice, it holds the gradient again."""
        for layer in layers:
            if layer.at_backward and not layer.promised:
                layer.restore_gradient()

    def restart(self) -> None:
        """The layers' states may have been replaced; the caller calls `expect` next."""
        # The rows gathered so far were sketched with a basis that is no longer in force.
        self.discard_sums()
        self.ranks.disagree()
        self._told.clear()
        for layer in self.layers:
            layer.stays_at_step, layer.scaled = False, None
            layer.midway = layer.weight.grad is not None
            self._wake(layer)

    # ---- what it knows of a layer ----------------------------------------------------------------

    def site_of(self, layer: Layer) -> str:
        """Where P is applied to this layer, or "undecided" before the first step."""
        if self.site != "auto" and not layer.stays_whole:
            return self.site
        if layer.inverse is None:
            return "undecided"
        return "backward" if layer.at_backward else "step"

    def _at_backward(self, layer: Layer, state: State, options: Mapping[str, Any]) -> bool:
        if layer.stays_whole:
            return False
        if options.get("normalize") == "sgd":
            # The step size is the true gradient's, which the backward site does not keep.
            return False
        if self.site != "auto":
            return self.site == "backward"
        if state.get("at_step"):
            layer.stays_at_step = True
        # Where a product with P costs little beside the passes, as on a GPU, and where others have
        # a part in the gradient, it stays the gradient.
        alone = self.ranks.size == 1 and layer.shards is None and not layer.compiled
        worth = layer.gains_by_rows(state["rows"])
        on_cpu = layer.device.type == "cpu"
        return worth and on_cpu and alone and not (layer.stays_at_step or layer.midway)

    def _draw(self, device: torch.device, step: int) -> Tensor:
        """The number of the step's sample on a device, for graphs that must not depend on it."""
        if device not in self._draws:
            # To be written in later steps, also where the optimizer is built in inference mode.
            with torch.inference_mode(False):
                self._draws[device] = torch.zeros((), dtype=torch.int64, device=device)
        return self._draws[device].fill_(step % (1 << 31))

    def _miss(self, layer: Layer) -> None:
        layer.misses += 1
        if layer.misses >= MOST_MISSES:
            otherwise = layer.missed
            if layer.called:
                otherwise = "its gradient is cleared and written anew before each step"
            layer.idle = layer.unseen or otherwise
            self._told.pop(layer, None)

    def _wake(self, layer: Layer) -> None:
        layer.idle = layer.unseen = None
        layer.misses, layer.called, layer.returned = 0, False, False
        self._told.pop(layer, None)


def take_sums(
    layers: Sequence[Layer], ranks: Ranks, skip: Tensor | None = None
) -> dict[Layer, Tensor]:
    """The sums of this step over the rows of all ranks, by layer; the layers forget theirs.

    Those of layers without statistics end with one more number: on how many ranks rows were seen.
    With several ranks, a layer that gathers takes part whether or not it saw rows on this one. Of
    idle layers there is that number alone, once they have been called; with several ranks, where
    others take part. Of a single rank's layers with statistics `commit` decides which count.

    Args:
        skip: 0-d bool; where it is true no row counts, without the host knowing.
    """
    taking: list[Layer] = []
    idle: list[Layer] = []
    for layer in layers:
        # A frozen layer sees no rows on any rank; on a single one it may have been frozen since.
        thawed = layer.weight.requires_grad or (ranks.size == 1 and layer.has_rows)
        if layer.gathers and thawed:
            (taking if layer.idle is None else idle).append(layer)
    own: dict[Layer, Tensor] = {}
    for layer in taking:
        sums = layer.take_sums()
        # Rows count when the gradient that they led to does.
        if sums is None or layer.weight.grad is None:
            if layer.weight.grad is not None:
                if not layer.called:
                    layer.seek_uses()
                if layer.inverse is not None and ranks.size == 1:
                    layer.misses += 1
            continue
        if layer.inverse is None or ranks.size > 1:
            sums = _counting(layer, sums, skip)
        # Rows that count for nothing, all zero or not finite, have been seen nevertheless.
        own[layer] = torch.cat([sums, sums.new_ones(1)]) if layer.inverse is None else sums
    for layer in idle:
        # Until the ranks meet.
        layer.returned |= layer.take_sums() is not None and layer.weight.grad is not None
        if layer.returned and (ranks.size == 1 or taking):
            own[layer] = layer.no_sums().new_ones(1)
    skipped = is_known_to_skip(skip)
    for layer in own:
        layer.due &= skipped
        if layer.inverse is not None:
            layer.misses = 0
    if ranks.size == 1 or not taking:
        return own
    taking += idle
    for layer in taking:
        if layer not in own:
            empty = layer.no_sums()
            own[layer] = F.pad(empty, (0, 1)) if layer.inverse is None else empty
    return dict(zip(taking, ranks.sum([own[layer] for layer in taking]), strict=True))


def _counting(layer: Layer, sums: Tensor, skip: Tensor | None) -> Tensor:
    """The sums, over no row where `skip` is true or the gradients that rows led to are zero."""
    sums = layer.counted(sums)
    return sums if skip is None else where_flag(skip, torch.zeros_like(sums), sums)


def _inverse(layer: Layer, state: State) -> Inverse | None:
    """P of a state, as views on it; None where it has none, or somebody has taken part of it."""
    whole = state.get("rows") and state.keys() >= layer.curvature.names
    return layer.curvature.inverse(state) if whole else None


def _is_in_force(layer: Layer, state: State) -> bool:
    """Whether the P that a layer has is its state's, in its place and dtype."""
    kind, inverse = layer.curvature, layer.inverse
    if inverse is None or not state.keys() >= kind.names:
        return False
    for name, part in zip(kind.inverse_names, inverse, strict=True):
        if (
            state[name] is not part
            or part.dtype is not layer.statistics_dtype
            or part.device != layer.device
        ):
            return False
    return True


def _are_equal(now: Inverse | None, before: Inverse | None) -> TypeGuard[Inverse]:
    """Whether P is the same to the last bit."""
    if before is None or now is None or type(before) is not type(now):
        return False
    pairs = list(zip(before, now, strict=True))
    alike = all(a.dtype is b.dtype and a.device == b.device for a, b in pairs)
    return alike and all(torch.equal(a, b) for a, b in pairs)


def release_all(layers: Iterable[Layer]) -> None:
    """Give all modules their own forward back."""
    for layer in layers:
        layer.release()
