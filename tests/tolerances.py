"""How far a result may be from the mathematics: the one table of the tests.

Errors are relative, ||actual - expected|| / ||expected|| in the Frobenius norm. An entry is at most
`HEADROOM` times the error that PyTorch makes in the same dtype on a problem of the same kind, which
test_reference.py measures; the headroom covers the shapes that are drawn.
"""

import torch

HEADROOM = 100

# Products and sums of at most 100 terms: PyTorch's A'A of 64 rows errs by 1e-16, 7e-8, 2e-3, 2e-4.
# A result kept in a 16-bit dtype errs by its last rounding, whatever it is accumulated in.
PRODUCT = {
    torch.float64: 1e-14,
    torch.float32: 5e-6,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
}

# Inverses of damped matrices, condition number up to 6e3: torch.linalg.inv errs by 6e-14, 3e-5.
SOLVE = {
    torch.float64: 1e-12,
    torch.float32: 3e-4,
}

# Five steps of an orthogonal factor, each of which multiplies small singular values by up to 8:
# `reference.orthogonalize` errs by 3e-14 and 1.5e-5 where they fall to 1e-6 of the largest, and by
# 2.3e-2 in bfloat16 where they fall to 1e-2.
ITERATION = {
    torch.float64: 1e-12,
    torch.float32: 1e-4,
    torch.bfloat16: 5e-2,
}

# Tens of steps in float64, each a few solves; an error of one step is carried through the rest.
TRAJECTORY = 1e-9
# The same without any solve that differs: two orders of summation of the same steps.
SAME_STEPS = 1e-10


def relative_error(actual, expected):
    """||actual - expected|| / ||expected||; the absolute error where `expected` is zero."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape
    scale = torch.linalg.vector_norm(expected)
    error = torch.linalg.vector_norm(actual - expected)
    return float(error / scale if scale > 0 else error)


def assert_near(actual, expected, tolerance):
    """Fails for a NaN too."""
    error = relative_error(actual, expected)
    assert error <= tolerance, f"relative error {error:.2e} exceeds {tolerance:.0e}"
