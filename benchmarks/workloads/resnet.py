"""The task `resnet`: a residual network with batch norm, as they are built for CIFAR-10."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10
# Each after the first has twice the channels on half the height and width.
STAGES, BLOCKS = 3, 2


class Block(nn.Module):
    """Two convolutions 3x3 with batch norm and a way around them.

    Where the shape changes, the way around is a convolution 1x1 with batch norm.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.around: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            self.around = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, images: Tensor) -> Tensor:
        inner = functional.relu(self.first_norm(self.first(images)))
        return functional.relu(self.second_norm(self.second(inner)) + self.around(images))


def build_resnet(shape: tuple[int, ...]) -> nn.Module:
    """A convolution, three stages of two blocks, the mean over positions, a linear layer.

    1.1 million parameters for 3x32x32 images, 0.2 million for 28x28.
    """
    channels = shape[0]
    width = _width(math.prod(shape))
    layers: list[nn.Module] = [
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    before = width
    for stage in range(STAGES):
        after = width * 2**stage
        for block in range(BLOCKS):
            layers.append(Block(before, after, 2 if stage and not block else 1))
            before = after
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, CLASSES)]
    return nn.Sequential(*layers)


def _width(inputs: int) -> int:
    """Channels of the first stage."""
    if inputs >= 2048:
        return 40
    return 16 if inputs >= 256 else 8
