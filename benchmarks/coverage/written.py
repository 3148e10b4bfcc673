"""Models that no package has: their layers in the published sizes, which is all that counts."""

from __future__ import annotations

import itertools

from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm


def unet() -> nn.Module:
    """Ronneberger et al., 2015: halves of the image meet by transposed convolutions."""
    widths = (64, 128, 256, 512, 1024)
    layers: list[nn.Module] = []
    for inputs, outputs in zip((1, *widths), widths, strict=False):
        layers += [nn.Conv2d(inputs, outputs, 3), nn.Conv2d(outputs, outputs, 3)]
    for inputs, outputs in zip(widths[:0:-1], widths[-2::-1], strict=True):
        layers += [
            nn.ConvTranspose2d(inputs, outputs, 2, 2),
            nn.Conv2d(inputs, outputs, 3),
            nn.Conv2d(outputs, outputs, 3),
        ]
    return nn.Sequential(*layers, nn.Conv2d(64, 2, 1))


def dcgan_generator() -> nn.Module:
    """Radford et al., 2016, for 64 x 64 pixels."""
    widths = (100, 1024, 512, 256, 128)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.ConvTranspose2d(inputs, outputs, 4, 2, bias=False), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(128, 3, 4, 2))


def sngan_discriminator() -> nn.Module:
    """Miyato et al., 2018, the plain network for CIFAR-10."""
    widths = (3, 64, 64, 128, 128, 256, 256, 512)
    sizes = (3, 4, 3, 4, 3, 4, 3)
    layers = [
        spectral_norm(nn.Conv2d(inputs, outputs, size))
        for inputs, outputs, size in zip(widths, widths[1:], sizes, strict=False)
    ]
    return nn.Sequential(*layers, spectral_norm(nn.Linear(512 * 4 * 4, 1)))


def lstm_language_model() -> nn.Module:
    """Zaremba et al., 2014, medium, on the Penn treebank."""
    return nn.Sequential(
        nn.Embedding(10000, 650), nn.LSTM(650, 650, num_layers=2), nn.Linear(650, 10000)
    )


def deep_speech_2() -> nn.Module:
    """Amodei et al., 2016: two convolutions and five GRUs, whose directions are added up."""
    grus = [nn.GRU(inputs, 800, bidirectional=True) for inputs in (1312, 800, 800, 800, 800)]
    return nn.Sequential(
        nn.Conv2d(1, 32, (41, 11), (2, 2)),
        nn.BatchNorm2d(32),
        nn.Conv2d(32, 32, (21, 11), (2, 1)),
        nn.BatchNorm2d(32),
        *grus,
        nn.Linear(800, 29),
    )


def temporal_convolutions() -> nn.Module:
    """Bai et al., 2018, TCN on the characters of the Penn treebank."""
    widths = (100, 450, 450, 450)
    layers: list[nn.Module] = [nn.Embedding(50, 100)]
    for inputs, outputs in itertools.pairwise(widths):
        layers += [
            weight_norm(nn.Conv1d(inputs, outputs, 3)),
            weight_norm(nn.Conv1d(outputs, outputs, 3)),
        ]
        if inputs != outputs:
            layers.append(nn.Conv1d(inputs, outputs, 1))
    return nn.Sequential(*layers, nn.Linear(450, 50))


def point_net() -> nn.Module:
    """Qi et al., 2017, a classifier of ModelNet40 without its transforms."""
    points = [
        nn.Conv1d(inputs, outputs, 1) for inputs, outputs in ((3, 64), (64, 128), (128, 1024))
    ]
    return nn.Sequential(*points, nn.Linear(1024, 512), nn.Linear(512, 256), nn.Linear(256, 40))


def dlrm() -> nn.Module:
    """Naumov et al., 2019, on Criteo's Kaggle data: 26 tables and two perceptrons."""
    # Rows of the tables: the categories of the data.
    rows = (
        1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992,
        5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
    )  # fmt: skip
    tables: list[nn.Module] = [nn.EmbeddingBag(count, 16) for count in rows]
    widths = (13, 512, 256, 64, 16)
    bottom = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    widths = (367, 512, 256, 1)
    top = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    return nn.ModuleList([*tables, *bottom, *top])
