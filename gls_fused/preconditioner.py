"""The life of the statistics: started, applied, committed. Shared by GLS and attach."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gls_fused.backends.dispatch import backend_name, resolve_backend
from gls_fused.capture.layer import Layer
from gls_fused.curvature.estimate import State, blend, make_curvature, settle
from gls_fused.distributed.ranks import Ranks
from gls_fused.scaling import where_flag

CURVATURES = ("subspace", "dense")
SITES = ("auto", "step", "backward")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected {', '.join(choices)}, got {value!r}")


def check_number(
    name: str, value: Any, low: float, high: float = math.inf, *, closed: bool = False
) -> None:
    """Raises ValueError unless low < value < high, or low <= value with `closed`."""
    if not ((low <= value if closed else low < value) and value < high):
        bracket = "[" if closed else "("
        raise ValueError(f"{name}: expected a value in {bracket}{low}, {high}), got {value}")


def check_count(name: str, value: Any, otherwise: str = "") -> None:
    """Raises ValueError unless `value` is a whole number, at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a whole number, at least 1{otherwise}, got {value!r}")


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first option of the statistics that is out of range."""
    check_number("damping", options["damping"], 0)
    check_number("beta", options["beta"], 0, 1, closed=True)
    if options["rank"] != "auto":
        check_count("rank", options["rank"], " or 'auto'")
    check_count("curvature_every", options["curvature_every"])
    check_choice("curvature", options["curvature"], CURVATURES)


class Preconditioner:
    """The statistics of some layers that share their options.

    Args:
        layers: captured from here on.
        state_of: where a layer's state is kept; asked anew each time, as a state may be replaced.
            Asked not to keep it, an empty one where there is none.
        site: "auto", "step" or "backward".
        backend: a name that `resolve_backend` knows.
        ranks: who share the statistics.
    """

    def __init__(
        self,
        layers: list[Layer],
        state_of: Callable[[Layer, bool], State],
        options: Mapping[str, Any],
        *,
        site: str,
        backend: str,
        ranks: Ranks,
    ) -> None:
        self.layers = layers
        self.ranks = ranks
        self.state_of = state_of
        self.site = site
        # Whether the layers know of the inverses in force, and whether they were told to gather.
        self._settled = self._gathers = False
        self.backend = resolve_backend(backend, {layer.weight.device.type for layer in layers})
        kind, rank = options["curvature"], options["rank"]
        for layer in layers:
            layer.assign(make_curvature(kind, layer.dim, layer.outputs, rank, self.backend))
            layer.capture()

    def check_captured(self) -> None:
        """Raises RuntimeError if the modules have been detached or taken over."""
        for layer in self.layers:
            if not layer.captured:
                raise RuntimeError(
                    f"layer {layer.name!r} is no longer captured: the optimizer was detached, or "
                    "another one was built on the same model"
                )
            if layer.resharded:
                raise RuntimeError(
                    f"layer {layer.name!r}: its weight was sharded after the optimizer was built; "
                    "call fully_shard first"
                )

    def release(self) -> None:
        """Give all modules their own forward back."""
        for layer in self.layers:
            layer.release()

    def discard_sums(self) -> None:
        """Forget the rows of this step."""
        for layer in self.layers:
            layer.take_sums()

    def start(self, sums: dict[Layer, Tensor], options: Mapping[str, Any]) -> list[Layer]:
        """Start the statistics of the layers that have none yet, from their first sums.

        This reads one number per layer on the host, once in its life; with several ranks, at each
        step until the layer has seen a row on one of them.

        Args:
            sums: of `take_sums`; those of layers without statistics are taken out.
        Returns:
            The layers that have a P from here on.
        """
        started = []
        for layer in self.layers:
            if layer.inverse is None and layer in sums:
                mine = sums.pop(layer)
                rows = int(mine[0])
                if rows > 0:
                    state = self.state_of(layer, True)
                    state.update(rows=rows, outputs=layer.outputs)
                    started.append((layer, state, layer.curvature.start(state, mine)))
        if started:
            settle(
                [(layer.curvature, state, sketch) for layer, state, sketch in started],
                options["damping"],
            )
            self._settled = False
        for layer, state, _ in started:
            layer.inverse = layer.curvature.inverse(state)
        return [layer for layer, _, _ in started]

    def commit(
        self, sums: Mapping[Layer, Tensor], options: Mapping[str, Any], skip: Tensor | None = None
    ) -> None:
        """Blend the sums of a step into the statistics, and make the inverses anew.

        Args:
            sums: of `take_sums`, which count no row where `skip` is true.
            skip: 0-d bool; where it is true the states stay as they are.
        """
        own = [
            (layer.curvature, self.state_of(layer, True), sums[layer])
            for layer in self.layers
            if layer in sums
        ]
        settle(blend(own, options["beta"]), options["damping"], skip)

    def expect(self, step: int, options: Mapping[str, Any]) -> None:
        """Tell the layers what the coming step asks of them: to gather, and where P applies."""
        gathers = step % options["curvature_every"] == 0
        if self._settled and gathers == self._gathers:
            return
        self._settled, self._gathers = True, gathers
        for layer in self.layers:
            state = self.state_of(layer, False)
            if state.get("rows"):
                at_backward = self._applies_at_backward(layer, state)
                inverse = layer.curvature.inverse(state)
                layer.expect(inverse, gathers=gathers, at_backward=at_backward)
            else:
                layer.expect(None, gathers=True, at_backward=False)

    def restart(self, step: int, options: Mapping[str, Any]) -> None:
        """`expect`, where the layers' states may have been replaced."""
        # The rows gathered so far were sketched with a basis that is no longer in force.
        self.discard_sums()
        self.ranks.disagree()
        self._settled = False
        self.expect(step, options)

    def site_of(self, layer: Layer) -> str:
        """Where P is applied to this layer, or "undecided" before the first step."""
        if self.site != "auto":
            return self.site
        if layer.inverse is None:
            return "undecided"
        return "backward" if layer.at_backward else "step"

    def _applies_at_backward(self, layer: Layer, state: State) -> bool:
        if self.site == "auto":
            # A rank multiplies its rows, or the gradient, of which it has a part where sharded.
            gradients = self.ranks.size if layer.shards is None else 1
            fewer: bool = state["rows"] < layer.outputs * gradients
            return layer.kind == "Linear" and fewer
        return self.site == "backward"


def take_sums(
    layers: Sequence[Layer], ranks: Ranks, skip: Tensor | None = None
) -> dict[Layer, Tensor]:
    """The sums of this step over the rows of all ranks, by layer; the layers forget theirs.

    With several ranks, a layer that gathers takes part whether or not it saw rows on this one.

    Args:
        skip: 0-d bool; where it is true no row counts, without the host knowing.
    """
    # A frozen layer sees no rows on any rank.
    taking = [layer for layer in layers if layer.gathers and layer.weight.requires_grad]
    own = {layer: sums for layer in taking if (sums := layer.take_sums()) is not None}
    if skip is not None:
        for layer, sums in own.items():
            own[layer] = where_flag(skip, torch.zeros_like(sums), sums)
    if ranks.size == 1 or not taking:
        return own
    parts = [own[layer] if layer in own else layer.no_sums() for layer in taking]
    return dict(zip(taking, ranks.sum(parts), strict=True))


def describe_layers(preconditioners: Sequence[Preconditioner]) -> list[str]:
    """A line per layer: kind, shape, rows, rank, site and backend."""
    lines = []
    for preconditioner in preconditioners:
        for layer in preconditioner.layers:
            state = preconditioner.state_of(layer, False)
            rank = f"rank {state['basis'].shape[1]}" if "basis" in state else "dense"
            started = f"{state['rows']} rows, {rank}" if state.get("rows") else "no rows yet"
            lines.append(
                f"{layer.name or layer.kind}: GLS ({layer.kind} {layer.dim} -> {layer.outputs}, "
                f"{started}, site {preconditioner.site_of(layer)}, "
                f"backend {backend_name(preconditioner.backend)})"
            )
    return lines
