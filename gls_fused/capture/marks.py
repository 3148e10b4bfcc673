"""Some entries of what the backward has left in p.grad, by which it is known again."""

from __future__ import annotations

import torch
from torch import Tensor

# So many, all over the weight and its bias, as inputs or outputs may be dead.
MARKS, BIAS_MARKS = 64, 16


def choose_places(numel: int, count: int = MARKS) -> list[int]:
    """Which entries of a tensor with so many are remembered."""
    return [0x9E3779B1 * (i + 1) % max(1, numel) for i in range(count)]


class Marks:
    """Sums over the parts of D that a step's backward passes have put into a layer's gradients.

    Each part is of the weight and its bias, as P takes the gradient of one into that of the other.
    `LinearCapture` of the native backend has the same methods.

    Args:
        places: of the entries, in the flattened weight.
        bias_places: those of the bias; none where it has no part in D, and is not looked at.
    """

    def __init__(self, places: list[int], bias_places: list[int]) -> None:
        self._places = torch.tensor(places, device="cpu")
        self._bias_places = torch.tensor(bias_places, dtype=torch.int64, device="cpu")
        self.clear_marks()

    @property
    def has_marks(self) -> bool:
        """Whether there are any parts."""
        return self._parts > 0

    def clear_marks(self) -> None:
        """Forget them."""
        self._parts, self._eps = 0, 0.0
        self._sums = self._sizes = torch.zeros((), device="cpu")

    def add_marks(self, part: Tensor, bias_part: Tensor | None) -> None:
        """Take note of a part of D, of the shapes of weight and bias."""
        found = self._read_both(part, bias_part)
        self._sums, self._sizes = self._sums + found, self._sizes + found.abs()
        self._parts += 1
        self._eps = max(self._eps, _eps_of(part, bias_part))

    def match(self, gradient: Tensor, bias_gradient: Tensor | None) -> bool:
        """Whether the gradients are the sum of the parts up to one factor, and to rounding."""
        # The model may have been cast to another dtype in between.
        found = self._read_both(gradient, bias_gradient).to(self._sums.dtype)
        scale = self._sizes.max()
        if scale == 0:
            return not found.any()
        # At a scale of one, so that no square overflows or is lost.
        unit = self._sums / scale
        square = unit.square().sum()
        factor = (found @ unit) / square if square > 0 else square
        # Each part, and the sum, is rounded to its dtype or the gradient's, and scaled a few times.
        eps = max(self._eps, _eps_of(gradient, bias_gradient))
        rounding = (4 + 2 * self._parts) * eps
        sizes = factor.abs() * self._sizes / scale + found.abs()
        return not (found - factor * unit).abs().max() > rounding * sizes.max()

    def are_gone_from(self, gradient: Tensor) -> bool:
        """Whether somebody has set the weight's gradient to zero since."""
        ours = self._sums[: len(self._places)] if self._parts else self._sums
        # Of rows with few inputs they may all be zero.
        return not (_read(gradient, self._places) if ours.any() else gradient).any()

    def _read_both(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Entries of the weight, then of the bias; zeros where that has none."""
        found = _read(weight, self._places)
        if bias is None:
            return torch.cat([found, found.new_zeros(len(self._bias_places))])
        return torch.cat([found, _read(bias, self._bias_places).to(found.dtype)])


def _read(tensor: Tensor, places: Tensor) -> Tensor:
    found = tensor.detach().reshape(-1).index_select(0, places)
    return found.to(torch.promote_types(found.dtype, torch.float32))


def _eps_of(*tensors: Tensor | None) -> float:
    return max(torch.finfo(tensor.dtype).eps for tensor in tensors if tensor is not None)
