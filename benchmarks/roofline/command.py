"""The subcommand `roofline`: its options, and the files it leaves."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.harness.arguments import add_out, prepare_out
from benchmarks.harness.environment import command_line, git_commit
from benchmarks.harness.errors import InputError
from benchmarks.harness.files import write_atomically, write_json
from benchmarks.harness.present import publish
from benchmarks.roofline.choice import Decision, Measured, decide, render
from benchmarks.roofline.report import MODELLED, describe, make_tables

TABLE_WIDTH = 160
CHOICES = Path(__file__).parents[2] / "gls_fused" / "backends" / "choices.py"


def add_roofline(subparsers: Any) -> None:
    """Register `roofline`."""
    parser = subparsers.add_parser(
        "roofline",
        help="bytes, flops, launches and time floors on GPUs: a model, not a measurement",
        description=MODELLED,
        allow_abbrev=False,
    )
    add_out(parser, "results/roofline")
    parser.add_argument(
        "--choose",
        action="store_true",
        help="write gls_fused/backends/choices.py: whose kernels an op takes on CUDA devices",
    )
    parser.add_argument(
        "--measured",
        type=Path,
        metavar="FILE",
        help="results.json of benchmarks/device_check.sh, whose figures stand in the model's place",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write roofline.json and report.md, print the tables and the report's path."""
    decisions = _decide(arguments.measured)
    out = prepare_out(arguments.out)
    tables = make_tables(decisions)
    content = {"modelled": True, "command": command_line(), "git_commit": git_commit()}
    write_json(out / "roofline.json", {**content, **describe()}, indent=2)
    sections = ["# Roofline: a model of GLS's step on GPUs", MODELLED, f"`{command_line()}`"]
    sections += [table.markdown() for table in tables]
    report = "\n\n".join(sections) + "\n"
    publish(out, report, tables, footer=MODELLED, width=TABLE_WIDTH)
    if arguments.choose:
        write_atomically(CHOICES, render(decisions).encode())
    return 0


def _decide(path: Path | None) -> list[Decision]:
    if path is None:
        return decide()
    try:
        return decide(Measured.of(json.loads(path.read_text())))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--measured {path}: expected results.json of device_check.sh: {error!r}"
        ) from error
