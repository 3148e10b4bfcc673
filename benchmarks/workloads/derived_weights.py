"""Weights that are computed from others: `python -m benchmarks.workloads.derived_weights`.

Puts norms on all layers of a task, or exchanges its convolutions for timm's standardized ones, and
prints the mean training loss of the last `EVERY` steps and the validation loss, of GLS that covers
them and of Adam's update for all parameters, which GLS gives where it is not shown the model.
"""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import parametrizations

from benchmarks.workloads.data import load_dataset
from benchmarks.workloads.tasks import TASKS, Shape
from benchmarks.workloads.training import Evaluation, Evaluations, Steps, train
from gls_fused import GLS

EVERY = 50
BATCH = 128
NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
}
KINDS = (*NORMS, "StdConv2d", "ScaledStdConv2d")


def build_changed(build: Callable[[Shape], nn.Module], kind: str, shape: Shape) -> nn.Module:
    """A task's model with weights of this kind."""
    model = build(shape)
    for name, module in list(model.named_modules()):
        if kind in NORMS and isinstance(module, nn.Linear | nn.Conv2d):
            NORMS[kind](module)
        elif kind not in NORMS and isinstance(module, nn.Conv2d):
            import timm.layers

            sizes = module.in_channels, module.out_channels, module.kernel_size
            new = getattr(timm.layers, kind)(*sizes, padding=module.padding[0], bias=True)
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, new)
    return model


def without_model(model: nn.Module, lr: float) -> Steps:
    """Adam's update for all parameters."""
    with warnings.catch_warnings():
        # That no layer is seen.
        warnings.simplefilter("ignore")
        return GLS(list(model.parameters()), lr=lr)


def main() -> None:
    """Train each, and print a row of a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=["mlp", "cnn"], choices=["mlp", "cnn"])
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--steps", type=int, default=200, help="a multiple of 50")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--seed", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = load_dataset("fashion-mnist", train_images=options.steps * BATCH)
    print("| task | weights | lr | Adam's update | P |\n|---|---|---|---|---|")
    for name in options.tasks:
        for kind in options.kinds:
            original = TASKS[name]
            task = dataclasses.replace(
                original,
                build=lambda shape, kind=kind, build=original.build: build_changed(
                    build, kind, shape
                ),
            )
            for lr in options.lr:
                losses = []
                for make in (without_model, lambda model, lr: GLS(model, lr=lr)):
                    found: list[Evaluation] = []
                    for _ in train(
                        task,
                        dataset,
                        lambda model, make=make, lr=lr: make(model, lr),
                        seed=options.seed,
                        epochs=1,
                        batch_size=BATCH,
                        evaluations=Evaluations(EVERY, found.append),
                    ):
                        pass
                    losses.append(f"{found[-1].train_loss:.3f} / {found[-1].validation_loss:.3f}")
                print(f"| {name} | {kind} | {lr} | {losses[0]} | {losses[1]} |", flush=True)


if __name__ == "__main__":
    main()
