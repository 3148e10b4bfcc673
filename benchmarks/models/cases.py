"""What the published models are trained on: random images and tokens in the shapes they take.

Labels do not matter to the seconds: all are class 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.coverage.build import Build, vision
from benchmarks.coverage.models import MODELS

Loss = Callable[[nn.Module], Tensor]

# Of the image models that take any size; the others have their own.
PIXELS = 160
TOKENS = 512
# Below the smallest vocabulary.
VOCABULARY = 10000
# Of the seconds of fused AdamW, at usual sizes, and for ResNet-18 at 32 pixels with 128 images.
AIM, SMALL_AIM = 1.15, 1.05


@dataclass(frozen=True)
class Case:
    """A model and a batch.

    Attributes:
        size: of an image's side or a sequence, with its unit.
        loss: of a batch of so many.
        batch: how many, where nobody says otherwise; `fixed`, where nobody may.
    """

    package: str
    name: str
    build: Build
    size: str
    loss: Callable[[int], Loss]
    batch: int
    fixed: bool = False
    aim: float = AIM

    def count(self, batch: int | None) -> int:
        """How many images or sequences a batch has, where `batch` is asked for."""
        return self.batch if batch is None or self.fixed else batch


def _classified(outputs: Any) -> Tensor:
    """Cross entropy of all logits that a model gives, [n, classes, ...]."""
    if isinstance(outputs, Tensor):
        outputs = (outputs,)
    found = outputs.values() if isinstance(outputs, Mapping) else outputs
    losses = [
        F.cross_entropy(logits, logits.new_zeros(logits.shape[:1] + logits.shape[2:]).long())
        for logits in found
        if logits is not None
    ]
    return torch.stack(losses).sum()


def _images(
    size: int, channels: int = 3, run: Callable[[Any, Tensor], Any] = lambda model, x: model(x)
) -> Callable[[int], Loss]:
    def make(count: int) -> Loss:
        images = torch.randn(count, channels, size, size)
        return lambda model: _classified(run(model, images))

    return make


def _tokens(count: int) -> Tensor:
    return torch.randint(VOCABULARY, (count, TOKENS))


def _language(count: int) -> Loss:
    tokens = _tokens(count)

    def loss(model: Any) -> Tensor:
        found: Tensor = model(input_ids=tokens, labels=tokens).loss
        return found

    return loss


def _translation(count: int) -> Loss:
    tokens = _tokens(count)

    def loss(model: Any) -> Tensor:
        found: Tensor = model(input_ids=tokens, decoder_input_ids=tokens, labels=tokens).loss
        return found

    return loss


def _vectors(count: int) -> Loss:
    """Of nn.Transformer, whose embedding and head are its user's."""
    width = 512
    source, target = torch.randn(2, TOKENS, count, width).unbind()
    return lambda model: model(source, target).square().mean()


def _run_lstm(model: Any, tokens: Tensor) -> Tensor:
    embedding, lstm, head = model
    logits: Tensor = head(lstm(embedding(tokens))[0])
    return logits


def _recurrent(count: int) -> Loss:
    tokens = _tokens(count).T
    return lambda model: _classified(_run_lstm(model, tokens).flatten(0, 1))


def _run_unet(model: Any, images: Tensor) -> Tensor:
    """Pairs of convolutions; halves of the image meet, cut to the size of the smaller."""
    *layers, head = model
    down, up = layers[:10], layers[10:]
    x, skips = images, []
    for first, second in zip(down[::2], down[1::2], strict=True):
        x = second(first(F.max_pool2d(x, 2) if skips else x).relu()).relu()
        skips.append(x)
    skips.pop()
    for index in range(0, len(up), 3):
        grow, first, second = up[index : index + 3]
        x, skip = grow(x), skips.pop()
        edge = (skip.shape[-1] - x.shape[-1]) // 2
        skip = skip[..., edge : edge + x.shape[-2], edge : edge + x.shape[-1]]
        x = second(first(torch.cat([skip, x], dim=1)).relu()).relu()
    logits: Tensor = head(x)
    return logits


def small_resnet18() -> nn.Module:
    """ResNet-18 as it is trained on CIFAR-10: a stem of 3 x 3 without stride and pooling."""
    model: Any = vision("resnet18", num_classes=10)()
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    found: nn.Module = model
    return found


def _of_images(package: str, name: str, size: int = PIXELS) -> Case:
    return Case(package, name, MODELS[package][name], f"{size} pixels", _images(size), 2)


def _of_tokens(name: str, loss: Callable[[int], Loss], package: str = "transformers") -> Case:
    return Case(package, name, MODELS[package][name], f"{TOKENS} tokens", loss, 1)


def _of_cifar(name: str, build: Build) -> Case:
    size = 32
    return Case(
        "torchvision", name, build, f"{size} pixels", _images(size), 128, fixed=True, aim=SMALL_AIM
    )


# Where two halves of U-Net's images meet, all sizes before a pooling are even.
UNET_PIXELS = 252

# Those that take long, or much memory, come last.
CASES: Mapping[str, Case] = {
    case.name: case
    for case in (
        _of_cifar("resnet18, CIFAR stem", small_resnet18),
        _of_cifar("resnet18, ImageNet stem", vision("resnet18", num_classes=10)),
        *(
            _of_images("torchvision", name)
            for name in (
                "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "densenet121",
                "resnet18", "efficientnet_v2_s", "resnext50_32x4d", "resnet50", "convnext_tiny",
                "deeplabv3_resnet50", "alexnet",
            )
        ),
        *(
            _of_images("timm", name)
            for name in (
                "ghostnet_100", "mobilenetv3_large_100", "mobilevit_s", "regnety_032", "hrnet_w18",
                "resnetv2_50x1_bit", "resnest50d",
            )
        ),
        _of_images("transformers", "SegFormer B0"),
        _of_tokens("LSTM language model", _recurrent, "torch"),
        _of_tokens("T5 small", _translation),
        _of_tokens("DistilBERT", _language),
        _of_images("torchvision", "swin_t", 224),
        _of_images("timm", "deit_small_patch16_224", 224),
        _of_tokens("Transformer", _vectors, "torch"),
        _of_tokens("GPT-2", _language),
        _of_tokens("BERT base", _language),
        _of_images("torchvision", "vit_b_16", 224),
        _of_images("torchvision", "inception_v3", 299),
        *(
            _of_images("timm", name, 224)
            for name in ("xcit_small_12_p16_224", "coatnet_0_rw_224", "cait_s24_224")
        ),
        _of_images("timm", "convmixer_768_32"),
        *(_of_tokens(name, _language) for name in ("OPT 125M", "SqueezeBERT")),
        _of_images("torchvision", "maxvit_t", 224),
        _of_images("timm", "swinv2_tiny_window8_256", 256),
        *(_of_images("timm", name) for name in ("dm_nfnet_f0", "convnext_base")),
        Case(
            "torch", "U-Net", MODELS["torch"]["U-Net"], f"{UNET_PIXELS} pixels",
            _images(UNET_PIXELS, channels=1, run=_run_unet), 2,
        ),
        _of_tokens("ModernBERT base", _language),
        *(
            _of_images("timm", name, 224)
            for name in (
                "mixer_b16_224", "beit_base_patch16_224", "eva02_base_patch14_224",
            )
        ),
        _of_images("torchvision", "vgg16"),
        _of_tokens("Qwen2 0.5B", _language),
    )
}  # fmt: skip
