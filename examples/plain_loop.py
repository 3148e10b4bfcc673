"""A plain training loop: one line differs from Adam's.

python examples/plain_loop.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gls_fused import GLS


def train(epochs=5):
    """Mean training loss of each epoch, of a classifier of 8 x 8 images of digits."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    batches = DataLoader(
        TensorDataset(images, torch.tensor(digits.target)), batch_size=64, shuffle=True
    )
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = GLS(model, lr=3e-3)  # torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(epochs):
        total = 0.0
        for inputs, labels in batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(inputs)
        losses.append(total / len(images))
    return losses


if __name__ == "__main__":
    for epoch, loss in enumerate(train(), 1):
        print(f"epoch {epoch}: training loss {loss:.4f}")
