"""What steps derive from the states, kept as long as these hold what they held.

A state is a user's to replace, cast, move or clear between two steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import Tensor, float32, promote_types

from gls_fused.apply.kept import Kept
from gls_fused.curvature.estimate import State, check_device, recast
from gls_fused.host import held_by, holds
from gls_fused.state import AVERAGES

States: TypeAlias = defaultdict[Tensor, State]


class Followed:
    """States of an optimizer, as the last step left them.

    Attributes:
        kept: by a group's id, what its layers' updates take.
    """

    def __init__(self) -> None:
        self.kept: dict[int, Kept] = defaultdict(Kept)
        # What the states held, and for which members of the groups.
        self._known: list[Any] = []
        self._known_for: list[Any] | None = None
        self._probes: list[tuple[Tensor, str, Tensor]] = []

    def drop(self) -> None:
        """Refer to no state that may have been replaced since; the next step looks at all anew."""
        self.kept.clear()
        self._known, self._known_for, self._probes = [], None, []

    def drop_replaced(self, states: States) -> None:
        """The same, unless the states hold what they held."""
        if not holds(states, self._known):
            self.drop()

    def follow(self, states: States, owners: Mapping[Tensor, Any], members: list[Any]) -> None:
        """Drop what is kept unless the states hold what they held, for the same members."""
        if self._known_for is members and holds(states, self._known):
            return
        # In this order, as an interrupt may come in between.
        self._known_for = None
        self.kept.clear()
        self._known = held_by(states)
        # Who moves or casts a state does so with all of it: one of its tensors tells.
        self._probes = []
        for param in owners:
            state = states.get(param) or {}
            for key in (*AVERAGES, "step"):
                if state.get(key) is not None:
                    self._probes.append((param, key, state[key]))
                    break
        self._known_for = members

    def recast(self, states: States, names: Mapping[Tensor, str]) -> None:
        """Give states that were cast the dtypes that they have to have, before anything is changed.

        Args:
            names: of the parameters.
        Raises:
            RuntimeError: a state is not where its parameter is.
        """
        for param, key, probe in self._probes:
            # What most are, without a call.
            if param.dtype is float32 is probe.dtype and param.is_cpu and probe.is_cpu:
                continue
            wide = promote_types(param.dtype, float32)
            dtype = float32 if key == "step" else wide
            if probe.dtype is not dtype or probe.device != param.device:
                state, name = states[param], f"parameter {names.get(param, '')!r}"
                check_device(name, param, state, ("step", "master", *AVERAGES))
                recast(state, wide, AVERAGES)
                recast(state, float32, ("step", "master"))
                self.kept.clear()

    def finish(self, states: States) -> None:
        """At the end of a step, which may have made states that the next one has to look at."""
        if len(states) + sum(map(len, states.values())) != len(self._known):
            # Who empties the states leaves what this step has found, see `follow`.
            self._known_for = None
