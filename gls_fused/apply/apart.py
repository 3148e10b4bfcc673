"""Biases that are in another group than their weight."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gls_fused.apply.low_precision import is_low
from gls_fused.reference import wide_rate


class Apart:
    """Biases whose group has another lr or weight decay than their weight's.

    The update of a layer writes -lr update into a zero in their place, from which the bias takes
    its own step:

        b <- b (1 - lr_b weight_decay_b) - lr_b update

    Args:
        copies: what is to be written, the parameters themselves or what stands for them.
        options: of the weights' group.
        elsewhere: other groups, and the places of their biases among the copies.
        zeros: takes what stands in for a bias, by its place, for the next step.
    Attributes:
        written: what the update is to write to.
        lr: with which rate; not the group's where that is 0 and would hide the update.
    """

    def __init__(
        self,
        copies: Sequence[Tensor],
        options: Mapping[str, Any],
        elsewhere: Sequence[tuple[Mapping[str, Any], Sequence[int]]],
        zeros: MutableMapping[int, Tensor],
    ) -> None:
        self.lr = wide_rate(options["lr"])
        self.written = list(copies)
        self._copies = copies
        self._groups = [
            (own, places)
            for own, places in elsewhere
            if not all(_equal(own[key], options[key]) for key in ("lr", "weight_decay"))
        ]
        ours = [place for _, places in self._groups for place in places]
        if not ours:
            return
        for place in ours:
            copy, zero = copies[place], zeros.get(place)
            if zero is None or zero.dtype != copy.dtype:
                zeros[place] = torch.zeros_like(copy)
            self.written[place] = zeros[place]
        torch._foreach_zero_([zeros[place] for place in ours])
        # A device is not asked: see `close_`.
        known = not isinstance(self.lr, Tensor) or self.lr.is_cpu
        if known and self.lr == 0:
            # The largest of theirs, with which the bound of the layer's rate is compared.
            rates = [own["lr"] for own, _ in self._groups]
            asked = [float(r) for r in rates if not isinstance(r, Tensor) or r.is_cpu]
            self.lr = max(asked, default=0.0) or 1.0
            for place in set(range(len(copies))).difference(ours):
                self.written[place] = copies[place].clone()

    def close_(self, skip: Tensor | None) -> None:
        """The biases take their steps."""
        for own, places in self._groups:
            biases = [self._copies[place] for place in places]
            updates = [self.written[place] for place in places]
            # A few of torch's ops for all of a group.
            lr = wide_rate(own["lr"])
            decay, ratio = 1 - lr * own["weight_decay"], lr / self.lr
            if isinstance(self.lr, Tensor):
                # Of a warmup that begins at 0, where the update has been lost.
                ratio = torch.where(self.lr == 0, 0.0, ratio)
            if skip is not None:
                # The zero has stayed one.
                dtype = torch.promote_types(biases[0].dtype, torch.float32)
                decay = torch.where(skip, torch.ones_like(skip, dtype=dtype), decay)
            if isinstance(decay, Tensor) or decay != 1:
                torch._foreach_mul_(biases, _beside(biases[0], decay))
            torch._foreach_mul_(updates, _beside(biases[0], ratio))
            torch._foreach_add_(biases, updates)


def _beside(tensor: Tensor, value: float | Tensor) -> Any:
    """A number as torch's ops over many tensors take it: a tensor has to be on their device.

    Of a plain number the CPU's take no more digits than 16-bit tensors have.
    """
    if isinstance(value, Tensor):
        return value.to(tensor.device, non_blocking=True)
    if is_low(tensor):
        return torch.full((), value, dtype=torch.float32, device=tensor.device)
    return value


def _equal(ours: Any, theirs: Any) -> bool:
    """Of two numbers; tensors are not looked into, which would wait for the device."""
    if isinstance(ours, Tensor) or isinstance(theirs, Tensor):
        return ours is theirs
    return bool(ours == theirs)
