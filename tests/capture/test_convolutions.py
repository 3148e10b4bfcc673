"""Convolutions against rows that are derivatives of their outputs with respect to the weight."""

import copy

import pytest
import torch
from tolerances import PRODUCT, TRAJECTORY, assert_near
from torch import nn
from torch.func import functional_call, jacrev

from gls_fused import GLS
from gls_fused.capture.rows import take_sample

# What they are made with beside 4 input and 6 output channels, kernel 3; and the images' size.
CASES = {
    "1d": (nn.Conv1d, {"padding": 1, "stride": 2}, (9,)),
    "1d, dilated": (nn.Conv1d, {"padding": "same", "dilation": 3, "bias": False}, (7,)),
    "1d, circular": (nn.Conv1d, {"padding": 2, "padding_mode": "circular"}, (7,)),
    "2d": (nn.Conv2d, {"padding": (0, 1), "stride": (2, 1), "dilation": (1, 2)}, (7, 8)),
    "2d, reflect": (nn.Conv2d, {"padding": (0, 1), "padding_mode": "reflect"}, (4, 5)),
    "2d, groups": (nn.Conv2d, {"padding": "same", "groups": 2}, (3, 4)),
    "2d, depthwise": (nn.Conv2d, {"padding": 1, "groups": 4, "bias": False}, (3, 4)),
    "1d, groups": (nn.Conv1d, {"groups": 2, "padding": 3, "padding_mode": "circular"}, (6,)),
    "3d": (nn.Conv3d, {"padding": (1, 0, 2), "stride": (2, 1, 2)}, (4, 3, 5)),
    "3d, replicate": (nn.Conv3d, {"padding": "same", "padding_mode": "replicate"}, (2, 3, 2)),
}


def make(case):
    torch.manual_seed(0)
    kind, options, size = CASES[case]
    images = torch.randn(4, 4, *size, dtype=torch.float64)
    outputs = 8 if options.get("groups") == 4 else 6
    return kind(4, outputs, 3, **options).double(), images


def rows_of(module, images):
    """[n, d] of each output, which its derivatives are, a one appended for a bias; by groups."""
    plain, weight = copy.deepcopy(module), module.weight.detach()
    slopes = jacrev(lambda w: functional_call(plain, {"weight": w}, (images,)))(weight)
    outputs = slopes.shape[1]
    # [N, oh, ow, m, m, c, kh, kw]: only an output's own weights move it.
    slopes = slopes.movedim(1, images.ndim - 1).reshape(-1, outputs, outputs, weight[0].numel())
    assert torch.equal(slopes, slopes * torch.eye(outputs)[:, :, None])
    rows = slopes.diagonal(dim1=1, dim2=2).movedim(2, 0)  # [m, n, k]
    rows = rows.unflatten(0, (module.groups, -1))
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    rows = rows[:, 0].flatten(0, 1)
    return rows if module.bias is None else torch.cat([rows, torch.ones(len(rows), 1)], 1)


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
    return torch.cat([x.detach().reshape(len(x), -1) for x in tensors], 1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("count", [64, 65, 300])
def test_some_images_of_a_group_stand_for_all(backend, count, layout):
    model = nn.Conv2d(6, 4, 1, groups=2, bias=False).double()
    optimizer = GLS(model, curvature="dense", backend=backend)
    images = torch.randn(count, 6, 3, 1, dtype=torch.float64) * torch.arange(1, 7)[:, None, None]
    model(images.to(memory_format=layout)).sum().backward()
    optimizer.step()
    sample, _ = take_sample(images.view(2 * count, 3, 3), 128, 0)
    rows = sample.mT.flatten(0, 1)
    state = optimizer.state[model.weight]
    assert state["rows"] == count * 2 * 3
    assert_near(state["gram"], rows.T @ rows / len(rows), PRODUCT[torch.float64])
