"""Layers whose weight other modules may use by themselves, as nn.Linear's in torchvision's Swin.

Whether they do is not known before they run. A layer that has got a gradient and seen no rows has
the modules watched that hold its own (`gls_fused.capture.uses`); where their code reads weights,
from the first step on. It has them left alone again once its own module turns out to be called.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from gls_fused.capture.autocast import autocast_inputs
from gls_fused.capture.layer import Found, Layer
from gls_fused.capture.modules import plain_class
from gls_fused.capture.observed import observe
from gls_fused.capture.reads import reads_weights
from gls_fused.capture.uses import Observer, rewatch_module, unwatch_module, watch_module
from gls_fused.curvature.estimate import State

if TYPE_CHECKING:
    from gls_fused.capture.uses import Use


class Lender(Layer):
    """See above.

    Attributes:
        holders: modules that hold those with the weight.
        calls: functions of torch's that such a module's forward calls with all its weights, and
            that `take_call` stands in for.
    """

    calls: ClassVar[Sequence[Any]] = ()

    def __init__(self, found: Found) -> None:
        super().__init__(found)
        self.holders: list[nn.Module] = []

    def __reduce__(self) -> tuple[Any, ...]:
        kept = {"holders": self.holders, "watched": self.watched, "lent": self.lent}
        return (*super().__reduce__(), kept)

    @property
    def observer(self) -> Any:
        """The mode under which the holders' forward runs."""
        return Observer

    def find_holders(self, holders: Mapping[int, Sequence[nn.Module]]) -> None:
        """Find them among those that hold each module, and whether they seem to use the weight.

        Args:
            holders: by a module's id.
        """
        if not self.own_op:
            self.holders, self.watched = list(self.modules), True
            return
        for module in self.modules:
            for each in holders.get(id(module), ()):
                if all(each is not known for known in self.holders):
                    self.holders.append(each)
        self.watched = self._is_read

    @property
    def _is_read(self) -> bool:
        kinds: list[Any] = list(map(plain_class, self.holders))
        return any(map(reads_weights, kinds))

    def capture(self) -> None:
        super().capture()
        if self.watched:
            self.watch()

    def recapture(self) -> None:
        super().recapture()
        if self.watched:
            for holder in self.holders:
                rewatch_module(holder)

    def release(self) -> None:
        super().release()
        self.unwatch()

    def watch(self) -> None:
        """Have the holders' forward show where they use the weight."""
        self.watched = True
        for holder in self.holders:
            for module in self.modules:
                if module is holder or any(module is each for each in holder._modules.values()):
                    watch_module(holder, self, module)
                    break

    def unwatch(self) -> None:
        """Leave the holders' forward alone."""
        self.watched = False
        for holder in self.holders:
            unwatch_module(holder, self)

    def seek_uses(self) -> None:
        if not self.watched:
            self.watch()

    def settle_uses(self, state: State) -> None:
        if state.get("lent") and not self.lent:
            self.lent = True
            self.watch()
        # Its own module is called, or nobody knows who uses its weight.
        vain = self.called or (self.idle is not None and not self._is_read)
        if vain and self.own_op and self.watched and not self.lent:
            self.unwatch()

    def lend(
        self,
        owner: nn.Module,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        compute: Callable[..., Tensor],
        *,
        turned: bool = False,
    ) -> Tensor:
        """The output of a product that another module makes with the weight.

        Args:
            owner: the module whose parameters weight and bias are.
            inputs: [..., k].
            weight: the layer's, or some rows of it: [m', k]; all of one [k, m] of a layer that is
                turned.
            bias: what is added, the layer's own or not.
            compute: gives the output of inputs, weight and bias, by torch's own op.
            turned: whether the output has its columns in its last axis but one.
        """
        self.lent = True
        own = self._is_own(owner, weight, bias)
        if torch.compiler.is_compiling():
            inputs, weight, bias = autocast_inputs(inputs, weight, bias)
            # P is not for the gradient of somebody else's bias.
            apart = bias if self.ones and not own else None
            ours = bias if apart is None else None
            outputs = self.traced_product(inputs, self.turn(weight), ours)
            outputs = outputs if apart is None else outputs + apart
            return outputs.transpose(-2, -1) if turned else outputs
        if self.at_backward and not self.promised:
            self.leave_backward_site()
        self.stays_at_step = not self.promised
        (inputs,) = autocast_inputs(inputs)
        seen = self.gathers and self.sees(inputs)
        if not (seen or self.by_node):
            return compute(inputs, weight, bias)
        owned = self.couples and own and bias is not None and bias.requires_grad
        rows, weight = inputs if seen else None, self.shown_weight(weight)
        weight, theirs = observe(self, rows, weight, bias if owned else None)
        return compute(inputs, weight, theirs if owned else bias)

    def take_call(self, uses: Sequence[Use], func: Any, args: tuple[Any, ...]) -> Any:
        """What one of `calls` gives, for all layers that take it."""
        return func(*args)

    @abc.abstractmethod
    def traced_product(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output in a graph that torch.compile traces, without more arguments."""

    def _is_own(self, owner: nn.Module, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether the bias is the layer's, or its entries for these rows of the weight."""
        if bias is None or not (self.ones and self.owns_bias_of(owner)):
            return False
        whole = owner._parameters.get(str(self.bias_key))
        assert whole is not None
        if bias is whole:
            return weight.shape[0] == whole.shape[0]
        known, columns = owner._parameters[self.weight_key], weight.shape[1]
        assert known is not None
        if bias._base is not whole or bias.shape[0] != weight.shape[0]:
            return False
        if torch.compiler.is_compiling():
            # Dynamo knows no offsets; that the parts begin alike is taken for granted.
            return True
        first = weight.storage_offset() - known.storage_offset()
        stretch = (bias.storage_offset() - whole.storage_offset()) * columns, bias.stride(0)
        return bool(stretch == (first, weight.stride(0) // known.stride(0)))
