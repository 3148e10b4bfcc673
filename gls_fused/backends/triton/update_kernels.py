"""The kernel of the update of given directions, and what it shares with those of tile_kernels.py.

`update.py` says which are launched, and what they cost.

A block is a program's part of one layer. `blocks` says for each which entry of the table it belongs
to, which part of it is meant, and where its sums of squares go, so that one launch serves all
layers. What a layer's programs share stands in its line of `layers`. There they also count, with an
integer, how many of them are done: the last one counts the layer's step, and puts the count back.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gls_fused.backends.triton.counting import is_last

# Words per line of the tables.
FLAT_LINE, LAYER_LINE = 7, 9
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
               LR_TENSOR: tl.constexpr, RATES: tl.constexpr):  # fmt: skip
    """The layer's count with the step being taken; min(growth lr, bound) / (1 - momentum^step)."""
    step = tl.load(tl.load(layer).to(tl.pointer_type(STEP))).to(tl.float64) + 1.0
    rate = tl.load(lr).to(tl.float64) if LR_TENSOR else _option(options, 0)
    if RATES is not None:
        own = tl.load(layer + 7).to(tl.pointer_type(RATES))
        bound = tl.load(own).to(tl.float64)
        rate = rate * tl.load(own + 1).to(tl.float64)
        # A bound that is not a number stays one.
        rate = tl.where(bound > rate, rate, bound)
    if MOMENTUM:
        rate = rate / (1.0 - tl.exp(step * _option(options, 3)))
    return step, rate


@triton.jit
def _count_step(layer, step, STEP: tl.constexpr):
    tl.store(tl.load(layer).to(tl.pointer_type(STEP)), step.to(STEP))


@triton.jit
def _finish_norm(
    layer, options, lr, squares, STEP: tl.constexpr, SQUARE: tl.constexpr,
    NORMALIZE: tl.constexpr, MOMENTUM: tl.constexpr, LR_TENSOR: tl.constexpr, RATES: tl.constexpr,
):  # fmt: skip
    """The layer's last program adds the slots, blends v, leaves the rate and counts the step."""
    if is_last(layer + 5, tl.load(layer + 3)):
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
        step, rate = _next_step(layer, options, lr, STEP, MOMENTUM, LR_TENSOR, RATES)
        if NORMALIZE == "rms":
            average = tl.load(layer + 1).to(tl.pointer_type(SQUARE))
            v = tl.load(average).to(tl.float64)
            mean = norm / tl.maximum(tl.load(layer + 4), 1).to(tl.float64)
            v += (mean - v) * (1.0 - _option(options, 4))
            tl.store(average, v.to(SQUARE))
            correction = 1.0 / (1.0 - tl.exp(step * _option(options, 5)))
            rate = rate / (tl.sqrt(v * correction) + _option(options, 6))
        else:
            # A norm that is not a number reaches the parameters.
            ratio = tl.sqrt(tl.sum(gradient, axis=0)) / tl.sqrt(tl.where(norm == 0, 1.0, norm))
            rate = tl.where(norm == 0, rate, rate * ratio)
        tl.store(layer + 6, rate.to(tl.int64, bitcast=True))
        _count_step(layer, step, STEP)


@triton.jit
def _scales(
    layer, options, lr, STEP: tl.constexpr, NORMALIZE: tl.constexpr, MOMENTUM: tl.constexpr,
    LR_TENSOR: tl.constexpr, RATES: tl.constexpr,
):  # fmt: skip
    """What `_step_elements` multiplies with, float64, and the step being taken."""
    step, rate = _next_step(layer, options, lr, STEP, MOMENTUM, LR_TENSOR, RATES)
    decay = tl.load(lr).to(tl.float64) if LR_TENSOR else _option(options, 0)
    if NORMALIZE != "none" and NORMALIZE != "adam":
        # The norm pass, or what follows it, has counted this step already.
        rate = tl.load(layer + 6).to(tl.float64, bitcast=True)
    correction = rate
    if NORMALIZE == "row" or NORMALIZE == "factored":
        correction = tl.load(layer + 8).to(tl.float64, bitcast=True)
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
    """The parameters' step along d, in place, in the dtype of d; the rate may be one per element.

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
        # Not by their difference, in which a square far below the average is lost.
        v = v * (1.0 - square_share).to(d.dtype) + d * d * square_share.to(d.dtype)
        tl.store(exp_avg_sq + at, v.to(exp_avg_sq.dtype.element_ty), mask=mask)
        average = average / (tl.sqrt(v * correction.to(d.dtype)) + eps.to(d.dtype))
    w = tl.load(param + at, mask=mask).to(d.dtype)
    w = w * decay.to(d.dtype) - rate.to(d.dtype) * average
    tl.store(param + at, w.to(param.dtype.element_ty), mask=mask)


@triton.jit
def _flat_update_kernel(
    table,  # int64 [entries, 7]: param, D, D0, m, v (addresses), elements, layer
    blocks,  # int64 [programs, 3]
    # int64 [layers, 9]: step and v (addresses), first slot, how many programs count, elements, how
    # many are done, rate, bound of lr (address), what v is multiplied with
    layers,
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
    RATES: tl.constexpr,  # the type of the layers' bounds and growths, None without
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
        _finish_norm(
            layer, options, lr, squares, STEP, SQUARE, NORMALIZE, MOMENTUM, LR_TENSOR, RATES
        )
    else:
        ADAM: tl.constexpr = NORMALIZE == "adam"
        scales, step = _scales(layer, options, lr, STEP, NORMALIZE, MOMENTUM, LR_TENSOR, RATES)
        if not EVEN and first + BLOCK <= count:
            d = tl.load(gradient + at).to(COMPUTE)
            _step_elements(param, exp_avg, exp_avg_sq, d, at, None, scales, MOMENTUM, ADAM)
        else:
            d = tl.load(gradient + at, mask=mask, other=0.0).to(COMPUTE)
            _step_elements(param, exp_avg, exp_avg_sq, d, at, mask, scales, MOMENTUM, ADAM)
        if NORMALIZE == "none" or ADAM:  # noqa: SIM102
            if is_last(layer + 5, tl.load(layer + 3)):
                _count_step(layer, step, STEP)
