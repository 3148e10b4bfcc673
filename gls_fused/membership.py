"""Whose a parameter is: of which group, and of which layer.

Groups are a user's to change between two steps; what follows from them is found anew then.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gls_fused.apply.low_precision import Seeds, make_seeds
from gls_fused.backends.dispatch import resolve_backend
from gls_fused.capture.find import Uncovered, find_layers
from gls_fused.capture.layer import Layer
from gls_fused.distributed.sharding import reshard
from gls_fused.groups import (
    Members,
    check_kept,
    check_rate,
    check_rest,
    check_split,
    name_params,
    option_names,
)
from gls_fused.host import are_same
from gls_fused.preconditioner import Preconditioner
from gls_fused.state import VERSION


class Membership:
    """Groups with their layers.

    Args:
        preconditioner: holds the layers.
        model: where the layers of parameters are found; None for those of modules alone.
        defaults: the options of a group that was made without them.

    Attributes:
        names: of all parameters that a group or the model has.
        uncovered: the parameters that no layer owns.
        parts: every group with the layers whose weights it holds.
        owners: each parameter's group.
        seen: what these were found for; the same object as long as nothing has changed.
    """

    def __init__(
        self, preconditioner: Preconditioner, model: nn.Module | None, defaults: Mapping[str, Any]
    ) -> None:
        self.model = model
        self.names: dict[Tensor, str] = {}
        self.uncovered: list[Uncovered] = []
        self.parts: list[tuple[dict[str, Any], list[Layer]]] = []
        self.owners: dict[Tensor, dict[str, Any]] = {}
        self.seen: list[Any] = []
        self._preconditioner = preconditioner
        self._defaults = defaults
        # By a group's id, what its parameters are rounded by.
        self._seeds: dict[int, Seeds] = {}
        # By a group's id, the options that have been found in range, and which they are.
        self._checked_options: list[str] = []
        self._checked: dict[int, tuple[list[Any], list[Any]]] = {}

    def held(self) -> list[Tensor]:
        """The model's parameters; under fully_shard their shards."""
        reshard(self.model)
        return [] if self.model is None else list(self.model.parameters())

    def seed_of(self, param: Tensor) -> int:
        """What a parameter is rounded by, see `make_seeds`."""
        return self._seeds[id(self.owners[param])](param)

    def find(
        self, added: Sequence[Members], trained: set[Tensor]
    ) -> tuple[list[Layer], list[Uncovered]]:
        """The layers that new groups bring along, and the parameters that no layer owns.

        Args:
            trained: the parameters of all groups, these among them.
        Raises:
            RuntimeError: the backend is not available for them.
        """
        new = {param for members in added for param in members.params}
        known = {layer.weight for layer in self._preconditioner.layers}
        roots = [members.modules for members in added]
        if self.model is not None:
            held = set(self.held())
            modules = itertools.chain.from_iterable(roots)
            outside = [each for each in modules if not held.issuperset(each[1].parameters())]
            roots = [[("", self.model)], outside]
        layers: list[Layer] = []
        uncovered: list[Uncovered] = []
        for root in roots:
            found, rest = find_layers(root, trained)
            layers += [layer for layer in found if layer.weight not in known]
            known.update(layer.weight for layer in found)
            uncovered += [each for each in rest if each.param in new]
        resolve_backend(self._preconditioner.backend, {p.weight.device.type for p in layers})
        return layers, uncovered

    def add(
        self,
        layers: Sequence[Layer],
        uncovered: Sequence[Uncovered],
        groups: Mapping[Tensor, Mapping[str, Any]],
    ) -> None:
        """Capture layers; what their next step asks of them is still to be told.

        Args:
            groups: of all parameters.
        Raises:
            ValueError: a weight is no `split` matrices.
        """
        check_splits(layers, groups)
        for layer in layers:
            self._preconditioner.add([layer], groups[layer.weight])
        self.mark_last()
        self.uncovered += uncovered
        self._preconditioner.ranks.disagree()

    def mark_last(self) -> None:
        """Tell the layers which is the last of the model, or of those that were added."""
        places: dict[Tensor, int] = {param: place for place, param in enumerate(self.held())}
        # As `find_layers` has it: a head that is tied to an embedding is last.
        self._preconditioner.mark_last(
            lambda layer: (layer.table is not None, places.get(layer.weight, len(places)))
        )

    def follow(self, groups: Sequence[dict[str, Any]]) -> list[Layer]:
        """Find all anew where the groups' members or the layers are others than they were.

        Returns:
            Layers that this has added, of parameters that somebody has put into the groups without
            `add_param_group`: they are to be told what the coming step asks of them.
        """
        layers = self._preconditioner.layers
        # Each group after its parameters, so that one that has moved to another is elsewhere.
        held = [each for group in groups for each in (*group["params"], group)]
        if are_same([*held, *layers], self.seen):
            return []
        # Nothing is taken for seen until all has been looked at, as what follows may raise.
        self.seen, self.owners = [], {}
        self._checked.clear()
        options = option_names(self._defaults)
        # All but lr, which a schedule changes in every step.
        self._checked_options = [option for option in options if option != "lr"]
        for group in groups:
            # One that somebody made without us lacks what torch's own `add_param_group` gives.
            for option in options:
                group.setdefault(option, self._defaults[option])
            group.setdefault("step", 0)
            group.setdefault("version", VERSION)
            self.owners.update(dict.fromkeys(group["params"], group))
        self._seeds = {id(group): make_seeds(group) for group in groups}
        self._forget_gone()
        new = self._cover_by_hand()
        self.parts = [
            (group, [layer for layer in layers if self.owners.get(layer.weight) is group])
            for group in groups
        ]
        for layer in layers:
            layer.train_bias(layer.bias in self.owners)
        self._preconditioner.rest([p for p in layers if p.weight not in self.owners])
        self.seen = [*held, *layers]
        return new

    def _forget_gone(self) -> None:
        """Keep nothing of parameters that neither a group nor the model has any more."""
        if self.model is None:
            return
        there = {*self.owners, *self.held()}
        self.names = {param: name for param, name in self.names.items() if param in there}
        self.uncovered = [each for each in self.uncovered if each.param in there]
        # What fully_shard gathers is another parameter than its shards.
        layers = self._preconditioner.layers
        gone = [p for p in layers if p.weight not in there and p.shards is None]
        if gone:
            self._preconditioner.drop(gone)
            self.mark_last()

    def _cover_by_hand(self) -> list[Layer]:
        """Add the layers of parameters that are in a group without `add_param_group`.

        As callbacks of Lightning do that thaw a model which they resume.
        """
        added = [param for param in self.owners if param not in self.names]
        if not added or self.model is None:
            return []
        members = Members([], added, [])
        layers, uncovered = self.find([members], set(self.owners))
        self.add(layers, uncovered, self.owners)
        self.names.update(name_params(members, 0, self.model))
        return layers

    def check_options(self) -> None:
        """What somebody may have changed by hand since the last step, before anything moves.

        Raises:
            ValueError, TypeError: an option out of its range, or one that layers cannot change.
        """
        for group, layers in self.parts:
            check_rate(group["lr"], waits=False)
            now = [self.seen, *map(group.__getitem__, self._checked_options)]
            known = self._checked.get(id(group), ([], []))
            if are_same(now, known[0]):
                continue
            check_rest(group, self._preconditioner.site)
            # A schedule may change the others in every step.
            made = [self.seen, *map(group.get, ("curvature", "rank", "split", "spectral_head"))]
            for layer in [] if are_same(made, known[1]) else layers:
                check_split(layer, group, last=layer.last)
                check_kept(layer, group)
            self._checked[id(group)] = now, made


def check_splits(layers: Sequence[Layer], groups: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """`check_split` of new layers, the last of which is the model's last."""
    for layer in layers:
        if layer.weight in groups:
            check_split(layer, groups[layer.weight], last=layer is layers[-1])
