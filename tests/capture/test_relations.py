"""torch_geometric's layers with a matrix for each relation, step or type of node."""

import pytest
import torch
from nets import linear_of
from tolerances import SAME_STEPS, assert_near, relative_error
from torch import nn

from gls_fused import GLS

pyg = pytest.importorskip("torch_geometric.nn")
NODES, WIDTH, MATRICES, STEPS = 20, 6, 3, 6
GENERATOR = torch.Generator().manual_seed(0)
EDGES = torch.randint(NODES, (2, 60), generator=GENERATOR)
# Of no edge and of no node is the second.
RELATIONS = 2 * torch.randint(2, (60,), generator=GENERATOR)
TYPES = RELATIONS[:NODES]
INPUTS = torch.randn(STEPS, NODES, WIDTH, generator=GENERATOR, dtype=torch.float64)


class Alone(nn.Module):
    """The same layer with an nn.Linear for each matrix."""

    def __init__(self, layer):
        super().__init__()
        self.linears = nn.ModuleList(linear_of(matrix.mT) for matrix in layer.weight.detach())
        for name, param in layer.named_parameters(recurse=False):
            if name != "weight":
                self.register_parameter(name, nn.Parameter(param.detach().clone()))


class Relational(Alone):
    def forward(self, x):
        outputs = x @ self.root + self.bias
        for relation, linear in enumerate(self.linears):
            source, target = EDGES[:, relation == RELATIONS]
            if len(source):
                counts = torch.bincount(target, minlength=NODES).clamp(min=1)[:, None]
                sums = torch.zeros_like(x).index_add(0, target, x[source])
                outputs = outputs + linear(sums / counts)
        return outputs


class Gated(Alone):
    def __init__(self, layer):
        super().__init__(layer)
        self.rnn = nn.GRUCell(WIDTH, WIDTH)
        self.rnn.load_state_dict(layer.rnn.state_dict())

    def forward(self, x):
        # Each step has a matrix of its own.
        for linear in self.linears:
            sums = torch.zeros_like(x).index_add(0, EDGES[1], linear(x)[EDGES[0]])
            x = self.rnn(sums, x)
        return x


class Typed(Alone):
    def forward(self, x):
        outputs = self.bias[TYPES]
        for kind, linear in enumerate(self.linears):
            (places,) = torch.nonzero(kind == TYPES, as_tuple=True)
            if len(places):
                outputs = outputs.index_add(0, places, linear(x[places]))
        return outputs


CASES = {
    "RGCNConv": ((WIDTH, 4, MATRICES), (EDGES, RELATIONS), Relational),
    "GatedGraphConv": ((WIDTH, MATRICES), (EDGES,), Gated),
    "HeteroLinear": ((WIDTH, 4, MATRICES), (TYPES,), Typed),
}


def train(model, *rest):
    optimizer = GLS(model, rank=4, curvature_every=2, lr=0.02, normalize="factored")
    for inputs in INPUTS:
        optimizer.zero_grad()
        (model(inputs, *rest) - 1).square().mean().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", CASES)
def test_trains_as_layers(name):
    arguments, rest, kind = CASES[name]
    torch.manual_seed(0)
    layer = getattr(pyg, name)(*arguments)
    for param in layer.parameters():
        nn.init.normal_(param, std=0.4)
    layer.double()
    twin = kind(layer).double()
    before = layer.weight.detach().clone()
    optimizer = train(layer, *rest)
    train(twin)
    assert "GLS (Experts 3 x 6 -> " in optimizer.report()
    for place, linear in enumerate(twin.linears):
        assert_near(layer.weight[place].mT, linear.weight, SAME_STEPS)
        used = name == "GatedGraphConv" or place != 1
        assert (relative_error(layer.weight[place], before[place]) > 1e-3) == used
    for other, expected in twin.named_parameters():
        if not other.startswith("linears"):
            assert_near(layer.get_parameter(other), expected, SAME_STEPS)
