"""The kernels of the update; `update.py` says which are launched, and what they cost.

A block is a program's part of one layer. `blocks` says for each which entry of the table it belongs
to, which part of it is meant, and where its sums of squares go, so that one launch serves all
layers. What a layer's programs share stands in its line of `layers`. There they also count, with an
integer, how many of them are done: the last one counts the layer's step, and puts the count back.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Words per line of the tables.
FLAT_LINE, TILE_LINE, LAYER_LINE = 7, 22, 7
# How the bases of a launch's layers lie in memory.
STRIDED, BY_ROWS, BY_COLUMNS = 0, 1, 2
# Slots that are added at a time: two rounds for the 1,536 of a weight [1024, 3072].
SUM_SLOTS = tl.constexpr(1024)


@triton.jit
def _address(word, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer in a table's word; to 16 bytes where ALIGNED says that all are."""
    address = tl.load(word).to(tl.pointer_type(TYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def _option(options, at):
    return tl.load(options + at).to(tl.float64, bitcast=True)


@triton.jit
def _next_step(layer, options, lr, STEP: tl.constexpr, MOMENTUM: tl.constexpr,
               LR_TENSOR: tl.constexpr):  # fmt: skip
    """The layer's count with the step being taken, and lr / (1 - momentum^step)."""
    step = tl.load(tl.load(layer).to(tl.pointer_type(STEP))).to(tl.float64) + 1.0
    rate = tl.load(lr).to(tl.float64) if LR_TENSOR else _option(options, 0)
    if MOMENTUM:
        rate = rate / (1.0 - tl.exp(step * _option(options, 3)))
    return step, rate


@triton.jit
def _count_step(layer, step, STEP: tl.constexpr):
    tl.store(tl.load(layer).to(tl.pointer_type(STEP)), step.to(STEP))


@triton.jit
def _is_last(layer):
    """Whether the layer's other programs have all been here; what they wrote is then seen."""
    # The count is one thread's, who must not be ahead of the others.
    tl.debug_barrier()
    last = tl.atomic_add(layer + 5, 1, sem="acq_rel", scope="gpu") == tl.load(layer + 3) - 1
    if last:
        tl.store(layer + 5, 0)
    return last


@triton.jit
def _finish_norm(
    layer, options, lr, squares, STEP: tl.constexpr, SQUARE: tl.constexpr,
    NORMALIZE: tl.constexpr, MOMENTUM: tl.constexpr, LR_TENSOR: tl.constexpr,
):  # fmt: skip
    """The layer's last program adds the slots, blends v, leaves the rate and counts the step."""
    if _is_last(layer):
        first, count = tl.load(layer + 2), tl.load(layer + 3)
        direction = tl.zeros([SUM_SLOTS], dtype=tl.float64)
        gradient = tl.zeros([SUM_SLOTS], dtype=tl.float64)
        for start in range(0, count.to(tl.int32), SUM_SLOTS):
            i = start + tl.arange(0, SUM_SLOTS)
            at = squares + (first + i) * 2
            direction += tl.load(at, mask=i < count, other=0.0)
            if NORMALIZE == "sgd":
                gradient += tl.load(at + 1, mask=i < count, other=0.0)
        norm = tl.sum(direction, axis=0)
        step, rate = _next_step(layer, options, lr, STEP, MOMENTUM, LR_TENSOR)
        if NORMALIZE == "rms":
            average = tl.load(layer + 1).to(tl.pointer_type(SQUARE))
            v = tl.load(average).to(tl.float64)
            mean = norm / tl.maximum(tl.load(layer + 4), 1).to(tl.float64)
            v += (mean - v) * (1.0 - _option(options, 4))
            tl.store(average, v.to(SQUARE))
            correction = 1.0 / (1.0 - tl.exp(step * _option(options, 5)))
            rate = rate / (tl.sqrt(v * correction) + _option(options, 6))
        else:
            ratio = tl.sqrt(tl.sum(gradient, axis=0)) / tl.sqrt(tl.where(norm > 0, norm, 1.0))
            rate = tl.where(norm > 0, rate * ratio, rate)
        tl.store(layer + 6, rate.to(tl.int64, bitcast=True))
        _count_step(layer, step, STEP)


@triton.jit
def _scales(
    layer, options, lr, STEP: tl.constexpr, NORMALIZE: tl.constexpr, MOMENTUM: tl.constexpr,
    LR_TENSOR: tl.constexpr,
):  # fmt: skip
    """What `_step_elements` multiplies with, float64, and the step being taken."""
    step, rate = _next_step(layer, options, lr, STEP, MOMENTUM, LR_TENSOR)
    decay = tl.load(lr).to(tl.float64) if LR_TENSOR else _option(options, 0)
    if NORMALIZE == "rms" or NORMALIZE == "sgd":
        # The norm pass has counted this step already.
        rate = tl.load(layer + 6).to(tl.float64, bitcast=True)
    correction = rate
    if NORMALIZE == "adam":
        correction = 1.0 / (1.0 - tl.exp(step * _option(options, 5)))
    decay = 1.0 - decay * _option(options, 1)
    kept, kept_square = _option(options, 2), _option(options, 4)
    return (decay, rate, 1.0 - kept, 1.0 - kept_square, correction, _option(options, 6)), step


@triton.jit
def _step_elements(
    param, exp_avg, exp_avg_sq, d, at, mask, scales,
    MOMENTUM: tl.constexpr, ADAM: tl.constexpr,
):  # fmt: skip
    """The parameters' step along d, in place, in the dtype of d.

    Masked elements are undefined, and stay unwritten.
    """
    decay, rate, share, square_share, correction, eps = scales
    average = d
    if MOMENTUM:
        m = tl.load(exp_avg + at, mask=mask).to(d.dtype)
        average = m + (d - m) * share.to(d.dtype)
        tl.store(exp_avg + at, average.to(exp_avg.dtype.element_ty), mask=mask)
    if ADAM:
        v = tl.load(exp_avg_sq + at, mask=mask).to(d.dtype)
        v += (d * d - v) * square_share.to(d.dtype)
        tl.store(exp_avg_sq + at, v.to(exp_avg_sq.dtype.element_ty), mask=mask)
        average = average / (tl.sqrt(v * correction.to(d.dtype)) + eps.to(d.dtype))
    w = tl.load(param + at, mask=mask).to(d.dtype)
    w = w * decay.to(d.dtype) - rate.to(d.dtype) * average
    tl.store(param + at, w.to(param.dtype.element_ty), mask=mask)


@triton.jit
def _flat_update_kernel(
    table,  # int64 [entries, 7]: param, D, D0, m, v (addresses), elements, layer
    blocks,  # int64 [programs, 3]
    layers,  # int64 [layers, 7]: step, v (addresses), first slot, slots, elements, done, rate
    options,  # int64 [7], float64 bits: lr, weight_decay, momentum, ln(momentum), beta2, ln, eps
    lr,  # [1], read where LR_TENSOR
    squares,  # float64 [slots, 2]: sums of D^2 and of D0^2
    skip,  # where SKIPS: true where nothing is to be written
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
    SUMS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    LINE: tl.constexpr,
    LAYER_LINE: tl.constexpr,
):
    """A block of D that is given: with SUMS its squares' sum, else the step along it."""
    if SKIPS:  # noqa: SIM102  # `and` would not leave the load out
        if tl.load(skip):
            return
    block = blocks + tl.program_id(0).to(tl.int64) * 3
    line = table + tl.load(block) * LINE
    first = tl.load(block + 1) * BLOCK
    at = first + tl.arange(0, BLOCK)
    param = _address(line, PARAM, ALIGNED)
    gradient = _address(line + 1, GRADIENT, ALIGNED)
    exp_avg = _address(line + 3, STATE, ALIGNED)
    exp_avg_sq = _address(line + 4, STATE, ALIGNED)
    count = tl.load(line + 5)
    layer = layers + tl.load(line + 6) * LAYER_LINE
    if EVEN:
        # Then the mask is the same for every 16 elements, and accesses stay 16 bytes wide.
        count = tl.multiple_of(count, 16)
    mask = at < count
    if SUMS:
        out = squares + tl.load(block + 2) * 2
        d = tl.load(gradient + at, mask=mask, other=0.0).to(COMPUTE)
        tl.store(out, tl.sum(d * d, axis=0))
        if NORMALIZE == "sgd":
            given = _address(line + 2, GRADIENT, ALIGNED)
            g = tl.load(given + at, mask=mask, other=0.0).to(COMPUTE)
            tl.store(out + 1, tl.sum(g * g, axis=0))
        _finish_norm(layer, options, lr, squares, STEP, SQUARE, NORMALIZE, MOMENTUM, LR_TENSOR)
    else:
        ADAM: tl.constexpr = NORMALIZE == "adam"
        scales, step = _scales(layer, options, lr, STEP, NORMALIZE, MOMENTUM, LR_TENSOR)
        if not EVEN and first + BLOCK <= count:
            d = tl.load(gradient + at).to(COMPUTE)
            _step_elements(param, exp_avg, exp_avg_sq, d, at, None, scales, MOMENTUM, ADAM)
        else:
            d = tl.load(gradient + at, mask=mask, other=0.0).to(COMPUTE)
            _step_elements(param, exp_avg, exp_avg_sq, d, at, mask, scales, MOMENTUM, ADAM)
        if NORMALIZE == "none" or ADAM:  # noqa: SIM102
            if _is_last(layer):
                _count_step(layer, step, STEP)


@triton.jit
def _project_gradients_kernel(
    table,  # int64 [layers, 22], see `update._Plan._add_tiles`
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
    c = tl.arange(0, RANK)
    gradient = _address(line + 1, GRADIENT, ALIGNED)
    basis = _address(line + 8, tl.float32, ALIGNED)
    n, size, rank = tl.load(line + 11), tl.load(line + 12), tl.load(line + 13)
    if EVEN:
        size, rank = tl.multiple_of(size, 16), tl.multiple_of(rank, 16)
    down, across = tl.load(line + 14), tl.load(line + 15)
    # Contiguity must be known when this is compiled for neighbours to share an access.
    if BASIS == 1:
        down, across = tl.multiple_of(down, 16), tl.full([], 1, dtype=tl.int64)
    elif BASIS == 2:
        down = tl.full([], 1, dtype=tl.int64)
    in_rows, in_rank = i < n, c < rank
    y = tl.zeros([BLOCK_N, RANK], dtype=tl.float32)
    for start in range(0, size.to(tl.int32), BLOCK_D):
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
    t = tl.dot(y, core, input_precision=PRECISION)
    row = tl.load(line + 19) + i
    tl.store(projections + row[:, None] * RANK + c[None, :], t, mask=in_rows[:, None])


@triton.jit
def _tile_update_kernel(
    table,
    blocks,
    projections,
    layers,
    options,
    lr,
    squares,
    skip,
    SKIPS: tl.constexpr,
    PARAM: tl.constexpr,
    GRADIENT: tl.constexpr,
    STATE: tl.constexpr,
    STEP: tl.constexpr,
    SQUARE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    LR_TENSOR: tl.constexpr,
    SUMS: tl.constexpr,
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
    """A tile of D = D0 / lambda' + T U': with SUMS its squares' sum, else the step along it."""
    if SKIPS:  # noqa: SIM102  # `and` would not leave the load out
        if tl.load(skip):
            return
    block = blocks + tl.program_id(0).to(tl.int64) * 3
    line = table + tl.load(block) * LINE
    part = tl.load(block + 1)
    n, size, rank = tl.load(line + 11), tl.load(line + 12), tl.load(line + 13)
    if EVEN:
        size, rank = tl.multiple_of(size, 16), tl.multiple_of(rank, 16)
    down, across = tl.load(line + 14), tl.load(line + 15)
    # Contiguity must be known when this is compiled for neighbours to share an access.
    if BASIS == 1:
        down, across = tl.multiple_of(down, 16), tl.full([], 1, dtype=tl.int64)
    elif BASIS == 2:
        down = tl.full([], 1, dtype=tl.int64)
    layer = layers + tl.load(line + 18) * LAYER_LINE
    tiles = tl.load(line + 21)
    i = (part // tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = (part % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.arange(0, RANK)
    in_rows, in_rank = i < n, c < rank
    mask = in_rows[:, None] & (j < size)[None, :]
    at = i[:, None] * size + j[None, :]

    gradient = _address(line + 1, GRADIENT, ALIGNED)
    basis = _address(line + 8, tl.float32, ALIGNED)
    scale = 1.0 / tl.load(tl.load(line + 10).to(tl.pointer_type(tl.float32)))
    t = tl.load(
        projections + (tl.load(line + 19) + i)[:, None] * RANK + c[None, :],
        mask=in_rows[:, None],
        other=0.0,
    )
    u = tl.load(
        basis + j[:, None] * down + c[None, :] * across,
        mask=(j < size)[:, None] & in_rank[None, :],
        other=0.0,
    )
    g = tl.load(gradient + at, mask=mask, other=0.0).to(tl.float32)
    d = tl.dot(t, tl.trans(u), acc=g * scale, input_precision=PRECISION)

    # The bias goes with the first tile of its rows.
    in_bias = in_rows & (tl.load(line + 20) != 0) & (part % tiles == 0)
    bias_gradient = tl.load(line + 5).to(tl.pointer_type(GRADIENT))
    u_last = tl.load(
        basis + size * down + c * across, mask=in_rank & (tl.load(line + 20) != 0), other=0.0
    )
    b = tl.load(bias_gradient + i, mask=in_bias, other=0.0).to(tl.float32)
    e = b * scale + tl.sum(t * u_last[None, :], axis=1)
    if SUMS:
        # Beyond the edge D is not zero by itself: T U' has rows of its own.
        d, e = tl.where(mask, d, 0.0), tl.where(in_bias, e, 0.0)
        out = squares + tl.load(block + 2) * 2
        tl.store(out, tl.sum(tl.sum(d * d, axis=1) + e * e, axis=0))
        tl.store(out + 1, tl.sum(tl.sum(g * g, axis=1) + b * b, axis=0))
        _finish_norm(layer, options, lr, squares, STEP, SQUARE, NORMALIZE, MOMENTUM, LR_TENSOR)
    else:
        ADAM: tl.constexpr = NORMALIZE == "adam"
        scales, step = _scales(layer, options, lr, STEP, NORMALIZE, MOMENTUM, LR_TENSOR)
        param = _address(line, PARAM, ALIGNED)
        exp_avg = _address(line + 2, STATE, ALIGNED)
        exp_avg_sq = _address(line + 3, STATE, ALIGNED)
        _step_elements(param, exp_avg, exp_avg_sq, d, at, mask, scales, MOMENTUM, ADAM)
        param = tl.load(line + 4).to(tl.pointer_type(PARAM))
        exp_avg = tl.load(line + 6).to(tl.pointer_type(STATE))
        exp_avg_sq = tl.load(line + 7).to(tl.pointer_type(STATE))
        _step_elements(param, exp_avg, exp_avg_sq, e, i, in_bias, scales, MOMENTUM, ADAM)
        if NORMALIZE == "none" or ADAM:  # noqa: SIM102
            if _is_last(layer):
                _count_step(layer, step, STEP)
