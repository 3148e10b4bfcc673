"""A layer of your own beside torch's: GLS sees the rows of the weight that it uses.

python examples/custom_layer.py
"""

import torch
from torch import nn
from torch.nn.functional import mse_loss

import gls_fused


class Gated(nn.Module):
    """One half of a product, gated by the other; the weight is [inputs, 2 outputs]."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, 2 * outputs) / inputs**0.5)

    def forward(self, x):
        values, gates = (x @ gls_fused.observe(self, x)).chunk(2, dim=-1)
        return values * torch.sigmoid(gates)


# Before the optimizer is built: forward calls `observe`, of a weight with its inputs first.
gls_fused.register(Gated, "turned observed")


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(Gated(16, 64), Gated(64, 64), nn.Linear(64, 4))


def make_batches(count, seed=1):
    """Inputs, and a smooth function of them."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(16, 4, generator=generator) / 4
    for _ in range(count):
        inputs = torch.randn(128, 16, generator=generator)
        yield inputs, torch.sin(inputs @ mixed)


def train(steps=100):
    """The losses of a model, and what GLS says of it."""
    model = make_model()
    optimizer = gls_fused.GLS(model, lr=3e-3)
    losses = []
    for inputs, targets in make_batches(steps):
        optimizer.zero_grad()
        loss = mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, optimizer.report()


if __name__ == "__main__":
    losses, report = train()
    print(report)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
