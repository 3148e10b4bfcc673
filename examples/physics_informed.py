"""A physics-informed net of Burgers' equation: one line differs from AdamW's.

python examples/physics_informed.py

    u_t + u u_x = .01 / pi u_xx,    u(0, x) = -sin(pi x),    u(t, -1) = u(t, 1) = 0
"""

import itertools
import math

import torch
from torch import Tensor, nn

from gls_fused import GLS


class Net(nn.Module):
    """u(t, x), two coordinates to a number."""

    def __init__(self, width: int = 40, depth: int = 4) -> None:
        super().__init__()
        sizes = [2, *[width] * depth]
        hidden = [
            part
            for inputs, outputs in itertools.pairwise(sizes)
            for part in (nn.Linear(inputs, outputs), nn.Tanh())
        ]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 1))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Of columns [n, 1]."""
        return self.layers(torch.cat([t, x], 1))  # type: ignore[no-any-return]


def derivative(outputs: Tensor, inputs: Tensor) -> Tensor:
    """That of each output by its own input."""
    (found,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
    return found


def loss_of(net: Net, t: Tensor, x: Tensor) -> Tensor:
    """The equation's residual inside, and what u is at the start and at the walls."""
    t, x = t.requires_grad_(), x.requires_grad_()
    u = net(t, x)
    u_x = derivative(u, x)
    residual = derivative(u, t) + u * u_x - 0.01 / math.pi * derivative(u_x, x)
    start = net(torch.zeros_like(x), x) + torch.sin(math.pi * x)
    walls = [net(t, torch.full_like(x, side)) for side in (-1.0, 1.0)]
    squares = [part.square().mean() for part in (residual, start, *walls)]
    return torch.stack(squares).sum()


def train(name: str = "gls", steps: int = 500, points: int = 1000) -> list[float]:
    """The loss after every step, on points drawn anew."""
    torch.manual_seed(0)
    net = Net()
    optimizer: torch.optim.Optimizer
    if name == "gls":
        optimizer = GLS(net, lr=3e-3)
    else:
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        t, x = torch.rand(points, 1), 2 * torch.rand(points, 1) - 1
        optimizer.zero_grad()
        loss = loss_of(net, t, x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for name in ("adamw", "gls"):
        losses = train(name)
        print(f"{name}: {losses[0]:.3f} at first, {sum(losses[-20:]) / 20:.3f} at last")
