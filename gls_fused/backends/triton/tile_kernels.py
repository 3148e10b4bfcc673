"""The kernels of the update whose programs have tiles of a weight: [rows, columns].

Where D = D0 / lambda' + T U' is formed here, and where the mean squares are of rows and columns,
also of a D that is given. The bias goes with the first tile of its rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gls_fused.backends.triton.counting import is_last
from gls_fused.backends.triton.update_kernels import (
    SUM_SLOTS,
    _address,
    _count_step,
    _finish_norm,
    _next_step,
    _option,
    _scales,
    _step_elements,
)

# Words per line of the table.
TILE_LINE = 24
# How the bases of a launch's layers lie in memory.
STRIDED, BY_ROWS, BY_COLUMNS = 0, 1, 2
# Parts of the sums of rows or columns that are added at a time.
SUM_PARTS = tl.constexpr(16)


@triton.jit
def _lie(line, BASIS: tl.constexpr, EVEN: tl.constexpr):
    """The basis' rank and strides, of which contiguity must be known when this is compiled for
    neighbours to share an access. A hint at an argument would not reach the caller.
    """
    rank = tl.load(line + 13)
    if EVEN:
        rank = tl.multiple_of(rank, 16)
    down, across = tl.load(line + 14), tl.load(line + 15)
    if BASIS == 1:
        down, across = tl.multiple_of(down, 16), tl.full([], 1, dtype=tl.int64)
    elif BASIS == 2:
        down = tl.full([], 1, dtype=tl.int64)
    return rank, down, across


@triton.jit
def _project(
    line, i, GRADIENT: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr, BASIS: tl.constexpr,
    RANK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows i of T = D0 U C; zeros where D is given."""
    c = tl.arange(0, RANK)
    gradient = _address(line + 1, GRADIENT, ALIGNED)
    basis = _address(line + 8, tl.float32, ALIGNED)
    n, size = tl.load(line + 11), tl.load(line + 12)
    if EVEN:
        size = tl.multiple_of(size, 16)
    rank, down, across = _lie(line, BASIS, EVEN)
    in_rows, in_rank = i < n, c < rank
    y = tl.zeros([BLOCK_N, RANK], dtype=tl.float32)
    end = tl.where(rank > 0, size, 0).to(tl.int32)
    for start in range(0, end, BLOCK_D):
        j = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        g = tl.load(
            gradient + i[:, None] * size + j[None, :],
            mask=in_rows[:, None] & (j < size)[None, :],
            other=0.0,
        ).to(tl.float32)
        u = tl.load(
            basis + j[:, None] * down + c[None, :] * across,
            mask=(j < size)[:, None] & in_rank[None, :],
            other=0.0,
        )
        y = tl.dot(g, u, acc=y, input_precision=PRECISION)
    with_bias = tl.load(line + 20) != 0
    bias = tl.load(line + 5).to(tl.pointer_type(GRADIENT))
    b = tl.load(bias + i, mask=in_rows & with_bias, other=0.0).to(tl.float32)
    u_last = tl.load(basis + size * down + c * across, mask=in_rank & with_bias, other=0.0)
    y += b[:, None] * u_last[None, :]
    core = tl.load(
        tl.load(line + 9).to(tl.pointer_type(tl.float32))
        + c[:, None] * tl.load(line + 16)
        + c[None, :] * tl.load(line + 17),
        mask=in_rank[:, None] & in_rank[None, :],
        other=0.0,
    )
    return tl.dot(y, core, input_precision=PRECISION)


@triton.jit
def _project_gradients_kernel(
    table,  # int64 [layers, 24], see `update_plan.Plan._add_tiles`
    blocks,
    projections,  # [rows of all layers, RANK]
    GRADIENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    BASIS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LINE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """T = D0 U C of every layer's gradients."""
    block = blocks + tl.program_id(0).to(tl.int64) * 3
    line = table + tl.load(block) * LINE
    i = tl.load(block + 1) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = _project(line, i, GRADIENT, ALIGNED, EVEN, BASIS, RANK, BLOCK_N, BLOCK_D, PRECISION)
    row, c = tl.load(line + 19) + i, tl.arange(0, RANK)
    in_rows = i < tl.load(line + 11)
    tl.store(projections + row[:, None] * RANK + c[None, :], t, mask=in_rows[:, None])


@triton.jit
def _walk_gradients_kernel(
    table,
    blocks,
    projections,
    layers,
    options,
    lr,
    squares,
    skip,
    SKIPS: tl.constexpr,
    GRADIENT: tl.constexpr,
    STEP: tl.constexpr,
    SQUARE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    LR_TENSOR: tl.constexpr,
    RATES: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    BASIS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LINE: tl.constexpr,
    LAYER_LINE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """T of a block of rows, and then the sums of squares of their D, for which D0 comes from L2."""
    if SKIPS:  # noqa: SIM102  # `and` would not leave the load out
        if tl.load(skip):
            return
    block = blocks + tl.program_id(0).to(tl.int64) * 3
    line = table + tl.load(block) * LINE
    part = tl.load(block + 1)
    i, c = part * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, RANK)
    t = _project(line, i, GRADIENT, ALIGNED, EVEN, BASIS, RANK, BLOCK_N, BLOCK_D, PRECISION)
    n, size, with_bias = tl.load(line + 11), tl.load(line + 12), tl.load(line + 20) != 0
    if EVEN:
        size = tl.multiple_of(size, 16)
    in_rows = i < n
    row = tl.load(line + 19) + i
    tl.store(projections + row[:, None] * RANK + c[None, :], t, mask=in_rows[:, None])

    AXES: tl.constexpr = NORMALIZE == "row" or NORMALIZE == "factored"
    gradient = _address(line + 1, GRADIENT, ALIGNED)
    basis = _address(line + 8, tl.float32, ALIGNED)
    rank, down, across = _lie(line, BASIS, EVEN)
    in_rank = c < rank
    scale = _scale(line, rank)
    of_columns = squares
    if NORMALIZE == "factored":
        of_columns += tl.load(line + 23) + part * (size + with_bias)
    sums = tl.zeros([BLOCK_N], dtype=tl.float32)
    given = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in range(0, size.to(tl.int32), BLOCK_D):
        j = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask = in_rows[:, None] & (j < size)[None, :]
        g = tl.load(gradient + i[:, None] * size + j[None, :], mask=mask, other=0.0)
        g = g.to(tl.float32)
        u = tl.load(
            basis + j[:, None] * down + c[None, :] * across,
            mask=(j < size)[:, None] & in_rank[None, :],
            other=0.0,
        )
        if not AXES:
            given += tl.sum(g * g, axis=1)
        d = tl.dot(t, tl.trans(u), acc=g * scale, input_precision=PRECISION)
        # Beyond the edge D is not zero by itself: T U' has rows of its own.
        d = tl.where(mask, d, 0.0)
        sums += tl.sum(d * d, axis=1)
        if NORMALIZE == "factored":
            tl.store(of_columns + j, tl.sum(d * d, axis=0), mask=j < size)
    bias = tl.load(line + 5).to(tl.pointer_type(GRADIENT))
    b = tl.load(bias + i, mask=in_rows & with_bias, other=0.0).to(tl.float32)
    u_last = tl.load(basis + size * down + c * across, mask=in_rank & with_bias, other=0.0)
    e = b * scale + tl.sum(t * u_last[None, :], axis=1)
    e = tl.where(in_rows & with_bias, e, 0.0)
    sums += e * e
    if AXES:
        tl.store(squares + tl.load(line + 22) + i, sums, mask=in_rows)
        if NORMALIZE == "factored":
            tl.store(of_columns + size, tl.sum(e * e, axis=0), mask=with_bias)
    else:
        out = squares + tl.load(block + 2) * 2
        tl.store(out, tl.sum(sums.to(tl.float64), axis=0))
        tl.store(out + 1, tl.sum((given + b * b).to(tl.float64), axis=0))
        layer = layers + tl.load(line + 18) * LAYER_LINE
        _finish_norm(
            layer, options, lr, squares, STEP, SQUARE, NORMALIZE, MOMENTUM, LR_TENSOR, RATES
        )


@triton.jit
def _scale(line, rank):
    """1 / lambda', or 1 where D is given."""
    shift = tl.load(line + 10).to(tl.pointer_type(tl.float32))
    return 1.0 / tl.load(shift, mask=rank > 0, other=1.0)


@triton.jit
def _axis_rates(
    line, rate, correction, eps, i, j, in_rows, size, with_bias,
    SQUARE: tl.constexpr, COMPUTE: tl.constexpr, FACTORED: tl.constexpr,
):  # fmt: skip
    """The rate / (sqrt(v^) + eps) of a tile's elements, one column for "row", and of its bias."""
    rows = tl.load(line + 3).to(tl.pointer_type(SQUARE))
    # In float64, as what v is divided by may be as small as v.
    v = tl.load(rows + i, mask=in_rows, other=0.0).to(tl.float64) * correction
    v_bias = v.to(COMPUTE)
    v = v_bias[:, None]
    if FACTORED:
        columns = tl.load(line + 7).to(tl.pointer_type(SQUARE))
        v = v * tl.load(columns + j, mask=j < size, other=0.0).to(COMPUTE)[None, :]
        v_bias = v_bias * tl.load(columns + size, mask=with_bias, other=0.0).to(COMPUTE)
    rate, eps = rate.to(COMPUTE), eps.to(COMPUTE)
    return rate / (tl.sqrt(v) + eps), rate / (tl.sqrt(v_bias) + eps)


@triton.jit
def _tile_update_kernel(
    table,
    blocks,
    projections,
    layers,
    options,
    lr,
    squares,  # of rows and columns: [slots], see `update_plan.Plan._add_tiles`
    skip,
    SKIPS: tl.constexpr,
    PARAM: tl.constexpr,
    GRADIENT: tl.constexpr,
    STATE: tl.constexpr,
    COMPUTE: tl.constexpr,
    STEP: tl.constexpr,
    SQUARE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    LR_TENSOR: tl.constexpr,
    RATES: tl.constexpr,
    SUMS: tl.constexpr,
    FORMED: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    BASIS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LINE: tl.constexpr,
    LAYER_LINE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of D = D0 / lambda' + T U', or of a given D: with SUMS its squares' sums, else the
    step along it.
    """
    if SKIPS:  # noqa: SIM102  # `and` would not leave the load out
        if tl.load(skip):
            return
    block = blocks + tl.program_id(0).to(tl.int64) * 3
    line = table + tl.load(block) * LINE
    part = tl.load(block + 1)
    n, size, with_bias = tl.load(line + 11), tl.load(line + 12), tl.load(line + 20) != 0
    if EVEN:
        size = tl.multiple_of(size, 16)
    layer = layers + tl.load(line + 18) * LAYER_LINE
    tiles = tl.load(line + 21)
    i = (part // tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = (part % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_rows = i < n
    mask = in_rows[:, None] & (j < size)[None, :]
    in_bias = in_rows & with_bias & (part % tiles == 0)
    at = i[:, None] * size + j[None, :]

    gradient = _address(line + 1, GRADIENT, ALIGNED)
    bias_gradient = tl.load(line + 5).to(tl.pointer_type(GRADIENT))
    g = tl.load(gradient + at, mask=mask, other=0.0).to(COMPUTE)
    b = tl.load(bias_gradient + i, mask=in_bias, other=0.0).to(COMPUTE)
    AXES: tl.constexpr = NORMALIZE == "row" or NORMALIZE == "factored"
    if SUMS and not AXES:
        # Before D is formed, so that D0 need not be kept beside it.
        out = squares + tl.load(block + 2) * 2
        tl.store(out + 1, tl.sum(tl.sum(g * g, axis=1) + b * b, axis=0))
    if FORMED:
        c = tl.arange(0, RANK)
        rank, down, across = _lie(line, BASIS, EVEN)
        in_rank = c < rank
        basis = _address(line + 8, tl.float32, ALIGNED)
        scale = _scale(line, rank)
        t = tl.load(
            projections + (tl.load(line + 19) + i)[:, None] * RANK + c[None, :],
            # Of a D that is given, whose rank is 0, nobody has made T.
            mask=in_rows[:, None] & in_rank[None, :],
            other=0.0,
        )
        u = tl.load(
            basis + j[:, None] * down + c[None, :] * across,
            mask=(j < size)[:, None] & in_rank[None, :],
            other=0.0,
        )
        d = tl.dot(t, tl.trans(u), acc=g * scale, input_precision=PRECISION)
        u_last = tl.load(basis + size * down + c * across, mask=in_rank & with_bias, other=0.0)
        e = b * scale + tl.sum(t * u_last[None, :], axis=1)
    else:
        d, e = g, b
    if SUMS:
        # Beyond the edge D is not zero by itself: T U' has rows of its own.
        d, e = tl.where(mask, d, 0.0), tl.where(in_bias, e, 0.0)
        if AXES:
            of_rows = squares + tl.load(line + 22) + (part % tiles) * n
            tl.store(of_rows + i, tl.sum(d * d, axis=1) + e * e, mask=in_rows)
            if NORMALIZE == "factored":
                of_columns = squares + tl.load(line + 23) + (part // tiles) * (size + with_bias)
                tl.store(of_columns + j, tl.sum(d * d, axis=0), mask=j < size)
                last = of_columns + size
                tl.store(last, tl.sum(e * e, axis=0), mask=with_bias & (part % tiles == 0))
        else:
            tl.store(out, tl.sum(tl.sum(d * d, axis=1) + e * e, axis=0))
            _finish_norm(
                layer, options, lr, squares, STEP, SQUARE, NORMALIZE, MOMENTUM, LR_TENSOR, RATES
            )
    else:
        ADAM: tl.constexpr = NORMALIZE == "adam"
        scales, step = _scales(layer, options, lr, STEP, NORMALIZE, MOMENTUM, LR_TENSOR, RATES)
        bias_scales = scales
        if AXES:
            decay, rate, share, square_share, correction, eps = scales
            rates, bias_rates = _axis_rates(
                line, rate, correction, eps, i, j, in_rows, size, with_bias,
                SQUARE, COMPUTE, NORMALIZE == "factored",
            )  # fmt: skip
            scales = (decay, rates, share, square_share, correction, eps)
            bias_scales = (decay, bias_rates, share, square_share, correction, eps)
        param = _address(line, PARAM, ALIGNED)
        exp_avg = _address(line + 2, STATE, ALIGNED)
        exp_avg_sq = _address(line + 3, STATE, ALIGNED)
        _step_elements(param, exp_avg, exp_avg_sq, d, at, mask, scales, MOMENTUM, ADAM)
        param = tl.load(line + 4).to(tl.pointer_type(PARAM))
        exp_avg = tl.load(line + 6).to(tl.pointer_type(STATE))
        exp_avg_sq = tl.load(line + 7).to(tl.pointer_type(STATE))
        _step_elements(param, exp_avg, exp_avg_sq, e, i, in_bias, bias_scales, MOMENTUM, ADAM)
        if NORMALIZE == "none" or ADAM:  # noqa: SIM102
            if is_last(layer + 5, tl.load(layer + 3)):
                _count_step(layer, step, STEP)


@triton.jit
def _blend_axes_kernel(
    table,
    blocks,
    layers,
    options,
    lr,
    squares,
    skip,
    SKIPS: tl.constexpr,
    STEP: tl.constexpr,
    SQUARE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    LR_TENSOR: tl.constexpr,
    RATES: tl.constexpr,
    TINY: tl.constexpr,
    WALKED: tl.constexpr,  # whether a row's sum is whole
    BLOCK_N: tl.constexpr,  # of the tiles that the sums are of
    BLOCK: tl.constexpr,
    LINE: tl.constexpr,
    LAYER_LINE: tl.constexpr,
):
    """The mean squares of a block of rows enter v, or those of a block of columns c.

    The layer's last program leaves the rate, what v is multiplied with, and counts the step.
    """
    if SKIPS:  # noqa: SIM102  # `and` would not leave the load out
        if tl.load(skip):
            return
    block = blocks + tl.program_id(0).to(tl.int64) * 3
    line = table + tl.load(block) * LINE
    part = tl.load(block + 1)
    n, dim = tl.load(line + 11), tl.load(line + 12) + tl.load(line + 20)
    rows = tl.load(line + 3)
    row_blocks = tl.maximum(tl.cdiv(n, BLOCK), 1)
    is_row = part < row_blocks
    length, others = tl.where(is_row, n, dim), tl.where(is_row, dim, n)
    of_row = 1 if WALKED else tl.load(line + 21)
    parts = tl.where(is_row, of_row, tl.cdiv(n, BLOCK_N)).to(tl.int32)
    first = squares + tl.where(is_row, tl.load(line + 22), tl.load(line + 23))
    average = tl.where(is_row, rows, tl.load(line + 7)).to(tl.pointer_type(SQUARE))
    k = tl.where(is_row, part, part - row_blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = k < length
    total = tl.zeros([SUM_PARTS, BLOCK], dtype=tl.float64)
    for start in range(0, parts, SUM_PARTS):
        p = start + tl.arange(0, SUM_PARTS)
        mask = (p < parts)[:, None] & inside[None, :]
        at = p.to(tl.int64)[:, None] * length + k[None, :]
        total += tl.load(first + at, mask=mask, other=0.0).to(tl.float64)
    mean = tl.sum(total, axis=0) / tl.maximum(others, 1).to(tl.float64)
    v = tl.load(average + k, mask=inside, other=0.0).to(tl.float64)
    v += (mean - v) * (1.0 - _option(options, 4))
    tl.store(average + k, v.to(SQUARE), mask=inside)

    layer = layers + tl.load(line + 18) * LAYER_LINE
    if is_last(layer + 5, tl.load(layer + 3)):
        step, rate = _next_step(layer, options, lr, STEP, MOMENTUM, LR_TENSOR, RATES)
        correction = 1.0 / (1.0 - tl.exp(step * _option(options, 5)))
        if NORMALIZE == "factored":
            sums = tl.zeros([SUM_SLOTS], dtype=tl.float64)
            for start in range(0, n.to(tl.int32), SUM_SLOTS):
                i = start + tl.arange(0, SUM_SLOTS)
                at = rows.to(tl.pointer_type(SQUARE)) + i
                sums += tl.load(at, mask=i < n, other=0.0).to(tl.float64)
            whole = tl.sum(sums, axis=0) / tl.maximum(n, 1).to(tl.float64)
            # As clamp does, a NaN stays one.
            correction = correction / tl.where(whole < TINY, TINY, whole)
        tl.store(layer + 6, rate.to(tl.int64, bitcast=True))
        tl.store(layer + 8, correction.to(tl.int64, bitcast=True))
        _count_step(layer, step, STEP)
