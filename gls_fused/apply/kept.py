"""What the updates of layers take, kept from one step to the next as long as nothing of it changes.

To look states up, fill them and sort the layers takes longer than the update of small layers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gls_fused.apply.bounds import bound_rates, most_rms
from gls_fused.apply.buffers import SQUARES, fill_layer_states
from gls_fused.apply.fallback import Others
from gls_fused.apply.low_precision import is_low
from gls_fused.apply.matrices import of_each_matrix
from gls_fused.apply.spectral import normalize_of
from gls_fused.capture.layer import Layer
from gls_fused.capture.marks import Marks
from gls_fused.curvature.estimate import State
from gls_fused.distributed.sharding import rows_here
from gls_fused.host import match_all
from gls_fused.reference import Inverse

# Elements of layers of 16 bits that take their step together: 8 bytes each while they do.
MOST_COPIED = 1 << 24
# The options of a group by which layers are sorted, and their states filled.
CHOICES = (
    "normalize",
    "max_growth",
    "momentum",
    "low_precision",
    "split",
    "spectral_head",
    "spectral_share",
)

Groups = Mapping[Tensor, Mapping[str, Any]]


class Alike:
    """Layers that one update takes together: of one scale, backend, dtype, device and sharding.

    Attributes:
        layers: with a P and a gradient.
        normalize: how their steps are scaled, "auto" and heads resolved.
        params: weight and bias of one layer after the other, of those that are to move.
        low: whether any of these has 16 bits.
        elsewhere: the groups other than the weights', and the places of their biases in `params`.
        zeros: for what biases of these groups, see `gls_fused.apply.apart.Apart`.
        states: of each, with all its buffers.
        firsts: those of the weights, which hold what is the layer's.
        sizes: how many of the parameters each layer has.
        counts: how many mean squares each layer has.
        averages: m of the parameters; none without momentum.
        squares: v, and whatever else the layers are scaled by.
        growths: how many times lr the rates are, by matrix of this rank.
        slows: what `max_growth` keeps beside these; none where it has no part.
        steps: steps taken, 0-d, by layer.
        steps_of_params: the same, by parameter.
        matrix_sizes: `sizes`, by matrix of this rank.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        normalize: str,
        states: MutableMapping[Tensor, State],
        options: Mapping[str, Any],
        groups: Groups,
    ) -> None:
        self.layers, self.normalize = layers, normalize
        self.params: list[Tensor] = []
        self.states: list[State] = []
        self.firsts: list[State] = []
        self.sizes: list[int] = []
        for layer in layers:
            mine = [p for p in layer.params if p.grad is not None and p in groups]
            own = [states[param] for param in mine]
            fill_layer_states(layer, mine, own, options)
            self.params += mine
            self.states += own
            self.firsts.append(own[0])
            self.sizes.append(len(mine))
        self.low = any(map(is_low, self.params))
        places: dict[int, tuple[Mapping[str, Any], list[int]]] = {}
        for place, param in enumerate(self.params):
            group = groups[param]
            if group is not options:
                places.setdefault(id(group), (group, []))[1].append(place)
        self.elsewhere = list(places.values())
        self.zeros: dict[int, Tensor] = {}
        keys = SQUARES[normalize]
        by_param = normalize == "adam"
        self.counts = self.sizes if by_param else [len(keys)] * len(layers)
        holders = self.states if by_param else self.firsts
        self.squares = [state[key] for state in holders for key in keys]
        self.averages = [s["exp_avg"] for s in self.states] if options["momentum"] else []
        self.growths, self.slows = (
            [number for state in self.firsts if key in state for number in _numbers(state[key])]
            for key in ("growth", "slow_sq")
        )
        self.steps = [state["step"] for state in self.firsts]
        pairs = zip(self.steps, self.sizes, strict=True)
        self.steps_of_params = [step for step, size in pairs for _ in range(size)]
        self.matrix_sizes = of_each_matrix(layers, self.sizes)
        if self.slows:
            # They may be of a larger max_growth.
            torch._foreach_clamp_max_(self.growths, options["max_growth"])
        else:
            first = layers[0]
            one = torch.ones((), dtype=first.statistics_dtype, device=first.weight.device)
            self.growths = [one] * len(self.matrix_sizes)
        self._known: list[Inverse | None] = []
        self._inverses: list[Inverse | None] = []
        self._rates: Tensor | None = None
        self._rates_of: object = None

    def rates(self, options: Mapping[str, Any]) -> Tensor | None:
        """Bound and growth by matrix, [matrices, 2]; None where lr is neither bounded nor grows.

        Not to be written to.
        """
        share = options["max_change"]
        sizes = [] if share is None else [state["weight_rms"] for state in self.firsts]
        if not (sizes or self.slows):
            return None
        share = math.inf if share is None else share / most_rms(self.normalize, options)
        found = sizes + self.growths
        made_of = share, [tensor._version for tensor in found]
        # A graph that replays the step on a device makes them anew.
        if self._rates is None or not found[0].is_cpu or made_of != self._rates_of:
            self._rates = bound_rates(self.layers, sizes, share, self.growths)
            self._rates_of = made_of
        return self._rates

    def inverses(self) -> list[Inverse | None]:
        """P by matrix, None where p.grad holds D."""
        now = [layer.inverse for layer in self.layers]
        anew = any(layer.at_backward for layer in self.layers)
        if not anew and self._known and all(map(operator.is_, now, self._known)):
            return self._inverses
        self._known = []
        found: list[Inverse | None] = []
        holding = self._holding_directions() if anew else frozenset()
        for layer, size in zip(self.layers, self.sizes, strict=True):
            if layer in holding or layer.holds_direction():
                found += [None] * layer.matrices_here
            else:
                found += layer.inverses_for(size == len(layer.params))[layer.here]
        # Last, as an interrupt may come before.
        self._inverses, self._known = found, [] if anew else now
        return found

    def _holding_directions(self) -> frozenset[Layer]:
        """Layers whose p.grad is known to hold D; `Layer.holds_direction` is to ask the others."""
        asked = [
            layer
            for layer in self.layers
            if layer.at_backward and not layer.promised and type(layer.marks) is not Marks
        ]
        known = match_all(
            [layer.marks for layer in asked],
            [layer.weight for layer in asked],
            [layer.bias if layer.bias_trains else None for layer in asked],
        )
        return frozenset(asked) if known else frozenset()


class Kept:
    """The layers of a group, sorted. To be dropped when states, groups or layers have changed.

    Attributes:
        alike: the layers of this step.
        measured: whether all weights have been measured for `max_change`.
        others: the group's parameters that no layer steps.
    """

    def __init__(self) -> None:
        self.measured = False
        self.others = Others()
        self._layers: Sequence[Layer] = ()
        self._made_for: object = None
        self.alike: list[Alike] = []

    def sort(
        self,
        layers: Sequence[Layer],
        states: MutableMapping[Tensor, State],
        options: Mapping[str, Any],
        groups: Groups,
    ) -> list[Alike]:
        """The layers that are alike. The buffers of their states are made where there are none.

        Args:
            options: of the group of the layers' weights.
            groups: of every parameter that is to move.
        """
        choices = [options[key] for key in CHOICES]
        # Without a gradient, or of another dtype since the model was cast.
        moving = [
            None if param.grad is None else param.dtype
            for layer in layers
            for param in layer.params
        ]
        made_for = choices, moving
        if made_for != self._made_for or layers != self._layers:
            self.alike = [
                Alike(alike, normalize, states, options, groups)
                for normalize, alike in _sort(layers, states, options)
            ]
            self._layers, self._made_for = layers, made_for
        return self.alike


def _numbers(tensor: Tensor) -> Sequence[Tensor]:
    """Those of a layer's matrices on this rank, 0-d."""
    return rows_here(tensor).view(-1).unbind() if tensor.ndim else [tensor]


def _sort(
    layers: Sequence[Layer], states: Mapping[Tensor, State], options: Mapping[str, Any]
) -> list[tuple[str, list[Layer]]]:
    found: dict[tuple[object, ...], list[Layer]] = {}
    elements = 0
    for layer in layers:
        key: tuple[object, ...] = (
            normalize_of(layer, states[layer.weight], options),
            layer.backend_name,
            layer.weight.dtype,
            layer.weight.get_device(),
            layer.shards,
            layer.shards is not None and layer.stacked,
        )
        # So that the float32 copies of so many are alive at a time; not where they share an
        # all-reduce.
        copied = layer.shards is None and options["low_precision"] == "stochastic"
        if copied and is_low(layer.weight):
            key = (*key, elements // MOST_COPIED)
            elements += layer.weight.numel()
        found.setdefault(key, []).append(layer)
    return [(str(key[0]), alike) for key, alike in found.items()]
