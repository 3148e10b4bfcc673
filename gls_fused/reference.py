"""GLS written down: every op in plain PyTorch, as in docs/method.md, for any float dtype.

This module is the definition. It is meant to be read beside the equations, allocates freely, and
imports nothing but torch; the other backends have the same functions and are tested against it.

Notation (one layer):
    A [n, d]    rows: the layer's inputs, d = k, or k + 1 with a one appended for the bias
    G [n, m]    gradient of the loss with respect to the layer's outputs
    D0 [m, d]   G'A, the gradient of [W b];   D = D0 P the direction
    Sigma [d, d]  A'A / n, its running estimate;   t = tr(Sigma);   s the rows that it stands for
    U [d, r]    orthonormal basis;   M [r, r] = U' Sigma U the core;   Z [d, r] = Sigma U the sketch
    P [d, d]    (Sigma + lambda I)^-p, or I / lambda'^p + U C U';   p the power

Rows are passed as [n, k]; `ones` says that the column of ones belongs to them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

Normalize: TypeAlias = Literal["rms", "row", "factored", "adam", "sgd", "none"]


class DenseInverse(NamedTuple):
    """P itself."""

    matrix: Tensor  # [d, d]


class SubspaceInverse(NamedTuple):
    """P = I / shift + basis core_inverse basis'."""

    basis: Tensor  # [d, r]
    core_inverse: Tensor  # [r, r], the C of the equations
    shift: Tensor  # 0-d, the lambda'^p of the equations


Inverse: TypeAlias = DenseInverse | SubspaceInverse
# As `orthogonal_updates`.
UpdatesOf: TypeAlias = Callable[[Sequence[Tensor], int], list[Tensor]]

# Sigma's mean eigenvalue over the mu of `blend_subspace`.
SHIFT = 256

# Root mean square of a matrix below which `orthogonalize` does not scale it up to norm 1.
LEAST_RMS = 1e-12

# The a, b and c of `orthogonalize`, step by step.
POLAR_EXPRESS = tuple(
    (a / 1.01, b / 1.01**3, c / 1.01**5)
    for a, b, c in (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    )
)
# Root mean square of a spectral step: three times Adam's, about.
SPECTRAL_RMS = 0.6
# Decay of the mean square that `measure_growths_` compares with: Adam's.
SLOW_BETA = 0.999


class Window(NamedTuple):
    """Geometry of a convolution over any number of spatial dimensions, a number for each."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...] | None = None  # of a transposed convolution, which has one


# ---- capture: rows -> sums ----------------------------------------------------------------------


def append_ones(rows: Tensor) -> Tensor:
    """[n, k] -> [n, k + 1]."""
    return torch.cat([rows, rows.new_ones(rows.shape[0], 1)], dim=1)


def count_patches(images: Tensor, window: Window, groups: int = 1) -> tuple[int, ...]:
    """N g, oh, ow: how many images of one group there are, and outputs of each.

    Args:
        images: [N, g c, h, w].
    """
    out = []
    *sides, last = window
    for size, kernel, stride, padding, dilation, more in zip(
        images.shape[2:], *sides, last or sides[1], strict=True
    ):
        span = dilation * (kernel - 1) + 1
        if last is None:
            out.append((size + 2 * padding - span) // stride + 1)
        else:
            out.append((size - 1) * stride - 2 * padding + span + more)
    return images.shape[0] * groups, *out


def take_patches(
    images: Tensor, window: Window, places: Tensor | None = None, groups: int = 1
) -> Tensor:
    """The patches [n, c kh kw] of n outputs of a convolution (im2col), of all by default.

    Written for two spatial dimensions, as everywhere here; there may be any number. A transposed
    convolution is one of images with stride - 1 zeros between the pixels.

    Args:
        images: [N, g c, h, w].
        places: which outputs, [n] int64, as numbers in [N, g, oh, ow].
    """
    many, *out = count_patches(images, window, groups)
    if places is None:
        places = torch.arange(many * math.prod(out), device=images.device)
    axes = images.ndim - 2
    # [n, c, kh, kw]: where each entry is, by axis of the images.
    index: list[Tensor] = []
    inside = places.new_ones((), dtype=torch.bool)
    *sides, _ = window
    for axis, (length, size, kernel, stride, padding, dilation) in reversed(
        list(enumerate(zip(out, images.shape[2:], *sides, strict=True)))
    ):
        tap = dilation * torch.arange(kernel, device=images.device)
        position = (places % length)[:, None]
        places = places // length
        if window.output_padding is None:
            at = position * stride - padding + tap
        else:
            stuffed = position + padding - tap
            at = stuffed // stride
            inside = inside & _spread(stuffed % stride == 0, axis, axes)
        inside = inside & _spread((at >= 0) & (at < size), axis, axes)
        index.insert(0, _spread(at.clamp(0, max(0, size - 1)), axis, axes))
    channels = images.shape[1] // groups
    channel = (places % groups * channels)[:, None] + torch.arange(channels, device=images.device)
    image = (places // groups).view(-1, *[1] * (axes + 1))
    patches = images[(image, channel.view(*channel.shape, *[1] * axes), *index)]
    return torch.where(inside, patches, 0).flatten(1)


def _spread(by_tap: Tensor, axis: int, axes: int) -> Tensor:
    """[n, k] to [n, 1, k, 1], k at a spatial axis."""
    return by_tap.view(-1, *[1] * (axis + 1), by_tap.shape[1], *[1] * (axes - axis - 1))


def sum_gram(rows: Tensor, *, dtype: torch.dtype, ones: bool) -> tuple[Tensor, Tensor]:
    """A'A [d, d] and ||A||_F^2, accumulated in `dtype`."""
    rows = rows.to(dtype)
    rows = append_ones(rows) if ones else rows
    gram = rows.T @ rows
    return gram, gram.trace()


def sketch_rows(rows: Tensor, basis: Tensor, *, ones: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Y'Y [r, r], A'Y [d, r] and ||A||_F^2, where Y = A U; in the dtype of `basis`."""
    rows = rows.to(basis.dtype)
    rows = append_ones(rows) if ones else rows
    y = rows @ basis
    return y.T @ y, rows.T @ y, rows.square().sum()


def convolve(
    images: Tensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int = 1
) -> Tensor:
    """The convolution [N, m, oh, ow] of images [N, g c, h, w] with a weight [m, c, kh, kw].

    A transposed one has a weight [c, m, kh, kw].
    """
    _, stride, padding, dilation, more = window
    more, transposed = more or (0,) * len(stride), more is not None
    return torch.convolution(
        images, weight, bias, stride, padding, dilation, transposed, more, groups
    )


def convolve_backward(
    gradient: Tensor,
    images: Tensor,
    weight: Tensor,
    window: Window,
    needs: Sequence[bool],
    groups: int = 1,
) -> Sequence[Tensor]:
    """The gradients of images, weight and bias that are needed.

    Args:
        gradient: at the outputs of `convolve`, [N, m, oh, ow].
    """
    _, stride, padding, dilation, more = window
    more, transposed = more or (0,) * len(stride), more is not None
    return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
        gradient, images, weight, [gradient.shape[1]], stride, padding, dilation, transposed, more,
        groups, list(needs),
    )  # fmt: skip


# ---- curvature: the streaming subspace ----------------------------------------------------------


def split_sums(sums: Tensor, dim: int, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """n, ||A||_F^2, Y'Y [r, r] and A'Y [d, r]: views on the sums [2 + r r + r d] of a step."""
    count, trace, core, sketch = torch.split(sums, [1, 1, rank * rank, rank * dim])
    return count[0], trace[0], core.view(rank, rank), sketch.view(rank, dim).T


def blend_weight(count: Tensor, beta: float) -> Tensor:
    """W = 1 - beta, or 0 where n = 0."""
    return (count > 0) * torch.full_like(count, 1 - beta)


def blend_subspace(
    basis: Tensor, core: Tensor, trace: Tensor, samples: Tensor, sums: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The running estimate, which stands for U M U', its trace t and its s rows, takes in a step's.

        Z = (1 - w) U M + w A'Y / n,   M <- (1 - w) M + w Y'Y / n,
        t <- (1 - w) t + w ||A||_F^2 / n,   w: see `blend_weight`,   s: see `blend_samples`

    and then Z + mu S U and M + mu I, those of Sigma + mu S, mu: see `sketch_shift`. S is 1 on the
    diagonal where an input has ever been other than 0, as U is 0 in the other rows, and there P is
    to mix nothing in. Directions that no row has shown thus stay those of U, where Z alone would
    leave them to rounding.

    Args:
        basis: U [d, r], orthonormal, that Y = A U was formed with.
        core: M [r, r].
        trace: t, 0-d.
        samples: s, 0-d.
        sums: see `split_sums`.
    Returns:
        Z + mu S U [d, r], M + mu I [r, r], t (0-d) and s (0-d); `refresh_subspace` has to follow,
        and mu to be taken from its M+.
    Source: Tropp et al., 2017, as in `refresh_subspace`, for the shift.
    """
    count, squares, gram, rows_y = split_sums(sums, *basis.shape)
    n = count.clamp(min=1)
    weight = blend_weight(count, beta)
    trace = trace.lerp(squares / n, weight)
    shift = sketch_shift(trace, len(basis))
    sketch = ((core * (1 - weight)) @ basis.T).T + rows_y * (weight / n)
    moved = core.lerp(gram / n, weight) + shift * eye_like(core)
    sketch = sketch + shift * seen_rows(sketch, basis)
    return sketch, moved, trace, blend_samples(samples, count, beta)


def start_subspace(test_matrix: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`blend_subspace` of the first rows, that Omega [d, r], orthonormal, was taken for U with.

        Z = A'Y / n + mu S Omega,   M = Y'Y / n + mu Omega' S Omega + nu I
        t = ||A||_F^2 / n,   s = n

    Numerics: rows that show fewer than r inputs leave Omega' S Omega singular; nu, 64 units of
        rounding of t, is more than what the sum over n rows has been rounded by.
    """
    _, trace, core, sketch = split_sums(sums / sums[0], *test_matrix.shape)
    shift, seen = sketch_shift(trace, len(test_matrix)), seen_rows(sketch, test_matrix)
    least = 64 * torch.finfo(trace.dtype).eps * trace
    moved = core + shift * (seen.T @ seen) + least * eye_like(core)
    return sketch + shift * seen, moved, trace.clone(), sums[0].clone()


def seen_rows(sketch: Tensor, basis: Tensor) -> Tensor:
    """S U: the rows of U, and zeros where those of Z are."""
    return basis * (sketch != 0).any(1, keepdim=True)


def blend_subspaces(
    bases: Sequence[Tensor],
    cores: Sequence[Tensor],
    traces: Sequence[Tensor],
    samples: Sequence[Tensor],
    sums: Sequence[Tensor],
    beta: float,
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """`blend_subspace` of some layers."""
    layers = zip(bases, cores, traces, samples, sums, strict=True)
    return [blend_subspace(*layer, beta) for layer in layers]


def blend_samples(samples: Tensor, count: Tensor, beta: float) -> Tensor:
    """How many rows of equal weight would tell as much of Sigma as the running estimate.

        1 / s <- (1 - w)^2 / s + w^2 / n

    The same s where w is 0.

    Source: Kish, 1965, "Survey Sampling": the effective sample size of weighted rows.
    """
    weight = blend_weight(count, beta)
    found = 1 / ((1 - weight).square() / samples + weight.square() / count.clamp(min=1))
    return torch.where(weight > 0, found, samples)


def sketch_shift(trace: Tensor, dim: int) -> Tensor:
    """The mu of `blend_subspace`: a 256th of Sigma's mean eigenvalue.

    Well below the usual lambda, so that P knows no directions apart that mu makes alike, and well
    above rounding.
    """
    return trace / (SHIFT * max(1, dim))


def refresh_subspace(core: Tensor, sketch: Tensor) -> tuple[Tensor, Tensor]:
    """The basis moves one step towards the leading eigenvectors of Sigma.

        U+ T = Z,   M+ = T (M + nu I)^-1 T',   nu = 4 eps tr M

    T M^-1 T' = U+' Z M^-1 Z' U+ is Nystrom's approximation of Sigma in the new basis. Nothing else
    keeps M positive semi-definite; nu, a few units of rounding, lets M be singular. More would be
    missed by small eigenvalues, which lose nu in each commit.

    Args:
        core: M = U' Sigma U [r, r], positive semi-definite up to rounding.
        sketch: Z = Sigma U [d, r], of any rank, finite.
    Returns:
        U+ [d, r] orthonormal, M+ [r, r] symmetric positive semi-definite.
    Numerics: the sketch is scaled to order one first, so that every scale whose squares are finite
        in the dtype gives a finite result. All of Sigma is kept when r = d.
    Source: block power iteration; Tropp et al., 2017, "Fixed-rank approximation of a positive-
        semidefinite matrix from streaming data", for the form and the shift.
    """
    precision = torch.finfo(core.dtype)
    scale = sketch.abs().max().clamp(min=precision.tiny)
    basis, triangle = torch.linalg.qr(sketch / scale)
    unit = core / scale
    shift = 4 * precision.eps * unit.trace() + precision.tiny
    factor, _ = torch.linalg.cholesky_ex(unit + shift * eye_like(unit))
    root = torch.linalg.solve_triangular(factor, triangle.T, upper=False)
    # Of a row of zeros QR leaves its rounding.
    return seen_rows(sketch, basis), root.T @ root * scale


def refresh_subspaces(
    cores: Sequence[Tensor], sketches: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """`refresh_subspace` of some layers."""
    return [refresh_subspace(*layer) for layer in zip(cores, sketches, strict=True)]


# ---- solve: damped least squares ----------------------------------------------------------------


def invert_core(
    core: Tensor,
    trace: Tensor,
    dim: int,
    damping: float,
    power: float = 1,
    samples: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """C and lambda'^p, with which P = I / lambda'^p + U C U'.

        lambda = damping t / min(d, s),   rho = max(t - tr M, 0) / (d - r)   (0 when r = d)
        lambda' = lambda + rho,   C = (M + lambda I)^-p - I / lambda'^p

    Args:
        core: M [r, r], positive semi-definite up to rounding.
        trace: t, 0-d, > 0.
        dim: d.
        damping: dimensionless, > 0.
        power: p, 1, .75, .5 or .25.
        samples: s, 0-d, see `blend_samples`; None, no fewer than d.
    Returns:
        C [r, r] and lambda'^p (0-d).
    Numerics: see `invert_damped`.
    """
    rank = len(core)
    damp = damping_of(trace, dim, damping, samples)
    rest = (trace - core.trace()).clamp(min=0) / (dim - rank) if dim > rank else 0.0
    shift = (damp + rest) ** power
    return invert_damped(core, damp, power) - eye_like(core) / shift, shift


def invert_cores(
    cores: Sequence[Tensor],
    traces: Sequence[Tensor],
    dims: Sequence[int],
    damping: float,
    power: float = 1,
    samples: Sequence[Tensor] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """`invert_core` of some layers."""
    rows: Sequence[Tensor | None] = samples or [None] * len(cores)
    layers = zip(cores, traces, dims, rows, strict=True)
    return [invert_core(core, trace, dim, damping, power, s) for core, trace, dim, s in layers]


def invert_gram(
    gram: Tensor, damping: float, power: float = 1, samples: Tensor | None = None
) -> Tensor:
    """P = (Sigma + lambda I)^-p [d, d], lambda = damping tr(Sigma) / min(d, s).

    Numerics: see `invert_damped`.
    """
    damp = damping_of(gram.trace(), len(gram), damping, samples)
    return invert_damped(gram, damp, power)


def damping_of(trace: Tensor, dim: int, damping: float, samples: Tensor | None = None) -> Tensor:
    """The lambda of the equations, but at least 32 units of rounding of t.

    Damping is relative to the mean of the eigenvalues that can be other than 0: s rows have no more
    than s. Where s < d, a direction that they do not show may be as large as those they do.
    """
    least = 32 * torch.finfo(trace.dtype).eps
    if samples is None:
        return trace * max(damping / dim, least)
    return trace * (damping / samples.clamp(max=dim)).clamp(min=least)


def eye_like(matrix: Tensor) -> Tensor:
    """I of a square matrix's size, wherever torch's default device is."""
    return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def invert_damped(matrix: Tensor, damp: Tensor, power: float) -> Tensor:
    """(S + lambda I)^-p: by Cholesky for p = 1, else from the eigenvalues of S.

    Numerics: where rounding has left S + lambda I not positive definite, I / (lambda + tr S / d)^p,
        decided on the device.
    """
    eye = eye_like(matrix)
    if power == 1:
        factor, info = torch.linalg.cholesky_ex(matrix / damp + eye)
        definite, found = info == 0, torch.cholesky_inverse(factor) / damp
    else:
        # LAPACK raises for what is not finite.
        finite = matrix.isfinite().all()
        values, vectors = eigenvalues_of(torch.where(finite, matrix, eye))
        definite = finite & (values[..., :1] + damp > 0).all()
        roots = (values + damp).clamp(min=torch.finfo(matrix.dtype).tiny) ** -power
        # Rounding of the vectors does not mix inputs that are always zero with the others.
        seen = matrix.ne(0).any(dim=-1)
        found = torch.where(seen & seen[:, None], (vectors * roots) @ vectors.T, eye * damp**-power)
        definite = definite & found.isfinite().all()
    return torch.where(definite, found, eye / (damp + matrix.trace() / len(matrix)) ** power)


def eigenvalues_of(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [d] and eigenvectors [d, d] of a symmetric matrix that is finite.

    Numerics: in float32 LAPACK does not converge where many eigenvalues are alike, as those of
        inputs that are always zero, and does not always say so: then in float64, on the CPU, as not
        every device has it.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
        # Other devices are not waited for.
        converged = not matrix.is_cpu or bool(vectors.isfinite().all())
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        converged = False
    if not converged:
        values, vectors = torch.linalg.eigh(matrix.to("cpu", torch.float64))
    return values.to(matrix), vectors.to(matrix)


# ---- apply: P at one of two sites, then the update ----------------------------------------------


def multiply_inverse(matrix: Tensor, inverse: Inverse) -> Tensor:
    """X P for X [*, d]."""
    if isinstance(inverse, DenseInverse):
        return matrix @ inverse.matrix
    basis, core_inverse, shift = inverse
    return matrix / shift + ((matrix @ basis) @ core_inverse) @ basis.T


def undo_inverse(matrix: Tensor, inverse: Inverse) -> Tensor:
    """X P^-1 for X [*, d]: from D = D0 P back to D0, in the dtype of X.

    P^-1 = lambda' I - lambda'^2 U C (I + lambda' U'U C)^-1 U',    where U'U = I unless P is cut
    """
    restored: Tensor
    if isinstance(inverse, DenseInverse):
        restored = torch.linalg.solve(inverse.matrix, matrix.to(inverse.matrix), left=False)
        return restored.to(matrix.dtype)
    basis, core_inverse, shift = inverse
    inner = eye_like(core_inverse) + shift * basis.T @ basis @ core_inverse
    product = matrix.to(basis) @ basis @ core_inverse
    product = torch.linalg.solve(inner, product, left=False) @ basis.T
    restored = shift * (matrix - shift * product)
    return restored.to(matrix.dtype)


def precondition_rows(
    rows: Tensor, inverse: Inverse, *, ones: bool
) -> tuple[Tensor, Tensor | None]:
    """A P, from which the weight gradient is G' (A P): the direction, at the backward site.

    Args:
        rows: [n, k].
        inverse: P, d = k + ones.
        ones: whether a column of ones belongs to A.
    Returns:
        The first k columns [n, k] in the dtype of `rows`, and the last one [n] (None without ones).
    """
    inputs = append_ones(rows) if ones else rows
    product = multiply_inverse(inputs.to(inverse[0].dtype), inverse).to(rows.dtype)
    return (product[:, :-1], product[:, -1]) if ones else (product, None)


def precondition_gradient(
    weight_gradient: Tensor, bias_gradient: Tensor | None, inverse: Inverse
) -> tuple[Tensor, Tensor | None]:
    """D = D0 P, at the step site.

    Args:
        weight_gradient: [m, k].
        bias_gradient: [m], or None for a layer without a bias.
        inverse: P, d = k (+ 1 with a bias).
    Returns:
        The directions of weight [m, k] and bias [m], in the gradients' dtype.
    """
    gradient = weight_gradient
    if bias_gradient is not None:
        gradient = torch.cat([gradient, bias_gradient[:, None]], dim=1)
    direction = multiply_inverse(gradient.to(inverse[0].dtype), inverse).to(gradient.dtype)
    if bias_gradient is None:
        return direction, None
    return direction[:, :-1], direction[:, -1]


def check_normalize(normalize: str) -> None:
    """Raises ValueError for none of the scales of `update_layers_`."""
    if normalize not in get_args(Normalize):
        raise ValueError(f"normalize: expected one of {get_args(Normalize)}, got {normalize!r}")


def update_layers_(
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    inverses: Sequence[Inverse | None],
    *,
    layer_sizes: Sequence[int],
    normalize: Normalize,
    lr: float | Tensor,
    momentum: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    skip: Tensor | None = None,
    rates: Tensor | None = None,
) -> None:
    """The parameters of some layers take their step, in place.

        D = D0 P where P has not been applied in the backward,
        m <- momentum m + (1 - momentum) D,   v <- beta2 v + (1 - beta2) mean(D^2)
        W <- W (1 - lr weight_decay) - min(growth lr, bound) update,
        update = m^ / (sqrt(v^) + eps) | m^ ||D0|| / ||D|| | m^     (^: bias-corrected)

    The mean is over the layer for "rms", one element for "adam", a row [W b]_i for "row". For
    "factored" v_i is the row's, c_j that of column j, and v_i c_j / mean(v) stands for v.

    Args:
        params: weight [m, ...], bias [m] of one layer after the other.
        gradients: D0, or D for a layer without an inverse; shaped as the parameters, left as is.
        exp_avgs: m, shaped as the parameters; empty when momentum is 0.
        exp_avg_sqs: v; a 0-d tensor per layer for "rms", v [m] for "row", v [m] and then c [d] for
            "factored", one per parameter for "adam", else empty. c counts the bias, which is its
            last, also where it takes no step.
        steps: 0-d, per layer: steps taken; advanced by one.
        inverses: P per layer, d = k (+ 1 with a bias), or None where `gradients` holds D.
        layer_sizes: how many of `params` each layer has, 1 or 2.
        skip: 0-d bool; where it is true nothing changes, which the host need not know.
        rates: [layers, 2], of the averages' dtype: each layer's bound, and its growth; None, none.
    Numerics: a gradient that is not finite makes the layer not finite, as with Adam.
    """
    check_normalize(normalize)
    lr = wide_rate(lr)
    options = (momentum, beta2, eps, lr * weight_decay)
    # How many of `exp_avg_sqs` a layer has, where it is not one per parameter.
    squares_each = {"rms": 1, "row": 1, "factored": 2}.get(normalize)
    with kept_where(skip, [*params, *exp_avgs, *exp_avg_sqs, *steps]):
        for layer, mine in enumerate(layer_slices(layer_sizes)):
            squares = exp_avg_sqs[mine]
            if squares_each is not None:
                squares = exp_avg_sqs[layer * squares_each : (layer + 1) * squares_each]
            steps[layer].add_(1)
            rate = lr if rates is None else rate_within(lr, *rates[layer])
            _update_layer_(
                params[mine], gradients[mine], exp_avgs[mine], squares, steps[layer],
                inverses[layer], normalize, rate, *options,
            )  # fmt: skip


def layer_slices(layer_sizes: Sequence[int]) -> list[slice]:
    """Which parameters each layer has, of so many one after the other."""
    ends = itertools.accumulate(layer_sizes)
    return [slice(end - size, end) for end, size in zip(ends, layer_sizes, strict=True)]


def rate_within(lr: float | Tensor, bound: Tensor, growth: Tensor) -> Tensor:
    """min(growth lr, bound), 0-d; a bound that is not a number stays one."""
    return torch.minimum(bound, growth * lr)


def wide_rate(lr: float | Tensor) -> float | Tensor:
    """A learning rate; one of 16 bits in float32, which 1 - lr weight_decay needs."""
    return widened(lr) if isinstance(lr, Tensor) else lr


def widened(tensor: Tensor) -> Tensor:
    """In at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def kept_where(skip: Tensor | None, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Undo what is written to the tensors inside, where `skip` [] is true."""
    before = [] if skip is None else [tensor.clone() for tensor in tensors]
    yield
    if skip is not None:
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(torch.where(skip, old, tensor))


def _update_layer_(
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor,
    inverse: Inverse | None,
    normalize: Normalize,
    lr: float | Tensor,
    momentum: float,
    beta2: float,
    eps: float,
    decay: float | Tensor,
) -> None:
    directions = layer_directions(gradients, exp_avgs, inverse)
    scales: list[Tensor | float] = [1.0] * len(params)
    if normalize == "rms":
        squares = torch.stack([d.square().sum(dtype=exp_avg_sqs[0].dtype) for d in directions])
        exp_avg_sqs[0].lerp_(squares.sum() / max(1, sum(d.numel() for d in directions)), 1 - beta2)
        scales = [inverse_root(exp_avg_sqs[0], step, beta2, eps)] * len(params)
    elif normalize == "adam":
        for d, v in zip(directions, exp_avg_sqs, strict=True):
            v.lerp_(d.square().to(v.dtype), 1 - beta2)
        scales = [inverse_root(v, step, beta2, eps) for v in exp_avg_sqs]
    elif normalize in ("row", "factored"):
        scales = _axis_scales(directions, exp_avg_sqs, step, beta2, eps)
    elif normalize == "sgd":
        norm = layer_norm(directions)
        # A norm that is not a number reaches the parameters.
        scales = [torch.where(norm == 0, 1.0, layer_norm(gradients) / norm)] * len(params)
    move_layer_(params, directions, exp_avgs, scales, step, lr, momentum, decay)


def _axis_scales(
    directions: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor,
    beta2: float,
    eps: float,
) -> list[Tensor | float]:
    """Of weight and bias for "row", with v alone, and "factored", with v and c, blended in place.

    1 / (sqrt(v^_i) + eps),   1 / (sqrt(v^_i c^_j / mean(v^)) + eps)
    """
    rows, *columns = exp_avg_sqs
    squares = squares_by_row(directions, rows.dtype)
    outputs, dim = squares.shape
    rows.lerp_(squares.sum(1) / max(1, dim), 1 - beta2)
    for each in columns:
        # A bias that takes no step keeps its place at the end.
        each[:dim].lerp_(squares.sum(0) / max(1, outputs), 1 - beta2)
    mean = rows.sum() / max(1, outputs)
    return scales_of_axes(directions, rows, columns, mean, step, beta2, eps)


def squares_by_row(directions: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The squares [m, d] of a layer's weight and bias, a row per output."""
    weight, *bias = directions
    matrix = torch.cat([weight.flatten(1), *(b[:, None] for b in bias)], dim=1)
    return matrix.to(dtype).square()


def scales_of_axes(
    directions: Sequence[Tensor],
    rows: Tensor,
    columns: Sequence[Tensor],
    mean: Tensor,
    step: Tensor,
    beta2: float,
    eps: float,
) -> list[Tensor | float]:
    """The scales of weight and bias, from v [m], c [d] if any, and mean(v)."""
    weight, *bias = directions
    size = weight.shape[1:].numel()
    squares = rows[:, None].expand(len(rows), size + len(bias))
    for each in columns:
        # Of zeros alone the scale is that of a zero.
        unit = squares / mean.clamp(min=torch.finfo(rows.dtype).tiny)
        squares = unit * each[: size + len(bias)]
    scale = inverse_root(squares, step, beta2, eps)
    scales: list[Tensor | float] = [scale[:, :size].reshape(weight.shape)]
    return [*scales, scale[:, -1]] if bias else scales


def layer_directions(
    gradients: Sequence[Tensor], exp_avgs: Sequence[Tensor], inverse: Inverse | None
) -> list[Tensor]:
    """D of a layer's weight and bias, the gradients where `inverse` is None; at least float32."""
    directions = list(gradients)
    if inverse is not None:
        weight, *bias = gradients
        parts = precondition_gradient(weight.flatten(1), bias[0] if bias else None, inverse)
        shaped = zip(parts, gradients, strict=False)
        directions = [part.view_as(gradient) for part, gradient in shaped if part is not None]
    if exp_avgs:
        return [d.to(m.dtype) for d, m in zip(directions, exp_avgs, strict=True)]
    return list(map(widened, directions))


def move_layer_(
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    scales: Sequence[Tensor | float],
    step: Tensor,
    lr: float | Tensor,
    momentum: float,
    decay: float | Tensor,
) -> None:
    """The last two lines of `update_layers_`, for one layer.

    m <- momentum m + (1 - momentum) D,   W <- W (1 - decay) - lr scale m^
    """
    decayed = 1 - decay
    corrected = bias_correction(momentum, step, directions[0].dtype)
    averages = directions
    if exp_avgs:
        for m, d in zip(exp_avgs, directions, strict=True):
            m.lerp_(d, 1 - momentum)
        averages = exp_avgs
    for p, average, scale in zip(params, averages, scales, strict=True):
        p.mul_(decayed).sub_(lr * scale * average / corrected)


def update_spectral_layers_(
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
    """An orthogonal step for each weight [m, k], which "spectral" takes, in place.

        D = D0 P,   m <- momentum m + (1 - momentum) D,   N = momentum m + (1 - momentum) D
        W <- W (1 - lr weight_decay) - min(lr, bound) .6 sqrt(max(m, k)) orth(N)

    The bias takes the step that it takes with "row". What is not named here is as in
    `update_layers_`.

    Args:
        exp_avg_sqs: v [m] of each layer.
        lr_bounds: [layers], of the averages' dtype: each layer's bound; None, none.
        split: how many matrices of as many rows each weight is, one above the other, as in fused
            projections; each has its own factor, and its own m.
        updates_of: what stands for `orthogonal_updates`.
    """
    lr = wide_rate(lr)
    decayed = 1 - lr * weight_decay
    averages: list[Tensor] = []
    moved: list[tuple[Tensor, Tensor | float]] = []
    with kept_where(skip, [*params, *exp_avgs, *exp_avg_sqs, *steps]):
        for layer, mine in enumerate(layer_slices(layer_sizes)):
            steps[layer].add_(1)
            rate = lr if lr_bounds is None else torch.clamp(lr_bounds[layer], max=lr)
            directions = layer_directions(gradients[mine], exp_avgs[mine], inverses[layer])
            for m, d in zip(exp_avgs[mine], directions, strict=False):
                m.lerp_(d, 1 - momentum)
            blended = exp_avgs[mine] if exp_avgs else directions
            weight, *bias = params[mine]
            moved.append((weight, rate))
            averages.append(directions[0].lerp(blended[0], momentum).flatten(1))
            if bias:
                squares = exp_avg_sqs[layer : layer + 1]
                scale = _axis_scales(directions, squares, steps[layer], beta2, eps)[1]
                corrected = bias_correction(momentum, steps[layer], blended[1].dtype)
                bias[0].mul_(decayed).sub_(rate * scale * blended[1] / corrected)
        updates = (updates_of or orthogonal_updates)(averages, split)
        for (weight, rate), update in zip(moved, updates, strict=True):
            weight.mul_(decayed).sub_(rate * update.view_as(weight))


def orthogonal_updates(matrices: Sequence[Tensor], split: int = 1) -> list[Tensor]:
    """.6 sqrt(max(m, k)) orth(N) of some N [m, k], which have a root mean square of .6.

    Args:
        split: how many matrices of as many rows each N is, one above the other.
    Source: Jordan et al., 2024, Muon, for the step; Liu et al., 2025, "Muon is scalable for LLM
        training", for a length that is independent of the shape, there .2.
    """
    parts = [matrix.chunk(split) for matrix in matrices]
    return [torch.cat([spectral_length(x) * orthogonalize(x) for x in each]) for each in parts]


def spectral_length(matrix: Tensor) -> float:
    """.6 sqrt(max(m, k)) of a matrix [..., m, k]."""
    return SPECTRAL_RMS * math.sqrt(max(matrix.shape[-2:]))


def orthogonal_factor(matrix: Tensor) -> Tensor:
    """orth(X) = U V' for X = U S V', of the singular values that are not 0."""
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    floor = torch.finfo(matrix.dtype).eps * max(matrix.shape) * values.amax(-1, keepdim=True)
    factor: Tensor = (u * (values > floor)[..., None, :]) @ v
    return factor


def orthogonalize(matrix: Tensor) -> Tensor:
    """orth(X) by products alone: five steps of X <- a X + (b A + c A A) X, A = X X'.

    Numerics: a singular value of 2e-3 of ||X||_F or more comes within 13% of 1; one that is smaller
        is multiplied by up to 970, and 0 stays 0. So does next to all of a matrix with a root mean
        square far below LEAST_RMS, whose norm float32 does not hold.
    Source: Amsel et al., 2025, "The Polar Express", arXiv 2505.16932: the coefficients are the
        best for singular values from 1e-3 to 1, the 1.01 is theirs against rounding.
    """
    wide = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
    norm = torch.linalg.matrix_norm(wide, keepdim=True)
    x: Tensor = wide / (1.01 * norm).clamp(min=least_norm(wide))
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if matrix.shape[-2] > matrix.shape[-1] else x


def least_norm(matrix: Tensor) -> float:
    """What ||X||_F of a matrix [..., m, k] counts for at least, as squares of less underflow."""
    return LEAST_RMS * math.sqrt(matrix.shape[-2:].numel())


def measure_growths_(
    squares: Sequence[Tensor],
    growths: Sequence[Tensor],
    slows: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    beta2: float,
    every: int,
    most: float,
    skip: Tensor | None = None,
) -> None:
    """How many times lr the rates of some layers are, where their directions have grown; in place.

        a = mean(v) / (1 - beta2^t),   w = min(1, (1 - b^k) / (1 - b^t)),   b = .999
        u <- u + w (a - u),   growth <- min(max(1, sqrt(a / u)), most)

    u is the average of a with decay b, bias-corrected, where a is known every k steps. It starts
    as a, after the layer's first step, and nothing is measured of that.

    Args:
        squares: v of each layer, of any shapes.
        growths: 0-d.
        slows: u, 0-d; 0 where there is none yet.
        steps: t, how many have been taken, 0-d.
        every: k.
        most: >= 1.
        skip: 0-d bool; where it is true nothing changes.
    """
    sums = torch._foreach_norm([v if v.numel() else v.new_zeros(1) for v in squares], 1)
    means = torch.stack(torch._foreach_div(sums, [max(1, v.numel()) for v in squares]))
    dtype, t, before = means.dtype, torch.stack(list(steps)), torch.stack(list(slows))
    tiny = torch.finfo(dtype).tiny
    recent = means / bias_correction(beta2, t, dtype).clamp(min=tiny)
    taken = -math.expm1(every * math.log(SLOW_BETA))
    weight = taken / bias_correction(SLOW_BETA, t, dtype)
    slow = torch.where((weight < 1) & (before > 0), before.lerp(recent, weight), recent)
    growth = (recent / slow.clamp(min=tiny)).sqrt()
    # Of mean squares beyond the dtype nothing is known.
    growth = growth.nan_to_num(nan=1.0).clamp(1, most)
    kept = t <= 1 if skip is None else (t <= 1) | skip
    for results, now in ((growths, growth), (slows, slow)):
        found = torch.where(kept, torch.stack(list(results)), now)
        torch._foreach_copy_(list(results), found.unbind())


def measure_weights_(
    weights: Sequence[Tensor],
    results: Sequence[Tensor],
    least: Sequence[float],
    skip: Tensor | None = None,
) -> None:
    """The root mean square of each weight, or `least` where that is more, into `results`.

    Args:
        weights: all on one device, of any shapes.
        results: 0-d, in whose dtype the squares are added.
        least: more than 0.
        skip: 0-d bool; where it is true nothing changes.
    """
    for weight, result, floor in zip(weights, results, least, strict=True):
        norm = torch.linalg.vector_norm(weight, dtype=result.dtype)
        found = (norm / max(1, weight.numel()) ** 0.5).clamp(min=floor)
        result.copy_(found if skip is None else torch.where(skip, result, found))


def round_params_(
    params: Sequence[Tensor],
    values: Sequence[Tensor],
    seeds: Sequence[int],
    steps: Sequence[Tensor],
) -> None:
    """Values rounded into parameters of 16 bits, up or down, so that the mean is right; in place.

        W_i = high_i where u_i (|high_i| - |low_i|) < |x_i| - |low_i|, else low_i

    low and high are the two numbers of the parameter's dtype around x_i, low the nearer to zero.

    Args:
        params: bfloat16 or float16.
        values: x, float32, shaped as the parameters.
        seeds: in [0, 2**32), one each.
        steps: 0-d, one each: steps taken, so that each step has draws of its own.
    Numerics: values that the dtype holds stay as they are; what it rounds to infinity, and NaN, are
        rounded as `values.to(dtype)` is.
    """
    for param, value, seed, step in zip(params, values, seeds, steps, strict=True):
        # As the parameter lies in memory, whose elements the draws are numbered by.
        rounded = torch.empty_like(param)
        laid = torch.empty_like(param, dtype=torch.float32).copy_(value)
        draws = draw_uniform(param.numel(), seed, step)
        flat = _through_memory(rounded)
        flat.copy_(_round_by(_through_memory(laid), param.dtype, draws))
        param.copy_(rounded)


def draw_uniform(count: int, seed: int, step: Tensor) -> Tensor:
    """Draws u [count] in [0, 1), float32, a function of seed, step and place alone.

        key = mix(mix(seed + 0x9E3779B9 step) + high)
        u = floor(mix(mix(low ^ key) + key) / 2^8) / 2^24

    Place i = low + 2^32 high, whose parts, as all that is mixed, have 32 bits.
    """
    place = torch.arange(count, device=step.device)
    low, high = place & _LOW, place >> 32
    key = _mix(_mix(seed + 0x9E3779B9 * step.to(torch.int64)) + high)
    bits = _mix(_mix(low ^ key) + key)
    return (bits >> 8).to(torch.float32) * 2.0**-24


_LOW = (1 << 32) - 1


def _mix(x: Tensor) -> Tensor:
    """The finalizer of MurmurHash3 (Appleby, 2011), of the low 32 bits of int64."""
    x = x & _LOW
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _LOW
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _LOW
    return x ^ (x >> 16)


def _round_by(values: Tensor, dtype: torch.dtype, draws: Tensor) -> Tensor:
    nearest = values.to(dtype)
    # Sign and magnitude: one less in the bits is the next number towards zero.
    bits = nearest.view(torch.int16)
    inner = bits - (nearest.float().abs() > values.abs()).to(torch.int16)
    outer = inner + 1
    low, high = (x.view(dtype).float().abs() for x in (inner, outer))
    chosen = torch.where(draws * (high - low) < values.abs() - low, outer, inner)
    return torch.where(nearest.isfinite(), chosen.view(dtype), nearest)


def _through_memory(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of its memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def layer_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Frobenius norm of a layer's weight and bias taken together, 0-d."""
    norms = torch.stack([torch.linalg.vector_norm(widened(x)) for x in tensors])
    norm: Tensor = torch.linalg.vector_norm(norms)
    return norm


def inverse_root(exp_avg_sq: Tensor, step: Tensor, beta2: float, eps: float) -> Tensor:
    """1 / (sqrt(v^) + eps), v^ = v / (1 - beta2^step)."""
    corrected = exp_avg_sq / bias_correction(beta2, step, exp_avg_sq.dtype)
    return 1 / (corrected.sqrt() + eps)


def bias_correction(beta: float, step: Tensor, dtype: torch.dtype) -> Tensor:
    """1 - beta^step, 0-d: what an average that began at zero is divided by.

    In at least float32, and in no more than `dtype` needs, as not every device has float64; by
    expm1, as the difference would lose what is left of a beta near 1.
    """
    wide = torch.promote_types(dtype, torch.float32)
    if beta == 0:
        return torch.ones_like(step, dtype=wide)
    return -torch.expm1(step.to(wide) * math.log(beta))
