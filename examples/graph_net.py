"""A graph network in plain PyTorch: GLS sees the rows of a weight that a layer of yours uses.

python examples/graph_net.py
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import gls_fused

NODES, GROUPS, FEATURES = 600, 4, 32


class GraphConv(nn.Module):
    """Each node takes the mean, over itself and its neighbours, of what one product gives."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x, adjacency):
        # Without GLS this is self.weight.
        weight = gls_fused.observe(self, x)
        return adjacency @ (x @ weight.T) + self.bias


# Before the optimizer is built: forward calls `observe`.
gls_fused.register(GraphConv, "observed")


class GraphNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = GraphConv(FEATURES, 64)
        self.second = GraphConv(64, GROUPS)

    def forward(self, x, adjacency):
        return self.second(torch.relu(self.first(x, adjacency)), adjacency)


def make_graph():
    """Nodes that know their own group's more often, with features that say little of it."""
    groups = torch.randint(GROUPS, (NODES,))
    alike = groups[:, None] == groups
    edges = (torch.rand(NODES, NODES) < torch.where(alike, 0.04, 0.01)).triu(1)
    adjacency = (edges | edges.T).float() + torch.eye(NODES)
    features = torch.randn(NODES, FEATURES)
    features[:, :GROUPS] += 0.5 * nn.functional.one_hot(groups, GROUPS)
    return features, adjacency / adjacency.sum(1, keepdim=True), groups


def train(steps=40):
    """The losses of a model, and what GLS says of it."""
    torch.manual_seed(0)
    features, adjacency, groups = make_graph()
    model = GraphNet()
    optimizer = gls_fused.GLS(model, lr=3e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(model(features, adjacency), groups)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, optimizer.report()


if __name__ == "__main__":
    losses, report = train()
    print(report)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
