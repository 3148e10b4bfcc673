"""Which rows of its inputs a sum by torch.einsum multiplies with a matrix."""

from __future__ import annotations

from torch import Tensor


def rows_of_einsum(
    equation: str, place: int, weight: Tensor, inputs: Tensor, *, turned: bool
) -> Tensor | None:
    """The rows of a product by torch.einsum, [..., n, k]; None where it is none of rows.

    Args:
        place: which of both operands the weight is.
        weight: [..., m, k], or [..., k, m] where it is turned.
    """
    terms, arrow, outputs = equation.replace(" ", "").partition("->")
    operands = terms.split(",")
    if not arrow or "." in equation or len(operands) != 2:
        return None
    ours, axes = operands[place], operands[1 - place]
    if (len(ours), len(axes)) != (weight.ndim, inputs.ndim):
        # torch's own error tells.
        return None
    stack, k, m = ours[:-2], ours[-2 if turned else -1], ours[-1 if turned else -2]
    # Of the inputs' axes those of rows.
    kept = [axis for axis in axes if axis not in (*stack, k)]
    fits = k in axes and k not in outputs and m in outputs and m not in axes
    unequal = all(len(set(term)) == len(term) for term in operands)
    if not (fits and unequal and set(kept) <= set(outputs)):
        return None
    rows = inputs.permute([axes.index(axis) for axis in (*stack, *kept, k) if axis in axes])
    if not stack:
        return rows.reshape(-1, rows.shape[-1])
    if stack[0] not in axes:
        if stack[0] not in outputs:
            return None
        rows = rows.expand(len(weight), *rows.shape)
    return rows.reshape(len(weight), -1, rows.shape[-1])
