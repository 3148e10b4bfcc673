"""Some entries of what the backward has left in p.grad, by which it is known again."""

from __future__ import annotations

import torch
from torch import Tensor

# So many, all over the weight, as inputs or outputs may be dead.
MARKS = 64


def choose_places(numel: int) -> list[int]:
    """Which entries of a weight with so many are remembered."""
    return [0x9E3779B1 * (i + 1) % max(1, numel) for i in range(MARKS)]


class Marks:
    """Sums over the parts of D that a step's backward passes have put into a weight's gradient.

    `LinearCapture` of the native backend has the same methods.

    Args:
        places: of the entries, in the flattened weight.
    """

    def __init__(self, places: list[int]) -> None:
        self._places = torch.tensor(places, device="cpu")
        self.clear_marks()

    @property
    def has_marks(self) -> bool:
        """Whether there are any parts."""
        return self._parts > 0

    def clear_marks(self) -> None:
        """Forget them."""
        self._parts, self._eps = 0, 0.0
        self._sums = self._sizes = torch.zeros((), device="cpu")

    def add_marks(self, part: Tensor) -> None:
        """Take note of a part of D, of the weight's shape."""
        found = self._read(part)
        self._sums, self._sizes = self._sums + found, self._sizes + found.abs()
        self._parts += 1
        self._eps = max(self._eps, torch.finfo(part.dtype).eps)

    def match(self, gradient: Tensor) -> bool:
        """Whether a gradient is the sum of the parts up to one factor, and to rounding."""
        # The model may have been cast to another dtype in between.
        found, scale = self._read(gradient).to(self._sums.dtype), self._sizes.max()
        if scale == 0:
            return not found.any()
        # At a scale of one, so that no square overflows or is lost.
        unit = self._sums / scale
        square = unit.square().sum()
        factor = (found @ unit) / square if square > 0 else square
        # Each part, and the sum, is rounded to its dtype or the gradient's, and scaled a few times.
        eps = max(self._eps, torch.finfo(gradient.dtype).eps)
        rounding = (4 + 2 * self._parts) * eps
        sizes = factor.abs() * self._sizes / scale + found.abs()
        return not (found - factor * unit).abs().max() > rounding * sizes.max()

    def are_gone_from(self, gradient: Tensor) -> bool:
        """Whether somebody has set the gradient to zero since."""
        return bool(self._sums.any()) and not self._read(gradient).any()

    def _read(self, gradient: Tensor) -> Tensor:
        found = gradient.detach().reshape(-1).index_select(0, self._places)
        return found.to(torch.promote_types(found.dtype, torch.float32))
