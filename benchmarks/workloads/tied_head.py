"""The task `transformer`, its head tied: `python -m benchmarks.workloads.tied_head`.

Prints the mean training loss of the last `EVERY` steps and the validation loss, of a head that GLS
covers, of one that takes Adam's update, and of AdamW.
"""

from __future__ import annotations

import argparse
import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.workloads.optimizers import OPTIMIZERS
from benchmarks.workloads.tasks import TASKS
from benchmarks.workloads.text import load_text
from benchmarks.workloads.training import Evaluation, Evaluations, Steps, train
from benchmarks.workloads.transformer import Transformer, build_transformer

EVERY = 50


def build_tied(shape: tuple[int, ...]) -> nn.Module:
    """The transformer whose head has the embedding's weight."""
    model = build_transformer(shape)
    assert isinstance(model, Transformer)
    model.head.weight = model.embedding.weight
    return model


def hide_head(model: nn.Module, lr: float) -> Steps:
    """GLS that does not see the head's rows, as its forward is replaced."""
    assert isinstance(model, Transformer)
    head = model.head

    def forward(inputs: Tensor) -> Tensor:
        return functional.linear(inputs, head.weight, head.bias)

    head.forward = forward
    return OPTIMIZERS["gls"].build(model, lr, {})


def main() -> None:
    """Train each, and print a row of a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="a multiple of 50")
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-3])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = dataclasses.replace(TASKS["transformer"], build=build_tied)
    assert task.batch_size is not None
    dataset = load_text(train_sequences=options.steps * task.batch_size)
    print("| optimizer | lr | training loss | validation loss |\n|---|---|---|---|")
    for name, make in {
        "GLS": lambda model, lr: OPTIMIZERS["gls"].build(model, lr, {}),
        "GLS, the head by Adam": hide_head,
        "AdamW": lambda model, lr: OPTIMIZERS["adamw"].build(model, lr, {}),
    }.items():
        for lr in options.lr:
            found: list[Evaluation] = []
            run = train(
                task,
                dataset,
                lambda model, make=make, lr=lr: make(model, lr),
                seed=options.seed,
                epochs=1,
                batch_size=task.batch_size,
                evaluations=Evaluations(EVERY, found.append),
            )
            for _ in run:
                pass
            last = found[-1]
            print(f"| {name} | {lr} | {last.train_loss:.3f} | {last.validation_loss:.3f} |")


if __name__ == "__main__":
    main()
