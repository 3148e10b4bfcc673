"""Convolutions against rows that are derivatives of their outputs with respect to the weight."""

import copy

import pytest
import torch
from nets import NORMALIZATIONS, assert_equal, snapshot
from tolerances import PRODUCT, TRAJECTORY, assert_near, relative_error
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from gls_fused import GLS
from gls_fused.capture.conv import ImageRows, geometry_of
from gls_fused.capture.rows import SKETCH_ROWS, take_sample

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
    "1d, transposed": (nn.ConvTranspose1d, {"stride": 3, "output_padding": 2}, (4,)),
    "2d, transposed": (
        nn.ConvTranspose2d,
        {"stride": (2, 3), "padding": (1, 5), "output_padding": (1, 0), "dilation": (1, 2)},
        (3, 4),
    ),
    "3d, transposed": (nn.ConvTranspose3d, {"padding": (0, 1, 1), "bias": False}, (2, 1, 3)),
    "1d, transposed, depthwise": (nn.ConvTranspose1d, {"groups": 4, "dilation": 2}, (4,)),
    "2d, transposed, groups": (
        nn.ConvTranspose2d,
        {"groups": 2, "stride": (2, 1), "padding": 1, "output_padding": (1, 0)},
        (3, 4),
    ),
    "3d, transposed, groups": (nn.ConvTranspose3d, {"groups": 2, "bias": False}, (1, 2, 1)),
    "3d": (nn.Conv3d, {"padding": (1, 0, 2), "stride": (2, 1, 2)}, (4, 3, 5)),
    "3d, replicate": (nn.Conv3d, {"padding": "same", "padding_mode": "replicate"}, (2, 3, 2)),
}


def make(case):
    torch.manual_seed(0)
    kind, options, size = CASES[case]
    images = torch.randn(4, 4, *size, dtype=torch.float64)
    outputs = 8 if options.get("groups") == 4 else 6
    return kind(4, outputs, 3, **options).double(), images


def rows_of(module, *given):
    """[n, d] of each output, which its derivatives are, a one appended for a bias; by groups."""
    plain, weight, images = copy.deepcopy(module), module.weight.detach(), given[0]
    slopes = jacrev(lambda w: functional_call(plain, {"weight": w}, given))(weight)
    outputs = slopes.shape[1]
    # [N oh ow, m, m, c kh kw]: only an output's own weights move it.
    slopes = outputs_first(module, slopes, images.ndim)
    shape = (-1, outputs, outputs, weight.numel() // outputs)
    slopes = slopes.movedim(1, images.ndim - 1).reshape(shape)
    assert torch.equal(slopes, slopes * torch.eye(outputs)[:, :, None])
    rows = slopes.diagonal(dim1=1, dim2=2).movedim(2, 0)  # [m, n, k]
    rows = rows.unflatten(0, (module.groups, -1))
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    rows = rows[:, 0].flatten(0, 1)
    return rows if module.bias is None else torch.cat([rows, torch.ones(len(rows), 1)], 1)


def outputs_first(module, tensor, axis=0):
    """Of what is shaped as the weight from an axis on."""
    if not module.transposed:
        return tensor
    parts = tensor.chunk(module.groups, axis)
    return torch.cat([part.transpose(axis, axis + 1) for part in parts], axis)


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
        before = matrix_of(model, model.parameters())
        gradient = matrix_of(model, (p.grad for p in model.parameters()))
        optimizer.step()
        damp = 0.3 * sigma.trace() / min(len(sigma), samples)
        expected = gradient @ torch.linalg.inv(sigma + damp * torch.eye(len(sigma)).double())
        assert_near(before - matrix_of(model, model.parameters()), expected, TRAJECTORY)
        if step > 0:
            sigma, samples = (sigma + found) / 2, 1 / (0.25 / samples + 0.25 / n)


def matrix_of(model, tensors):
    """[m, d] of a weight and its bias, if any."""
    weight, *bias = (x.detach() for x in tensors)
    weight = outputs_first(model, weight)
    return torch.cat([weight.flatten(1), *(b[:, None] for b in bias)], 1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("groups", "count"), [(1, 342), (2, 170), (2, 171), (2, 3000), (16, 90)])
def test_some_rows_stand_for_all(backend, groups, count, layout):
    model = nn.Conv2d(3 * groups, groups, 1, groups=groups, bias=False).double()
    optimizer = GLS(model, curvature="dense", backend=backend)
    images = torch.randn(count, 3 * groups, 3, 1, dtype=torch.float64)
    images *= torch.arange(1, 3 * groups + 1)[:, None, None]
    model(images.to(memory_format=layout)).sum().backward()
    optimizer.step()
    rows, _ = take_sample(images.view(groups * count, 3, 3).mT.flatten(0, 1), SKETCH_ROWS, 0)
    state = optimizer.state[model.weight]
    assert state["rows"] == count * groups * 3
    assert_near(state["gram"], rows.T @ rows / len(rows), PRODUCT[torch.float64])


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_plain_module(case, single):
    model, images = make(case)
    found = []
    for captured in (False, True):
        optimizer = GLS(model, site="step") if captured else None
        for _ in range(2):
            # The second time no rows are gathered.
            inputs = (images[0] if single else images).clone().requires_grad_()
            model.zero_grad()
            outputs = model(inputs)
            outputs.square().sum().backward()
            found.append([outputs, inputs.grad, *(p.grad.clone() for p in model.parameters())])
            if optimizer is not None:
                optimizer.param_groups[0]["lr"] = 0.0
                optimizer.step()
    for other in found[1:]:
        for actual, expected in zip(other, found[0], strict=True):
            assert_near(actual, expected, PRODUCT[torch.float64])


@pytest.mark.parametrize("site", ["step", "backward"])
@pytest.mark.parametrize("case", ["1d, transposed", "2d, transposed", "2d, transposed, groups"])
def test_transposed_convolution_of_sizes_that_are_asked_for(case, site):
    """Two in every step: the rows are those of both calls."""
    model, images = make(case)
    least = torch.tensor(model(images).shape[2:]) - torch.tensor(model.output_padding)
    most = least + torch.tensor(model.stride) - 1
    optimizer = GLS(
        model, lr=1.0, damping=0.3, power=1, beta=0.5, normalize="none", momentum=0.0,
        max_change=None, curvature_every=1, rank=200, site=site,
    )  # fmt: skip
    for step in range(3):
        plain = copy.deepcopy(model)
        scaled = images * (1 + step)
        rows, loss = [], []
        for size in (least.tolist(), most.tolist()):
            expected = plain(scaled, size)
            found = model(scaled, output_size=size)
            assert torch.equal(found, expected)
            rows.append(rows_of(plain, scaled, size))
            loss += [found.square().sum(), expected.square().sum()]
        found, n = torch.cat(rows).T @ torch.cat(rows) / len(torch.cat(rows)), len(torch.cat(rows))
        if step == 0:
            sigma, samples = found, n
        optimizer.zero_grad()
        sum(loss).backward()
        before = matrix_of(model, model.parameters())
        optimizer.step()
        gradient = matrix_of(plain, (p.grad for p in plain.parameters()))
        damp = 0.3 * sigma.trace() / min(len(sigma), samples)
        expected = gradient @ torch.linalg.inv(sigma + damp * torch.eye(len(sigma)).double())
        assert_near(before - matrix_of(model, model.parameters()), expected, TRAJECTORY)
        if step > 0:
            sigma, samples = (sigma + found) / 2, 1 / (0.25 / samples + 0.25 / n)
    with pytest.raises(ValueError, match="requested an output size"):
        model(images, (most + 1).tolist())
    with pytest.raises(TypeError, match="size_of_output"):
        model(images, size_of_output=most.tolist())


class Stuffed(nn.Module):
    """The convolution, of images with zeros between, that a transposed one is."""

    def __init__(self, transposed):
        super().__init__()
        self.window = geometry_of(transposed, transposed.kernel_size).window
        groups, bias = transposed.groups, transposed.bias
        self.conv = nn.Conv2d(
            transposed.in_channels, transposed.out_channels, transposed.kernel_size,
            dilation=transposed.dilation, groups=groups, bias=bias is not None,
        ).double()  # fmt: skip
        mirrored = outputs_first(transposed, transposed.weight.detach()).flip(2, 3)
        self.conv.weight = nn.Parameter(mirrored.contiguous())
        if bias is not None:
            self.conv.bias = nn.Parameter(bias.detach().clone())

    def forward(self, images):
        return self.conv(self.stuff_zeros(images))

    def stuff_zeros(self, images):
        """stride - 1 between the pixels, and around them so many that each output has a patch."""
        window, (down, across) = self.window, self.window.stride
        height, width = images.shape[2:]
        stuffed = images.new_zeros(
            *images.shape[:2], (height - 1) * down + 1, (width - 1) * across + 1
        )
        stuffed[:, :, ::down, ::across] = images
        top, left = (
            window.dilation[axis] * (window.kernel_size[axis] - 1) - window.padding[axis]
            for axis in range(2)
        )
        below, right = window.output_padding
        return F.pad(stuffed, [left, left + right, top, top + below])


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_transposed_convolution_with_groups_takes_the_steps_of_the_plain_one(normalize):
    """Each output's scale, each input's, and what is kept of them, in the weight's own shape."""
    model, images = make("2d, transposed, groups")
    twin = Stuffed(model)
    options = {"lr": 0.02, "weight_decay": 0.3, **NORMALIZATIONS[normalize]}
    start = model.weight.detach().clone()
    for each in (model, twin):
        optimizer = GLS(each, normalize=normalize, rank=200, curvature_every=2, **options)
        for step in range(5):
            optimizer.zero_grad()
            (torch.tanh(each(images * (1 + step))) - 1).square().mean().backward()
            optimizer.step()
    found = outputs_first(model, model.weight.detach()).flip(2, 3)
    assert_near(found, twin.conv.weight, TRAJECTORY)
    assert_near(model.bias, twin.conv.bias, TRAJECTORY)
    assert relative_error(model.weight, start) > 1e-2


@pytest.mark.parametrize("options", [{"kernel_size": 4, "stride": 2}, {"kernel_size": 1}], ids=str)
def test_depthwise_transposed_convolution_by_channels(options):
    """Of groups with one output each, in channels last, a view has the outputs on one axis."""
    torch.manual_seed(0)
    start = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, groups=8, **options)
    ).double()
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = copy.deepcopy(start).to(memory_format=layout)
        optimizer = GLS(model, lr=0.01, curvature_every=2)
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            images = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            (model(images) - 1).square().mean().backward()
            optimizer.step()
        found.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert_near(found[1], found[0], TRAJECTORY)


def test_transposed_convolution_with_groups_refuses_another_number_of_outputs():
    saved = GLS(model := nn.ConvTranspose2d(4, 6, 3, groups=2))
    model(torch.randn(3, 4, 2, 2)).sum().backward()
    saved.step()
    other = GLS(nn.ConvTranspose2d(4, 4, 3, groups=2))
    expected = r"expected a state of a weight \[4, 2, 3, 3\], got one of \[4, 3, 3, 3\]"
    with pytest.raises(ValueError, match=expected):
        other.load_state_dict(saved.state_dict())


def make_few(dtype, layout):
    """Convolutions of a few patches, one alone but for the batch, and their images."""
    torch.manual_seed(0)
    first = nn.Conv2d(6, 30, 3, stride=2, padding=1, padding_mode="circular")
    model = nn.Sequential(first, nn.Tanh(), nn.Conv2d(30, 40, (2, 1), dilation=(1, 2)))
    images = torch.randn(5, 6, 4, 4, dtype=dtype)
    if layout == "channels last":
        model, images = (x.to(memory_format=torch.channels_last) for x in (model, images))
    return model.to(dtype), images[0] if layout == "unbatched" else images


@pytest.mark.parametrize("layout", ["whole", "channels last", "unbatched"])
@pytest.mark.parametrize("bias", ["trained", "frozen", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_p_on_few_patches_is_p_on_their_gradient(backend, dtype, bias, layout, monkeypatch):
    """What stands in p.grad, and what goes on to the images."""
    found, asked = [], ImageRows.are_few
    for few in (True, False):
        taken = []

        def are_few(*given, few=few, taken=taken):
            taken.append(asked(*given))
            return few and taken[-1]

        with monkeypatch.context() as patch:
            patch.setattr(ImageRows, "are_few", are_few)
            model, images = make_few(dtype, layout)
            if bias == "none":
                model[0].bias = None
            elif bias == "frozen":
                model[2].bias.requires_grad_(False)
            optimizer = GLS(model, site="backward", rank=4, backend=backend)
            for step in range(2):
                optimizer.zero_grad()
                images = images.detach().roll(step).requires_grad_()
                outputs = model(images)
                assert outputs.ndim == images.ndim
                outputs.float().square().mean().backward()
                if step == 0:
                    optimizer.step()
        assert taken
        assert all(taken)
        assert optimizer.report().count("site backward") == 2
        found.append([images.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
        assert [x.dtype for x in found[-1]] == [dtype] * len(found[-1])
    for actual, expected in zip(*found, strict=True):
        assert_near(actual, expected, PRODUCT[dtype])


def test_auto_takes_convolutions_of_few_patches_at_the_backward():
    model = nn.Sequential(nn.Conv2d(50, 700, 3, stride=3), nn.Conv2d(700, 6, 1), nn.Flatten())
    optimizer = GLS(model)
    for _ in range(2):
        model(torch.randn(20, 50, 9, 9)[:, :, :3, :3]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    first, second, *_ = optimizer.report().splitlines()
    assert "site backward" in first
    assert "site step" in second


@pytest.mark.parametrize(
    "padding", [{"padding": 1, "padding_mode": "circular"}, {"padding": "same", "kernel_size": 4}]
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_inputs_of_a_padded_convolution_may_be_changed_in_place(padding):
    """Torch's own op keeps the padded copy, and so do the rows."""
    torch.manual_seed(0)
    convs = [nn.Conv1d(4, 4, **{"kernel_size": 3, **padding}).double() for _ in range(2)]
    convs[1].load_state_dict(convs[0].state_dict())
    for conv in convs:
        optimizer = GLS(conv, curvature_every=1)
        inputs = torch.ones(2, 4, 6, dtype=torch.float64)
        outputs = conv(inputs)
        if conv is convs[0]:
            inputs += 1
        outputs.square().sum().backward()
        optimizer.step()
    assert_equal(snapshot(convs[0]), snapshot(convs[1]))
