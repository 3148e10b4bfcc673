"""The task `transformer`, its head tied: `python -m benchmarks.workloads.tied_head`.

Prints the mean training loss of the last `EVERY` steps and the validation loss, of a head that GLS
covers, of one that takes Adam's update, and of AdamW; and the share of AdamW's steps that each
needs to the lowest training loss of AdamW at any of the rates. With `--gpt2` the model is
transformers' GPT-2 of the same size, whose layers are Conv1D.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.workloads.optimizers import OPTIMIZERS
from benchmarks.workloads.shapes import VOCABULARY
from benchmarks.workloads.tasks import TASKS
from benchmarks.workloads.text import CONTEXT, load_text
from benchmarks.workloads.training import Evaluation, Evaluations, Steps, train
from benchmarks.workloads.transformer import (
    BLOCKS,
    HEADS,
    WIDTH,
    Transformer,
    build_transformer,
)

EVERY = 50


def build_tied(shape: tuple[int, ...]) -> nn.Module:
    """The transformer whose head has the embedding's weight."""
    model = build_transformer(shape)
    assert isinstance(model, Transformer)
    model.head.weight = model.embedding.weight
    return model


class GPT2(nn.Module):
    """Logits of transformers' GPT-2, from its configuration, without dropout."""

    def __init__(self) -> None:
        super().__init__()
        # Of the extra `examples`; it takes seconds.
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=WIDTH, n_layer=BLOCKS, n_head=HEADS,
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False,
        )  # fmt: skip
        self.inner = GPT2LMHeadModel(config)

    @property
    def head(self) -> Any:
        """The layer that is tied to the embedding."""
        return self.inner.lm_head

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.inner(tokens).logits
        return logits


def steps_until(losses: Sequence[float], goal: float) -> float:
    """The share of a run after which its training loss has come to a goal; inf if it has not.

    Args:
        losses: means over equal parts of the run, which count as linear in between.
    """
    for i, loss in enumerate(losses):
        if loss <= goal:
            before = losses[i - 1] if i else loss
            part = (before - goal) / (before - loss) if before > loss else 1.0
            return (i + part) / len(losses)
    return math.inf


def hide_head(model: nn.Module, lr: float) -> Steps:
    """GLS that does not see the head's rows, as its forward is replaced."""
    assert isinstance(model, Transformer | GPT2)
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
    parser.add_argument("--gpt2", action="store_true", help="transformers' GPT-2")
    options = parser.parse_args()
    torch.set_num_threads(1)
    build = (lambda _: GPT2()) if options.gpt2 else build_tied
    task = dataclasses.replace(TASKS["transformer"], build=build)
    assert task.batch_size is not None
    dataset = load_text(train_sequences=options.steps * task.batch_size)
    losses: dict[tuple[str, float], list[float]] = {}
    validation: dict[tuple[str, float], float] = {}
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
            losses[name, lr] = [each.train_loss for each in found]
            validation[name, lr] = found[-1].validation_loss
    goal = min(found[-1] for (name, _), found in losses.items() if name == "AdamW")
    print("| optimizer | lr | training loss | validation loss | steps to AdamW's |")
    print("|---|---|---|---|---|")
    for (name, lr), mine in losses.items():
        share = steps_until(mine, goal)
        print(f"| {name} | {lr} | {mine[-1]:.3f} | {validation[name, lr]:.3f} | {share:.2f} |")


if __name__ == "__main__":
    main()
