"""What a convergence experiment is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.workloads.schedule import Schedule


@dataclass(frozen=True)
class Options:
    """What the experiment is.

    Attributes:
        grids: learning rates to search, ascending, by optimizer; without one there is no search.
        grid_epochs: the length of a search run.
        rates: learning rates fixed by hand, by optimizer; they win over grids.
        batch_sizes: by task; `batch_size` where nothing is said.
        text: where the transformer's text is.
        train_images: how many training images or sequences to keep, by task; all where nothing is
            said.
        validation_images: the same of the validation data.
        gls: options for GLS.
        tries: runs of each search, over rates and weight decays; None: over rates alone, as many
            as the grid and its extensions take.
        decays: weight decays to search with `tries`.
        select: which loss a search goes by, "train" or "validation".
        search_seed: of the searches; no final run has it.
        schedule: of the learning rate, in every run.
        evaluate_every: steps between the evaluations of final runs.
    """

    tasks: tuple[str, ...]
    optimizers: tuple[str, ...]
    seeds: tuple[int, ...]
    epochs: int
    batch_size: int
    batch_sizes: Mapping[str, int]
    grids: Mapping[str, tuple[float, ...]]
    grid_epochs: int
    rates: Mapping[str, float]
    device: torch.device
    dataset: str
    data: Path | None
    text: Path | None
    train_images: Mapping[str, int]
    validation_images: Mapping[str, int]
    gls: Mapping[str, Any]
    tries: int | None
    decays: tuple[float, ...]
    select: str
    search_seed: int
    schedule: Schedule
    evaluate_every: int
    out: Path
    resume: bool
    overwrite: bool
