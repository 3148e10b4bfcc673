"""The subcommand `roofline`: its options, and the files it leaves."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.harness.arguments import prepare_out
from benchmarks.harness.environment import command_line, git_commit
from benchmarks.harness.files import write_json
from benchmarks.harness.present import publish
from benchmarks.roofline.report import MODELLED, describe, make_tables

TABLE_WIDTH = 160


def add_roofline(subparsers: Any) -> None:
    """Register `roofline`."""
    parser = subparsers.add_parser(
        "roofline",
        help="bytes, flops, launches and time floors on GPUs: a model, not a measurement",
        description=MODELLED,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results/roofline"),
        metavar="DIR",
        help="replaces earlier results there; default: %(default)s",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write roofline.json and report.md, print the tables and the report's path."""
    out = prepare_out(arguments.out)
    tables = make_tables()
    content = {"modelled": True, "command": command_line(), "git_commit": git_commit()}
    write_json(out / "roofline.json", {**content, **describe()}, indent=2)
    sections = ["# Roofline: a model of GLS's step on GPUs", MODELLED, f"`{command_line()}`"]
    sections += [table.markdown() for table in tables]
    report = "\n\n".join(sections) + "\n"
    publish(out, report, tables, footer=MODELLED, width=TABLE_WIDTH)
    return 0
