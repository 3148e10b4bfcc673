"""What `max_growth` is worth on a plateau: `python -m benchmarks.workloads.plateaus`.

Trains small models on data that is drawn here, and prints the mean training loss of the last
twentieth of the steps. In the first three tasks gradients become small and grow again. In the last
one they shrink.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gls_fused import GLS

# Gives the loss of a step.
Loss: TypeAlias = Callable[[], Tensor]
# Takes a model and a rate.
Make: TypeAlias = Callable[[nn.Module, float], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "Adam": lambda model, lr: torch.optim.Adam(model.parameters(), lr=lr),
    "Adam, beta2 .95": lambda model, lr: torch.optim.Adam(model.parameters(), lr, (0.9, 0.95)),
    "GLS": GLS,
    "GLS, no growth": lambda model, lr: GLS(model, lr, max_growth=None),
    "GLS, no growth, beta2 .999": lambda model, lr: GLS(model, lr, max_growth=None, beta2=0.999),
}


def parity() -> tuple[nn.Module, Loss]:
    """The exclusive or of two bits."""
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    bits = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    labels = torch.tensor([[0.0], [1.0], [1.0], [0.0]])
    return model, lambda: F.binary_cross_entropy_with_logits(model(bits), labels)


class Factors(nn.Module):
    """A product of two matrices, by its entries."""

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.left = nn.Linear(rows, rank, bias=False)
        self.right = nn.Linear(columns, rank, bias=False)

    def forward(self, row: Tensor, column: Tensor) -> Tensor:
        """The entries at some rows and columns, [n] each."""
        left = self.left(F.one_hot(row, self.left.in_features).float())
        right = self.right(F.one_hot(column, self.right.in_features).float())
        return (left * right).sum(1)


def factorisation() -> tuple[nn.Module, Loss]:
    """A matrix [200, 150] of rank 8, half of whose entries are known, with noise."""
    model = Factors(200, 150, 16)
    left, right = 0.6 * torch.randn(200, 8), 0.6 * torch.randn(150, 8)
    rows, columns = torch.randint(200, (15_000,)), torch.randint(150, (15_000,))
    entries = (left[rows] * right[columns]).sum(1) + 0.1 * torch.randn(15_000)

    def loss() -> Tensor:
        batch = torch.randint(len(entries), (256,))
        return F.mse_loss(model(rows[batch], columns[batch]), entries[batch])

    return model, loss


class Graph(nn.Module):
    """Three linear layers, each averaged over a graph's edges."""

    def __init__(self, edges: Tensor) -> None:
        super().__init__()
        self.edges = edges
        self.layers = nn.ModuleList([nn.Linear(200, 32), nn.Linear(32, 32), nn.Linear(32, 5)])

    def forward(self, x: Tensor) -> Tensor:
        """Logits [nodes, 5] of features [nodes, 200]."""
        for place, layer in enumerate(self.layers):
            x = self.edges @ layer(F.relu(x) if place else x)
        return x


def graph() -> tuple[nn.Module, Loss]:
    """The communities of 400 nodes, by their edges and sparse features."""
    label = torch.randint(5, (400,))
    likely = torch.where(label[:, None] == label, 0.06, 0.015)
    edges = torch.rand(400, 400) < likely
    adjacency = (edges | edges.T).float() + torch.eye(400)
    scale = adjacency.sum(1).rsqrt()
    features = torch.rand(400, 200) < 0.02 + 0.03 * (torch.arange(200) % 5 == label[:, None])
    model = Graph(scale[:, None] * adjacency * scale)
    return model, lambda: F.cross_entropy(model(features.float()), label)


def regression() -> tuple[nn.Module, Loss]:
    """A function of 32 features, that a random network computes, by large batches."""
    model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 1))
    teacher = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1)).requires_grad_(False)
    with torch.no_grad():
        for param in teacher.parameters():
            param.mul_(3)

    def loss() -> Tensor:
        inputs = torch.randn(2048, 32)
        return F.mse_loss(model(inputs), teacher(inputs))

    return model, loss


TASKS: dict[str, tuple[Callable[[], tuple[nn.Module, Loss]], int]] = {
    "parity": (parity, 800),
    "factorisation": (factorisation, 1000),
    "graph": (graph, 200),
    "regression": (regression, 300),
}


def train(name: str, make: Make, lr: float, seed: int) -> float:
    """The mean training loss of the last twentieth of the steps."""
    torch.manual_seed(seed)
    build, steps = TASKS[name]
    model, loss_of = build()
    optimizer = make(model, lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    last = losses[-(steps // 20) :]
    return sum(last) / len(last)


def main() -> None:
    """Train each, and print a row of a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--max-growth", type=float, help="of GLS; its default where not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[20, 21, 22])
    options = parser.parse_args()
    torch.set_num_threads(1)
    optimizers = dict(OPTIMIZERS)
    if options.max_growth is not None:
        optimizers["GLS"] = lambda model, lr: GLS(model, lr, max_growth=options.max_growth)
    print(f"| task | lr | {' | '.join(OPTIMIZERS)} |\n{'|---' * (2 + len(OPTIMIZERS))}|")
    for name in options.tasks:
        for lr in options.lr:
            means = []
            for make in optimizers.values():
                losses = [train(name, make, lr, seed) for seed in options.seeds]
                means.append(f"{sum(losses) / len(losses):.4f}")
            print(f"| {name} | {lr} | {' | '.join(means)} |", flush=True)


if __name__ == "__main__":
    main()
