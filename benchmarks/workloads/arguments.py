"""Options that name a workload."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.harness.arguments import positive_number
from benchmarks.workloads.data import DATASETS, LOCAL_DATA
from benchmarks.workloads.optimizers import OPTIMIZERS
from benchmarks.workloads.text import LIBRARY


def rate(text: str) -> tuple[str, float]:
    """NAME=VALUE: an optimizer and its learning rate."""
    name, equals, value = text.partition("=")
    if not equals or name not in OPTIMIZERS:
        raise argparse.ArgumentTypeError(
            f"expected NAME=VALUE with a NAME among {', '.join(OPTIMIZERS)}, got {text!r}"
        )
    return name, positive_number(value)


def add_data(parser: Any) -> Any:
    """--dataset, --data and --text, in a group of their own that is returned for more."""
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", default="auto", choices=("auto", *DATASETS))
    data.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help=f"where CIFAR-10's or Fashion-MNIST's files are; default: {LOCAL_DATA}",
    )
    data.add_argument(
        "--text",
        type=Path,
        metavar="FILE_OR_DIR",
        help=f"the transformer's text; default: {LOCAL_DATA}/*.txt, else {LIBRARY}'s sources",
    )
    return data
