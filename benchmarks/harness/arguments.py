"""Types and groups of options that experiments share."""

from __future__ import annotations

import argparse
import ast
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.errors import InputError

# torch.Generator takes these.
MOST_SEEDS = 2**63


def positive(text: str) -> int:
    """A whole number, at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return value


def natural(text: str) -> int:
    """A whole number, at least 0."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected an integer >= 0, got {text!r}")
    return value


def seed(text: str) -> int:
    """A whole number that torch takes as a seed."""
    value = natural(text)
    if value >= MOST_SEEDS:
        raise argparse.ArgumentTypeError(f"expected an integer below {MOST_SEEDS}, got {text!r}")
    return value


def positive_number(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text!r}")
    return value


def setting(text: str) -> tuple[str, Any]:
    """KEY=VALUE: an option and a number, a word or a truth value."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals and value):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        parsed = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        parsed = {"true": True, "false": False, "none": None}.get(value.lower(), value)
    if not (parsed is None or isinstance(parsed, (bool, int, float, str))):
        raise argparse.ArgumentTypeError(
            f"expected a number, a word or a truth value, got {text!r}"
        )
    if isinstance(parsed, float) and not math.isfinite(parsed):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return name, parsed


def device(text: str) -> torch.device:
    """The CPU or a CUDA device that is there."""
    try:
        found = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"no such device: {text!r}") from error
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {text!r}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"there is no {text}")
    return found


def add_choices(parser: Any, option: str, names: Sequence[str], default: Sequence[str]) -> None:
    """An option that takes some of `names`."""
    parser.add_argument(
        option,
        nargs="+",
        default=list(default),
        choices=list(names),
        metavar="NAME",
        help=f"among {', '.join(names)}; default: "
        + ("all" if len(default) == len(names) else " ".join(default)),
    )


def add_machine(parser: Any, out: str) -> None:
    """--device, --threads, --out."""
    machine = parser.add_argument_group("machine and output")
    machine.add_argument("--device", type=device, default="cpu", help="default: %(default)s")
    add_threads(machine)
    add_out(machine, out)


def add_threads(parser: Any) -> None:
    """--threads, for `use_threads`."""
    parser.add_argument("--threads", type=positive, help="default: torch's own choice")


def add_out(parser: Any, out: str) -> None:
    """--out, a directory."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(out),
        metavar="DIR",
        help="replaces earlier results there; default: %(default)s",
    )


def use_threads(arguments: argparse.Namespace) -> None:
    """Let torch compute on as many threads as asked for."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)


def settings(given: Sequence[tuple[str, Any]], option: str) -> dict[str, Any]:
    """What `setting` has parsed; raises InputError for an option that names one key twice."""
    names = [name for name, _ in given]
    if len(set(names)) < len(names):
        raise InputError(f"{option}: {' '.join(names)} names one twice")
    return dict(given)


def refuse_twice(arguments: argparse.Namespace, *names: str) -> None:
    """Raises InputError for an option that names one thing twice."""
    for name in names:
        values = getattr(arguments, name)
        if len(set(values)) < len(values):
            option = name.replace("_", "-")
            raise InputError(f"--{option}: {' '.join(map(str, values))} names one twice")


def prepare_out(directory: Path) -> Path:
    """The directory, made where it is missing."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {directory}: {error.strerror or error}") from error
    return directory
