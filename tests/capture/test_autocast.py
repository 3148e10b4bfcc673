"""Under autocast a captured model computes, and keeps for its backward, what a plain one does."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from gls_fused import GLS

USES = 8


class Repeated(nn.Module):
    """A module that is called several times, with what it gives."""

    def __init__(self, inner, call=None):
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, inputs):
        for _ in range(USES):
            inputs = torch.tanh(self.call(self.inner, inputs) if self.call else self.inner(inputs))
        return inputs


class Decoder(nn.Module):
    """A recurrent module that is called for each step."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, inputs):
        state = None
        for step in inputs.split(1):
            outputs, state = self.inner(step, state)
        return outputs


# By name, a model and the shape of its inputs.
MODELS = {
    "linear": (lambda: Repeated(nn.Linear(16, 16)), (5, 16)),
    "lent": (
        lambda: Repeated(nn.Linear(16, 16), lambda m, x: F.linear(x, m.weight, m.bias)),
        (5, 16),
    ),
    "convolution": (lambda: Repeated(nn.Conv2d(4, 4, 3, padding=1)), (2, 4, 6, 6)),
    "transposed": (lambda: Repeated(nn.ConvTranspose2d(4, 4, 3, padding=1)), (2, 4, 6, 6)),
    "attention": (
        lambda: Repeated(nn.MultiheadAttention(8, 2), lambda m, x: m(x, x, x)[0]),
        (5, 2, 8),
    ),
    "gru": (lambda: Decoder(nn.GRU(8, 8)), (6, 2, 8)),
    "rnn": (lambda: Decoder(nn.RNN(8, 8)), (6, 2, 8)),
    "lstm": (lambda: Decoder(nn.LSTM(8, 8)), (6, 2, 8)),
    "gru cell": (lambda: Repeated(nn.GRUCell(8, 8), lambda m, x: m(x, x)), (5, 8)),
}


def run(model, inputs):
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(inputs)
    return outputs.float().square().sum()


def skip_where_torch_cannot(model, inputs):
    """CPUs without AVX-512 have no LSTM of bfloat16."""
    try:
        run(copy.deepcopy(model), inputs)
    except RuntimeError as error:
        if "could not create a primitive" not in str(error):
            raise
        pytest.skip("torch has no LSTM of bfloat16 for this CPU")


def bytes_of_weights(model, inputs):
    """What a graph keeps of tensors as large as a weight that no row has made, each once."""
    sizes = {p.numel() for p in model.parameters() if p.ndim > 1}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        # Kept, as another would take its place.
        if storage.nbytes() // tensor.element_size() in sizes:
            found[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run(model, inputs)
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("name", MODELS)
def test_several_uses_share_the_cast_of_a_weight(name):
    """Without the native module each has its own, and the gradients are summed in float32."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make()
    skip_where_torch_cannot(model, torch.zeros(shape))
    optimizer = GLS(model, rank=4, curvature_every=2, site="step")
    for step in range(4):
        inputs = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        plain = copy.deepcopy(model)
        assert bytes_of_weights(model, inputs) == bytes_of_weights(plain, inputs)
        optimizer.zero_grad()
        loss, expected = run(model, inputs), run(plain, inputs)
        assert torch.equal(loss, expected)
        loss.backward()
        expected.backward()
        for param, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(param.grad, other.grad)
        optimizer.step()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_images_are_padded_before_they_are_cast(mode, compiled):
    """The backward of a padding adds up, in the dtype that the images have."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    second = nn.Conv2d(8, 4, 3, padding=1, padding_mode=mode)
    model = nn.ModuleList([nn.Conv2d(3, 8, 3), second])
    plain = copy.deepcopy(model)
    optimizer = GLS(model, site="step")
    inputs = torch.randn(4, 3, 10, 10)
    for each in (model, plain):

        def loss_of(each=each):
            with torch.autocast("cpu", torch.bfloat16):
                return each[1](each[0](inputs).float()).float().square().sum()

        (torch.compile(loss_of, backend="aot_eager") if compiled else loss_of)().backward()
    for param, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(param.grad, other.grad)
    optimizer.step()
    assert "no rows" not in optimizer.report()
    torch._dynamo.reset()
