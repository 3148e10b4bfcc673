"""How a model of each package is built from its configuration: no weights, nothing fetched."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

Build = Callable[[], nn.Module]
INSTALL = "pip install 'gls_fused[models]'"
# Graph nets are small, and some read numbers of tensors while they are built.
ON_CPU = ("torch_geometric",)


def version_of(package: str) -> str | None:
    """None where it is not installed."""
    return version(package) if find_spec(package) is not None else None


def build_model(package: str, build: Build, device: str = "meta") -> nn.Module:
    """The model, on the meta device without memory for its parameters."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings(), torch.device("cpu" if package in ON_CPU else device):
        # What packages deprecate is not ours to mend.
        warnings.simplefilter("ignore")
        return build()


def vision(name: str, **options: Any) -> Build:
    """A model of torchvision, by the name of its function."""

    def build() -> nn.Module:
        import torchvision

        model: nn.Module = torchvision.models.get_model(name, weights=None, **options)
        return model

    return build


def detector(name: str) -> Build:
    """As `vision`, of a model with a backbone that has weights of its own."""
    return vision(name, weights_backbone=None)


def image_model(name: str) -> Build:
    """A model of timm, by name."""

    def build() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, pretrained=False)
        return model

    return build


def configured(model: str, kind: str, **config: Any) -> Build:
    """A model of transformers.

    Args:
        model: a class for this configuration, or an Auto class.
        kind: the configuration's model_type.
        config: what differs from its defaults.
    """

    def build() -> nn.Module:
        import transformers

        transformers.logging.set_verbosity_error()
        found = getattr(transformers, model)
        settings = transformers.AutoConfig.for_model(kind, **config)
        built: nn.Module = (
            found.from_config(settings) if model.startswith("Auto") else found(settings)
        )
        return built

    return build


def causal(kind: str, **config: Any) -> Build:
    """A language model that predicts the next token."""
    return configured("AutoModelForCausalLM", kind, **config)


def masked(kind: str, **config: Any) -> Build:
    """A language model that predicts masked tokens."""
    return configured("AutoModelForMaskedLM", kind, **config)


def translator(kind: str, **config: Any) -> Build:
    """An encoder and a decoder of text."""
    return configured("AutoModelForSeq2SeqLM", kind, **config)


def classifier(kind: str, **config: Any) -> Build:
    """A classifier of images."""
    return configured("AutoModelForImageClassification", kind, **config)


def diffusion(model: str, **config: Any) -> Build:
    """A class of diffusers, with what differs from its defaults."""

    def build() -> nn.Module:
        import diffusers

        built: nn.Module = getattr(diffusers, model)(**config)
        return built

    return build


def graph_net(model: str, *sizes: int, **options: Any) -> Build:
    """A class of torch_geometric.nn."""

    def build() -> nn.Module:
        from torch_geometric import nn as graph

        found = getattr(graph, model, None) or getattr(graph.models, model)
        built: nn.Module = found(*sizes, **options)
        return built

    return build


def adapter(base: Build, *targets: str, **options: Any) -> Build:
    """A frozen model with peft's LoRA, or DoRA, on these of its layers."""

    def build() -> nn.Module:
        import peft

        config = peft.LoraConfig(target_modules=list(targets), **options)
        built: nn.Module = peft.get_peft_model(base(), config)
        return built

    return build
