"""A Lightning module that returns GLS from configure_optimizers, and logs its diagnostics.

pip install 'gls_fused[examples]'
python examples/lightning_module.py
"""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gls_fused import GLS


class Classifier(lightning.LightningModule):
    """A classifier of 8 x 8 images of digits."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, _):
        images, labels = batch
        loss = nn.functional.cross_entropy(self.layers(images), labels)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self):
        self.log_dict(self.optimizers().diagnostics())

    def configure_optimizers(self):
        return GLS(self, lr=1e-3)  # torch.optim.Adam(self.parameters(), lr=1e-3)


def make_batches():
    """The digits in one order, so that runs can be compared."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    return DataLoader(TensorDataset(images, torch.tensor(digits.target)), batch_size=64)


if __name__ == "__main__":
    lightning.seed_everything(0)
    model = Classifier()
    trainer = lightning.Trainer(
        max_epochs=5, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    trainer.fit(model, make_batches())
    for name, value in trainer.callback_metrics.items():
        print(f"{name}: {value:.4g}")
