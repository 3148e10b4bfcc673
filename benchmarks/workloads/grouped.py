"""What P is worth in grouped convolutions: `python -m benchmarks.workloads.grouped`.

Trains a small network with two of them on Fashion-MNIST, and prints the mean training loss of the
last `EVERY` steps and the validation loss, by how these two are stepped: by Adam's update, with one
P for all groups, and with a P for each. For the last every group is a convolution of its own. All
other layers are the same. P is the dense one in the two, and no layer takes an orthogonal step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.workloads.data import Dataset, load_dataset
from benchmarks.workloads.tasks import CLASSES, Shape, Task
from benchmarks.workloads.training import Evaluation, Evaluations, train
from gls_fused import GLS

EVERY = 50
BATCH = 128
CHANNELS = 32


class Uncovered(nn.Conv2d):
    """With a forward of its own, which GLS does not look into."""

    def forward(self, inputs: Tensor) -> Tensor:
        """That of the convolution."""
        return super().forward(inputs)


class ByGroup(nn.Module):
    """The same convolution, as many as there are groups."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        assert conv.bias is not None
        tensors = zip(conv.weight.chunk(conv.groups), conv.bias.chunk(conv.groups), strict=True)
        for weight, bias in tensors:
            outputs, inputs = weight.shape[:2]
            part = nn.Conv2d(inputs, outputs, 3, conv.stride, padding=1)
            part.weight = nn.Parameter(weight.detach().clone())
            part.bias = nn.Parameter(bias.detach().clone())
            self.parts.append(part)

    def forward(self, inputs: Tensor) -> Tensor:
        """Of the channels of each group its own."""
        pairs = zip(self.parts, inputs.chunk(len(self.parts), 1), strict=True)
        return torch.cat([part(images) for part, images in pairs], 1)


def uncovered(conv: nn.Conv2d) -> nn.Module:
    """The same convolution, of which GLS sees no rows."""
    found = Uncovered(CHANNELS, CHANNELS, 3, conv.stride, padding=1, groups=conv.groups)
    found.load_state_dict(conv.state_dict())
    return found


HOW: dict[str, Callable[[nn.Conv2d], nn.Module]] = {
    "Adam's update": uncovered,
    "one P": lambda conv: conv,
    "a P per group": ByGroup,
}


def build(shape: Shape, groups: int, how: str) -> nn.Module:
    """A convolution, two grouped ones with one over channels after each, and a linear layer."""
    layers: list[nn.Module] = [nn.Conv2d(shape[0], CHANNELS, 3, 2, padding=1), nn.ReLU()]
    for stride in (1, 2):
        conv = nn.Conv2d(CHANNELS, CHANNELS, 3, stride, padding=1, groups=groups)
        layers += [conv, nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 1), nn.ReLU()]
    side = -(-shape[1] // 4)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(CHANNELS * side**2, CLASSES))
    # Whose weights would be drawn in vain, and others after them.
    with torch.random.fork_rng(devices=[]):
        for place in (2, 6):
            conv = model[place]
            assert isinstance(conv, nn.Conv2d)
            model[place] = HOW[how](conv)
    return model


def make_optimizer(model: nn.Module, lr: float) -> GLS:
    """GLS of a model of `build`."""
    assert isinstance(model, nn.Sequential)
    mine = [*model[2].parameters(), *model[6].parameters()]
    others = [p for p in model.parameters() if all(p is not each for each in mine)]
    groups = [{"params": mine, "curvature": "dense"}, {"params": others}]
    return GLS(groups, lr=lr, normalize="factored", model=model)


def main() -> None:
    """Train each, and print a row of a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, nargs="+", default=[4, CHANNELS])
    parser.add_argument("--steps", type=int, default=200, help="a multiple of 50")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11])
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = load_dataset("fashion-mnist", train_images=options.steps * BATCH)
    print(f"| groups | lr | seed | {' | '.join(HOW)} |\n{'|---' * (3 + len(HOW))}|")
    for groups in options.groups:
        for lr in options.lr:
            for seed in options.seeds:
                losses = [_train(dataset, groups, how, lr, seed) for how in HOW]
                print(f"| {groups} | {lr} | {seed} | {' | '.join(losses)} |", flush=True)


def _train(dataset: Dataset, groups: int, how: str, lr: float, seed: int) -> str:
    found: list[Evaluation] = []
    task = Task("grouped", "Grouped", True, lambda shape: build(shape, groups, how))
    for _ in train(
        task,
        dataset,
        lambda model: make_optimizer(model, lr),
        seed=seed,
        epochs=1,
        batch_size=BATCH,
        evaluations=Evaluations(EVERY, found.append),
    ):
        pass
    return f"{found[-1].train_loss:.3f} / {found[-1].validation_loss:.3f}"


if __name__ == "__main__":
    main()
