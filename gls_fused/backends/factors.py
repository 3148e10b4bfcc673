"""Orthogonal steps of all layers: small ops on all tensors at once, products on all of one shape.

On a CPU a long matrix [s, b] in float32 is read but four times. X <- p(A) X, A = X X', goes on in
its polynomials alone: A <- p(A) A p(A), Q <- p(A) Q. X = Q X is formed once on the way, as the
squares in A lose what is small. That takes 28 s^3 + 8 s^2 b flops instead of 10 s^3 + 20 s^2 b.
Most are left to `native`'s own op there, see `csrc/cpu/orthogonal.cpp`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gls_fused.reference import (
    POLAR_EXPRESS,
    Inverse,
    UpdatesOf,
    kept_where,
    least_norm,
    spectral_length,
)

Precondition = Callable[[Tensor, Tensor | None, Inverse], tuple[Tensor, Tensor | None]]

# b / s from which the polynomials alone take fewer flops.
LONG = 1.5
# The step after which X is formed once.
RESTART = 2
# s s b of a matrix from which a CPU multiplies bfloat16, where it has tiles for it.
LEAST_TILED = 1 << 25


def update_spectral_layers_(
    precondition_gradient: Precondition,
    orthogonal_updates: UpdatesOf,
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    inverses: Sequence[Inverse | None],
    *,
    layer_sizes: Sequence[int],
    lr: float | Tensor,
    momentum: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    skip: Tensor | None = None,
    lr_bounds: Tensor | None = None,
    split: int = 1,
    updates_of: UpdatesOf | None = None,
) -> None:
    """See `gls_fused.reference.update_spectral_layers_`; without a host synchronisation.

    Args:
        precondition_gradient, orthogonal_updates: of a backend.
    """
    if not params:
        return
    device = params[0].device
    # Of a rate on the host no product with a tensor elsewhere is made.
    if isinstance(lr, Tensor):
        lr = lr.to(device, non_blocking=True)
    rates: Sequence[float | Tensor] = [lr] * len(layer_sizes)
    if lr_bounds is not None:
        rates = torch.clamp(lr_bounds, max=lr).unbind()
    with kept_where(skip, [*params, *exp_avgs, *exp_avg_sqs, *steps]):
        torch._foreach_add_(list(steps), 1)
        directions = _directions(precondition_gradient, gradients, exp_avgs, inverses, layer_sizes)
        blended = directions
        if exp_avgs:
            blended = list(exp_avgs)
            torch._foreach_lerp_(blended, directions, 1 - momentum)
        if not _is_zero(weight_decay):
            torch._foreach_mul_(list(params), 1 - lr * weight_decay)
        firsts = list(itertools.accumulate(layer_sizes[:-1], initial=0))
        biased = [layer for layer, size in enumerate(layer_sizes) if size == 2]
        if biased:
            places = [firsts[layer] + 1 for layer in biased]
            _move_biases_(
                [params[i] for i in places],
                [directions[i - 1] for i in places],
                [directions[i] for i in places],
                [blended[i] for i in places],
                [exp_avg_sqs[layer] for layer in biased],
                [steps[layer] for layer in biased],
                [rates[layer] for layer in biased],
                momentum, beta2, eps,
            )  # fmt: skip
        averages = torch._foreach_lerp(
            [directions[i] for i in firsts], [blended[i] for i in firsts], momentum
        )
        updates = (updates_of or orthogonal_updates)([n.flatten(1) for n in averages], split)
        for i, rate, update in zip(firsts, rates, updates, strict=True):
            shaped = update.reshape(params[i].shape)
            if isinstance(rate, Tensor):
                params[i].addcmul_(shaped, rate, value=-1)
            else:
                params[i].sub_(shaped, alpha=rate)


def _is_zero(weight_decay: float | Tensor) -> bool:
    # A device is not asked.
    return not isinstance(weight_decay, Tensor) and weight_decay == 0


def _directions(
    precondition_gradient: Precondition,
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    inverses: Sequence[Inverse | None],
    layer_sizes: Sequence[int],
) -> list[Tensor]:
    """D of all parameters, in the dtype of m."""
    found: list[Tensor] = []
    remaining = iter(gradients)
    for size, inverse in zip(layer_sizes, inverses, strict=True):
        weight, *bias = itertools.islice(remaining, size)
        if inverse is None:
            found += [weight, *bias]
            continue
        parts = precondition_gradient(weight.flatten(1), bias[0] if bias else None, inverse)
        found.append(parts[0].view_as(weight))
        if parts[1] is not None:
            found.append(parts[1])
    return [d.to(m.dtype) for d, m in zip(found, exp_avgs, strict=True)] if exp_avgs else found


def _move_biases_(
    biases: list[Tensor],
    weight_directions: list[Tensor],
    directions: list[Tensor],
    averages: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    rates: list[float | Tensor],
    momentum: float,
    beta2: float,
    eps: float,
) -> None:
    """The step that "row" makes, of the mean squares of weight and bias by output."""
    dtype = exp_avg_sqs[0].dtype
    rows = [d.flatten(1) for d in weight_directions]
    norms = [torch.linalg.vector_norm(d, dim=1, dtype=dtype) for d in rows]
    squares = torch._foreach_mul(norms, norms)
    own = [d.to(dtype) for d in directions]
    torch._foreach_addcmul_(squares, own, own)
    torch._foreach_div_(squares, [float(d.shape[1] + 1) for d in rows])
    torch._foreach_lerp_(exp_avg_sqs, squares, 1 - beta2)
    roots = torch._foreach_div(exp_avg_sqs, _bias_corrections(beta2, steps, dtype))
    torch._foreach_sqrt_(roots)
    torch._foreach_add_(roots, eps)
    updates = torch._foreach_div(averages, roots)
    torch._foreach_div_(updates, _bias_corrections(momentum, steps, averages[0].dtype))
    torch._foreach_mul_(updates, rates)  # type: ignore[arg-type]  # of either kind alone
    torch._foreach_sub_(biases, updates)


def _bias_corrections(beta: float, steps: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """See `reference.bias_correction`."""
    wide = torch.promote_types(dtype, torch.float32)
    if beta == 0:
        return [torch.ones_like(step, dtype=wide) for step in steps]
    logarithms = torch._foreach_mul([step.to(wide) for step in steps], math.log(beta))
    torch._foreach_expm1_(logarithms)
    return list(torch._foreach_neg(logarithms))


def orthogonal_updates(matrices: Sequence[Tensor], split: int = 1) -> list[Tensor]:
    """See `gls_fused.reference.orthogonal_updates`.

    Numerics: within 1e-4 of the reference's, of its norm, where `factor_dtype` is float32; 5e-2
        where it is bfloat16.
    """
    return updates_by_shape(matrices, split, orthogonalize)


def updates_by_shape(
    matrices: Sequence[Tensor], split: int, orthogonalize: Callable[[Tensor, float], Tensor]
) -> list[Tensor]:
    """`orthogonal_updates` where matrices of one shape, turned or not, take their steps together.

    Args:
        orthogonalize: of matrices [layers, s, b], s <= b; times a length.
    """
    parts = [part for matrix in matrices for part in matrix.chunk(split)]
    results: list[Tensor] = list(parts)
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, part in enumerate(parts):
        key = (tuple(sorted(part.shape)), part.dtype, part.device)
        alike.setdefault(key, []).append(i)
    for mine in alike.values():
        pairs = [(i, parts[i].shape[0] > parts[i].shape[1]) for i in mine]
        stack = torch.stack([parts[i].T if turned else parts[i] for i, turned in pairs])
        updates = orthogonalize(stack, spectral_length(stack))
        for (i, turned), update in zip(pairs, updates, strict=True):
            results[i] = update.T if turned else update
    if split == 1:
        return results
    return [torch.cat(results[i : i + split]) for i in range(0, len(results), split)]


def factor_dtype(x: Tensor) -> torch.dtype:
    """What the products of the factors of matrices [..., m, k] are computed in.

    bfloat16 on devices with matrix units for it, as published Muons do: its rounding moves singular
    values by a fraction of what five steps leave them apart. Not float64, whose user asked for it,
    nor on a CPU what takes longer to be split up for these units than to be multiplied.
    """
    short, long = sorted(x.shape[-2:])
    worth = x.is_cuda or short * short * long >= LEAST_TILED
    if worth and x.dtype != torch.float64 and _multiplies_bfloat16(x.device):
        return torch.bfloat16
    return torch.promote_types(x.dtype, torch.float32)


@functools.cache
def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and cpu_has_tiles()


def cpu_has_tiles() -> bool:
    """Whether torch's products in bfloat16 take less time on this CPU than those in float32.

    With AMX they do; AVX-512's instructions for bfloat16 take longer than float32.
    """
    # Older torch does not tell.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    tiles = bool(capabilities.get("amx_bf16", False))
    return tiles and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def scale_to_norm(x: Tensor) -> Tensor:
    """Matrices [layers, s, b], each with a Frobenius norm a little below 1."""
    norms = torch.linalg.matrix_norm(x, keepdim=True)
    scaled: Tensor = x / (1.01 * norms).clamp(min=least_norm(x))
    return scaled


def orthogonalize(x: Tensor, length: float) -> Tensor:
    """orth(X) times a length, of matrices [layers, s, b], s <= b."""
    short, long = x.shape[1:]
    dtype = factor_dtype(x)
    scaled = scale_to_norm(x).to(dtype)
    # Squares of bfloat16 would lose too much.
    by_polynomials = x.is_cpu and dtype != torch.bfloat16 and long >= LONG * short
    run = _orthogonalize_long if by_polynomials else iterate
    return run(scaled, length).to(x.dtype)


def symmetric_product(x: Tensor, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """X X' of matrices [layers, s, b]; with beta, alpha X X + beta X of symmetric ones."""
    if beta == 0:
        return torch.bmm(x, x.mT)
    return torch.baddbmm(x, x, x, beta=beta, alpha=alpha)


def iterate(x: Tensor, length: float, product: Callable[..., Tensor] = symmetric_product) -> Tensor:
    """Five steps from matrices that `scale_to_norm` gave, the last one times a length.

    Args:
        product: what stands for `symmetric_product`.
    """
    for step, (a, b, c) in enumerate(POLAR_EXPRESS, start=1):
        factor = length if step == len(POLAR_EXPRESS) else 1.0
        # R = b A + c A A of A = X X', and then a X + R X.
        rest = product(product(x), alpha=c, beta=b)
        x = torch.baddbmm(x, rest, x, beta=a * factor, alpha=factor)
    return x


def _orthogonalize_long(x: Tensor, length: float) -> Tensor:
    """By the polynomials of A = X X' alone; see the module."""
    gram, product = torch.bmm(x, x.mT), None
    for step, (a, b, c) in enumerate(POLAR_EXPRESS, start=1):
        # p(A) = a I + R.
        rest = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        if product is None:
            product = rest.clone()
            product.diagonal(dim1=1, dim2=2).add_(a)
        else:
            product = torch.baddbmm(product, rest, product, beta=a)
        if step == RESTART:
            x, product = torch.bmm(product, x), None
            gram = torch.bmm(x, x.mT)
        elif step < len(POLAR_EXPRESS):
            half = torch.baddbmm(gram, gram, rest, beta=a)
            gram = torch.baddbmm(half, rest, half, beta=a)
    assert product is not None
    return torch.bmm(product.mul_(length), x)
