"""P on gradients and rows, and the update, against unrolled sums in float64."""

import itertools
import math

import pytest
import torch
from brute_force import DTYPES, as_matrix, randn, seeds, sizes, some_inverse
from hypothesis import given
from hypothesis import strategies as st
from tolerances import PRODUCT, assert_near

from gls_fused import reference


@given(
    n=st.integers(0, 9),
    k=sizes,
    m=sizes,
    r=st.integers(0, 4),
    ones=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
)
def test_both_sites_give_the_same_direction(n, k, m, r, ones, dtype, seed):
    """G' (A P) = (G' A) P, in the dtype of the rows and of the gradient."""
    wide = torch.promote_types(dtype, torch.float32)
    inverse = some_inverse(k + ones, r, wide, seed)
    rows, grads = randn(n, k, seed=seed, dtype=dtype), randn(n, m, seed=seed + 1, dtype=dtype)

    product, last = reference.precondition_rows(rows, inverse, ones=ones)
    assert product.dtype == dtype
    assert (last is not None) == ones
    found = grads.double().T @ product.double()
    found_bias = grads.double().T @ last.double() if ones else None

    gradient, bias = grads.double().T @ rows.double(), grads.double().sum(0) if ones else None
    exact = type(inverse)(*(x.double() for x in inverse))
    weight, bias_direction = reference.precondition_gradient(gradient, bias, exact)
    scale = float(as_matrix(exact).norm() * grads.double().norm() * rows.double().norm()) + 1
    scale *= math.sqrt(n + 1)
    assert float((found - weight).norm()) <= PRODUCT[dtype] * scale
    if ones:
        assert float((found_bias - bias_direction).norm()) <= PRODUCT[dtype] * scale

    stepped = reference.precondition_gradient(
        gradient.to(dtype), bias.to(dtype) if ones else None, inverse
    )
    for actual, wanted in zip(stepped, (weight, bias_direction), strict=True):
        assert (actual is None) == (wanted is None)
        if actual is not None:
            assert actual.dtype == dtype
            assert float((actual.double() - wanted).norm()) <= PRODUCT[dtype] * scale


HYPER = {"lr": 0.03, "beta2": 0.8, "eps": 1e-3}


def axis_squares(normalize, weights, past):
    """What stands for the mean square of each element of a layer: v_i, or v_i c_j / mean(v)."""
    rows = [torch.cat([x.reshape(len(x), -1) for x in d], 1).square() for d in past]
    v = sum(w * x.mean(1) for w, x in zip(weights, rows, strict=True))
    c = sum(w * x.mean(0) for w, x in zip(weights, rows, strict=True))
    found = torch.outer(v, c / v.mean() if normalize == "factored" else torch.ones_like(c))
    size = past[0][0][0].numel()
    parts = [found[:, :size].reshape(past[0][0].shape), found[:, size:].flatten()]
    return parts[: len(past[0])]


def update_by_hand(params, history, *, normalize, momentum, weight_decay, gradient_norms):
    """One layer's parameters after all steps, from unrolled sums instead of recurrences."""
    lr, beta2, eps = HYPER["lr"], HYPER["beta2"], HYPER["eps"]
    params = [p.clone() for p in params]
    for t in range(1, len(history) + 1):
        past = history[:t]
        if momentum:
            weights = [(1 - momentum) * momentum ** (t - 1 - s) for s in range(t)]
        else:
            weights = [0.0] * (t - 1) + [1.0]
        squares = [(1 - beta2) * beta2 ** (t - 1 - s) / (1 - beta2**t) for s in range(t)]
        norm = math.sqrt(sum(float(d.square().sum()) for d in past[-1]))
        for i, p in enumerate(params):
            mean = sum(w * d[i] for w, d in zip(weights, past, strict=True))
            mean = mean / (1 - momentum**t)
            if normalize == "rms":
                size = sum(d.numel() for d in past[0])
                v = sum(
                    w * sum(float(x.square().sum()) for x in d) / size
                    for w, d in zip(squares, past, strict=True)
                )
                mean = mean / (math.sqrt(v) + eps)
            elif normalize == "adam":
                v = sum(w * d[i].square() for w, d in zip(squares, past, strict=True))
                mean = mean / (v.sqrt() + eps)
            elif normalize in ("row", "factored"):
                mean = mean / (axis_squares(normalize, squares, past)[i].sqrt() + eps)
            elif normalize == "sgd":
                mean = mean * gradient_norms[t - 1] / norm
            p.copy_(p - lr * weight_decay * p - lr * mean)
    return params


# Three layers: with a bias, a convolution without one, with a bias.
SHAPES = [[(3, 4), (3,)], [(3, 2, 2, 2)], [(1, 5), (1,)]]
FLAT_SHAPES = list(itertools.chain(*SHAPES))
FEW = {"momentum": 0.0, "weight_decay": 0.0}


def update_buffers(normalize, momentum, dtype):
    averages = [torch.zeros(s, dtype=dtype) for s in FLAT_SHAPES] if momentum else []
    if normalize == "rms":
        return averages, [torch.zeros((), dtype=dtype) for _ in SHAPES]
    if normalize in ("row", "factored"):
        squares = []
        for (outputs, *rest), *bias in SHAPES:
            squares.append(torch.zeros(outputs, dtype=dtype))
            if normalize == "factored":
                squares.append(torch.zeros(math.prod(rest) + len(bias), dtype=dtype))
        return averages, squares
    adam = normalize == "adam"
    return averages, [torch.zeros(s, dtype=dtype) for s in FLAT_SHAPES] if adam else []


NO_INVERSES = [None] * len(SHAPES)


def update(params, gradients, buffers, step, inverses=NO_INVERSES, **options):
    steps = [torch.tensor(float(step - 1)) for _ in SHAPES]
    sizes = [len(shapes) for shapes in SHAPES]
    reference.update_layers_(
        params, gradients, *buffers, steps, inverses, layer_sizes=sizes, **{**HYPER, **options}
    )
    assert all(float(taken) == step for taken in steps)


def by_layer(tensors):
    """The flat list, one list per layer."""
    remaining = iter(tensors)
    return [[next(remaining) for _ in shapes] for shapes in SHAPES]


def directions_by_hand(gradients, inverses):
    """D = D0 P, one layer after the other, in float64."""
    found = []
    for layer, inverse in zip(by_layer([g.double() for g in gradients]), inverses, strict=True):
        if inverse is None:
            found += layer
            continue
        rows = torch.cat([g.reshape(len(g), -1) for g in layer], 1) @ as_matrix(inverse).double()
        found.append(rows[:, : layer[0][0].numel()].reshape(layer[0].shape))
        found += [rows[:, -1]] if len(layer) == 2 else []
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("normalize", ["rms", "row", "factored", "adam", "sgd", "none"])
def test_update_layers(normalize, momentum, weight_decay, dtype):
    """The second layer's gradients hold D already; the others' P is of a subspace, and dense."""
    wide = torch.promote_types(dtype, torch.float32)
    params = [randn(*s, seed=i, dtype=dtype) for i, s in enumerate(FLAT_SHAPES)]
    history = [
        [randn(*s, seed=10 * t + i, dtype=dtype) * t for i, s in enumerate(FLAT_SHAPES)]
        for t in range(1, 6)
    ]
    inverses = [some_inverse(5, 2, wide, 0), None, some_inverse(6, 0, wide, 1)]
    options = {"normalize": normalize, "momentum": momentum, "weight_decay": weight_decay}
    sought = [by_layer(directions_by_hand(gradients, inverses)) for gradients in history]
    norms = [
        [float(torch.cat([g.double().flatten() for g in layer]).norm()) for layer in by_layer(step)]
        for step in history
    ]
    expected = []
    for layer, mine in enumerate(by_layer(params)):
        past = [directions[layer] for directions in sought]
        mine = [p.double() for p in mine]
        mine_norms = [norm[layer] for norm in norms]
        expected += update_by_hand(mine, past, gradient_norms=mine_norms, **options)

    buffers = update_buffers(normalize, momentum, wide)
    kept = [[g.clone() for g in gradients] for gradients in history]
    for t, gradients in enumerate(history):
        update(params, gradients, buffers, t + 1, inverses, **options)
    assert all(p.dtype == dtype for p in params)
    # By layer: the one element of a bias may be unlucky in every rounding.
    for found, wanted in zip(by_layer(params), by_layer(expected), strict=True):
        together = [torch.cat([x.double().flatten() for x in layer]) for layer in (found, wanted)]
        assert_near(*together, PRODUCT[dtype])
    for before, after in zip(itertools.chain(*kept), itertools.chain(*history), strict=True):
        assert torch.equal(before, after)


def test_update_takes_the_learning_rate_as_a_tensor():
    results = []
    for lr in (0.5, torch.tensor(0.5)):
        params = [randn(*s) for s in FLAT_SHAPES]
        directions = [randn(*s, seed=1) for s in FLAT_SHAPES]
        update(params, directions, ([], []), 1, normalize="none", lr=lr, **FEW)
        results.append(params[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("normalize", ["rms", "row", "factored", "adam", "sgd", "none"])
def test_update_of_a_zero_direction_is_only_decay(normalize):
    params, zeros = [torch.ones(s) for s in FLAT_SHAPES], [torch.zeros(s) for s in FLAT_SHAPES]
    buffers = update_buffers(normalize, 0.9, torch.float32)
    update(params, zeros, buffers, 1, normalize=normalize, momentum=0.9, weight_decay=1.0)
    for p in params:
        assert_near(p, torch.full_like(p, 1 - HYPER["lr"]), PRODUCT[torch.float32])


def test_norm_of_a_layer():
    weight, bias = randn(3, 4), randn(3, seed=1)
    whole = torch.cat([weight.flatten(), bias])
    assert_near(reference.layer_norm([weight, bias]), whole.norm(), PRODUCT[torch.float64])


@pytest.mark.parametrize("normalize", ["rms", "row", "factored", "adam", "sgd", "none"])
def test_rate_is_a_layers_own(normalize):
    """Of bound and growth, whichever is less, in the step and not in the decay."""
    runs = []
    own = [[0.1, 2.0], [2.0, 1.5], [0.2, 1.0]]
    for lr, rates in ((0.5, own), (0.75, None), (0.1, None), (0.2, None)):
        params = [randn(*s, seed=i).float() for i, s in enumerate(FLAT_SHAPES)]
        gradients = [randn(*s, seed=i + 20).float() for i, s in enumerate(FLAT_SHAPES)]
        bounded = {} if rates is None else {"rates": torch.tensor(rates)}
        options = {"lr": lr, "momentum": 0.9, "weight_decay": 0.1 / lr, **bounded}
        buffers = update_buffers(normalize, 0.9, torch.float32)
        update(params, gradients, buffers, 1, normalize=normalize, **options)
        runs.append(by_layer(params))
    bounded, *plain = runs
    for layer, mine in enumerate((plain[1], plain[0], plain[2])):
        for found, expected in zip(bounded[layer], mine[layer], strict=True):
            torch.testing.assert_close(found, expected)


def test_bias_that_takes_no_step_keeps_its_mean_square():
    weight, v, c = torch.ones(3, 4), torch.zeros(3), torch.full((5,), 7.0)
    options = {"layer_sizes": [1], "normalize": "factored", **HYPER, **FEW}
    reference.update_layers_(
        [weight], [torch.ones(3, 4)], [], [v, c], [torch.zeros(())], [None], **options
    )
    assert v.eq(v[0]).all()
    assert c[4] == 7
