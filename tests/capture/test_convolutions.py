"""Convolutions against rows that are derivatives of their outputs with respect to the weight."""

import copy

import pytest
import torch
from tolerances import TRAJECTORY, assert_near
from torch import nn
from torch.func import functional_call, jacrev

from gls_fused import GLS

# What they are made with beside 4 input and 6 output channels, kernel 3; and the images' size.
CASES = {
    "1d": (nn.Conv1d, {"padding": 1, "stride": 2}, (9,)),
    "1d, dilated": (nn.Conv1d, {"padding": "same", "dilation": 3, "bias": False}, (7,)),
    "1d, circular": (nn.Conv1d, {"padding": 2, "padding_mode": "circular"}, (7,)),
    "2d": (nn.Conv2d, {"padding": (0, 1), "stride": (2, 1), "dilation": (1, 2)}, (7, 8)),
    "2d, reflect": (nn.Conv2d, {"padding": (0, 1), "padding_mode": "reflect"}, (4, 5)),
    "3d": (nn.Conv3d, {"padding": (1, 0, 2), "stride": (2, 1, 2)}, (4, 3, 5)),
    "3d, replicate": (nn.Conv3d, {"padding": "same", "padding_mode": "replicate"}, (2, 3, 2)),
}


def make(case):
    torch.manual_seed(0)
    kind, options, size = CASES[case]
    images = torch.randn(4, 4, *size, dtype=torch.float64)
    return kind(4, 6, 3, **options).double(), images


def rows_of(module, images):
    """[n, k]: of each output, by what its weight's derivative is; a one appended for a bias."""
    plain, weight = copy.deepcopy(module), module.weight.detach()
    slopes = jacrev(lambda w: functional_call(plain, {"weight": w}, (images,)))(weight)
    outputs = slopes.shape[1]
    # [N, oh, ow, m, m, c, kh, kw]: only an output's own weights move it.
    slopes = slopes.movedim(1, images.ndim - 1).reshape(-1, outputs, outputs, weight[0].numel())
    assert torch.equal(slopes, slopes * torch.eye(outputs)[:, :, None])
    rows = slopes.diagonal(dim1=1, dim2=2).movedim(2, 0)
    assert all(torch.equal(rows[0], each) for each in rows)
    if module.bias is None:
        return rows[0]
    return torch.cat([rows[0], torch.ones(len(rows[0]), 1)], 1)


@pytest.mark.parametrize("options", [{"curvature": "dense"}, {"rank": 200}], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_step_is_that_of_the_rows(backend, case, options):
    """The third step is by rows that were sketched with the basis of the first."""
    model, images = make(case)
    optimizer = GLS(
        model, lr=1.0, damping=0.3, power=1, beta=0.5, normalize="none", momentum=0.0,
        max_change=None, curvature_every=1, backend=backend, **options,
    )  # fmt: skip
    for step in range(3):
        scaled = images * (1 + step)
        rows = rows_of(model, scaled)
        found, n = rows.T @ rows / len(rows), len(rows)
        if step == 0:
            sigma, samples = found, n
        optimizer.zero_grad()
        model(scaled).square().sum().backward()
        before = matrix_of(model.parameters())
        gradient = matrix_of(p.grad for p in model.parameters())
        optimizer.step()
        damp = 0.3 * sigma.trace() / min(len(sigma), samples)
        expected = gradient @ torch.linalg.inv(sigma + damp * torch.eye(len(sigma)).double())
        assert_near(before - matrix_of(model.parameters()), expected, TRAJECTORY)
        if step > 0:
            sigma, samples = (sigma + found) / 2, 1 / (0.25 / samples + 0.25 / n)


def matrix_of(tensors):
    """[m, d] of a weight and its bias, if any."""
    return torch.cat([x.detach().reshape(6, -1) for x in tensors], 1)
