"""Small float64 models, and their training, shared by the tests."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gls_fused import GLS

KINDS = ("mlp", "cnn")
# Further convolutions; as "cnn", of so many spatial dimensions. Those with few patches have one for
# an image, so that in a small batch they are fewer than the outputs.
DIMENSIONS = {"cnn": 2, "conv1d": 1, "conv3d": 3, "grouped": 2, "transposed": 2, "few patches": 2}
CONVOLUTIONS = tuple(kind for kind in DIMENSIONS if kind not in KINDS)
WIDTH = 8
OPTIONS = {"rank": 4, "curvature_every": 2, "lr": 0.01}
# Each with a site, and a rate that suits it where the usual ones do not.
NORMALIZATIONS = {
    "rms": {"site": "backward"},
    "row": {"site": "step"},
    "factored": {"site": "backward"},
    "spectral": {"site": "step", "spectral_head": True},
    "adam": {"site": "backward"},
    "none": {"site": "step", "lr": 0.1},
    "sgd": {"site": "step", "lr": 0.1},
}


class Conv1D(nn.Module):
    """That of transformers: a weight [k, m], which other packages call a linear layer's."""

    def __init__(self, inputs, outputs, bias=True):
        super().__init__()
        linear = nn.Linear(inputs, outputs, bias=bias)
        self.weight = nn.Parameter(linear.weight.detach().T.contiguous())
        self.bias = linear.bias

    def forward(self, x):
        flat = x.view(-1, x.size(-1))
        found = flat @ self.weight if self.bias is None else self.bias.addmm(flat, self.weight)
        return found.view(*x.shape[:-1], -1)


# By its path it is known, without a word to GLS.
Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"


class Experts(nn.Module):
    """As transformers' are: five experts in each parameter, the last of which gets no rows.

    The signs of a row choose its expert.

    Args:
        turned: whether a matrix is [k, m], as gpt-oss has it.
    """

    def __init__(self, width, *, turned=False, bias=False):
        super().__init__()
        self.is_transposed, self.has_bias, self.has_gate = turned, bias, False
        for name in ("up_proj", "down_proj"):
            weight = torch.randn(5, width, width) / width**0.5
            self.register_parameter(name, nn.Parameter(weight))
            own = nn.Parameter(torch.randn(5, width) / 4) if bias else None
            self.register_parameter(f"{name}_bias", own)

    def project(self, rows, name, expert):
        weight, bias = getattr(self, name)[expert], getattr(self, f"{name}_bias")
        if self.is_transposed:
            outputs = rows @ weight
            return outputs if bias is None else outputs + bias[expert]
        return nn.functional.linear(rows, weight, None if bias is None else bias[expert])

    def forward(self, inputs):
        experts = (inputs[:, 0] > 0).long() + 2 * (inputs[:, 1] > 0)
        outputs = torch.zeros_like(inputs)
        for expert in experts.unique():
            (places,) = torch.where(experts == expert)
            hidden = torch.tanh(self.project(inputs[places], "up_proj", expert))
            own = self.project(hidden, "down_proj", expert)
            outputs = outputs.index_add(0, places, own)
        return outputs


class Net(nn.Module):
    """stem -> first -> second -> head; first and second have the same shape.

    Args:
        kind: "mlp" (inputs [n, 6]), "turned" (the same of Conv1D), "experts" (with those in the
            middle), "cnn" (inputs [n, 2, 6, 6]) or one of `CONVOLUTIONS`.
        recompute: how the middle is checkpointed: None, "reentrant" or "saved".
    """

    def __init__(self, kind, *, bias=True, recompute=None):
        super().__init__()
        linear = Conv1D if kind == "turned" else nn.Linear
        if kind not in DIMENSIONS:
            self.stem = linear(6, WIDTH, bias=bias)
            self.first = linear(WIDTH, WIDTH, bias=bias)
            self.second = linear(WIDTH, WIDTH, bias=bias)
            if kind == "experts":
                self.first = Experts(WIDTH)
                self.second = Experts(WIDTH, turned=True, bias=bias)
        else:
            conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[DIMENSIONS[kind] - 1]
            self.stem = conv(2, WIDTH, 3, stride=2, bias=bias)
            if kind == "transposed":
                conv = nn.ConvTranspose2d
                self.stem = conv(2, WIDTH, 3, stride=2, padding=5, bias=bias)
            if kind == "few patches":
                self.stem = conv(2, WIDTH, 6, bias=bias)
            groups = {"grouped": WIDTH // 2, "transposed": 2}.get(kind, 1)
            mode = "circular" if kind == "few patches" else "zeros"
            alike = {"padding": 1, "padding_mode": mode, "groups": groups, "bias": bias}
            self.first, self.second = (conv(WIDTH, WIDTH, 3, **alike) for _ in range(2))
        side = {"transposed": 4, "few patches": 1}.get(kind, 2)
        positions = side ** DIMENSIONS[kind] if kind in DIMENSIONS else 1
        self.head = linear(WIDTH * positions, 3, bias=bias)
        self.kind = kind
        self.recompute = recompute
        self.repeats = 1

    def middle(self, hidden, skip):
        for _ in range(self.repeats):
            hidden = torch.tanh(self.first(hidden))
        return hidden if skip else torch.tanh(self.second(hidden))

    def forward(self, inputs, skip=False):
        # In its other calls a transposed convolution is asked for no size.
        asked = {"output_size": (4, 4)} if self.kind == "transposed" else {}
        hidden = torch.tanh(self.stem(inputs, **asked))
        if self.recompute is None:
            hidden = self.middle(hidden, skip)
        else:
            reentrant = self.recompute == "reentrant"
            hidden = checkpoint(self.middle, hidden, skip, use_reentrant=reentrant)
        return self.head(hidden.flatten(1))


def linear_of(weight, bias=None):
    """An nn.Linear of copies of a weight [m, k] and a bias [m]."""
    found = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    found.weight = nn.Parameter(weight.clone())
    if bias is not None:
        found.bias = nn.Parameter(bias.clone())
    return found


def make_net(kind, **options):
    torch.manual_seed(0)
    return Net(kind, **options).double()


def make_batch(kind, n, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (n, 2, *[6] * DIMENSIONS[kind]) if kind in DIMENSIONS else (n, 6)
    inputs = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return inputs, torch.randn(n, 3, generator=generator, dtype=torch.float64)


def loss_of(model, batch, **options):
    inputs, targets = batch
    return (model(inputs, **options) - targets).square().mean()


def train(model, optimizer, steps, kind="mlp", after=None):
    """The parameters after these steps, whose number is their batch's seed."""
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, make_batch(kind, 9, step)).backward()
        optimizer.step()
        if after is not None:
            after()
    return snapshot(model)


def make_trained(steps=4, kind="mlp", **options):
    """A net and its GLS, with `OPTIONS` but for these, after some steps."""
    model = make_net(kind)
    optimizer = GLS(model, **{**OPTIONS, **options})
    train(model, optimizer, range(steps), kind)
    return model, optimizer


def snapshot(model):
    """A copy of all the parameters."""
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(actual, expected):
    """Tensors, bit for bit."""
    for p, q in zip(actual, expected, strict=True):
        assert p.dtype == q.dtype
        assert torch.equal(p, q)


def assert_same_state(actual, expected):
    """Two state dicts, bit for bit."""
    assert actual["param_groups"] == expected["param_groups"]
    assert actual["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        assert actual["state"][index].keys() == state.keys()
        for key, value in state.items():
            found = actual["state"][index][key]
            assert type(found) is type(value), key
            assert_equal([torch.as_tensor(found)], [torch.as_tensor(value)])


def gradients(model):
    """A copy of all the gradients, None where there is none."""
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]
