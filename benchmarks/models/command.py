"""The subcommand `models`: its options, and what it prints."""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.harness.arguments import (
    add_out,
    add_threads,
    positive,
    prepare_out,
    refuse_twice,
    use_threads,
)
from benchmarks.harness.errors import InputError
from benchmarks.harness.heap import hold_freed_memory
from benchmarks.harness.present import publish
from benchmarks.models.cases import CASES
from benchmarks.models.report import make_table, render_report
from benchmarks.models.run import ModelOptions, measure_models


def add_models(subparsers: Any) -> None:
    """Register `models`."""
    parser = subparsers.add_parser(
        "models",
        help="seconds of a training step of published models, against fused AdamW's",
        description="Time whole training steps of models built from their configurations, with "
        "random weights and inputs, with GLS and fused AdamW in turn, after checking that the "
        "layers GLS covers have statistics. A model that cannot be timed is a row that says why, "
        "and the exit status is 1.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=list(CASES),
        metavar="NAME",
        help=f"among {', '.join(map(repr, CASES))}; default: all",
    )
    parser.add_argument("--rounds", type=positive, default=5, help="default: %(default)s")
    parser.add_argument(
        "--batch",
        type=positive,
        metavar="N",
        help="images or sequences a step, but of those whose batch is published; default: 2 "
        "images or 1 sequence, with which an optimizer's share of a step is large",
    )
    add_threads(parser)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the seconds that the process itself computes, for a machine that does other "
        "work beside; needs --threads 1",
    )
    add_out(parser, "results/models")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, write models.json and report.md, print the table and the report's path."""
    refuse_twice(arguments, "models")
    for name in arguments.models:
        if name not in CASES:
            raise InputError(f"--models: {name!r} is none of {', '.join(CASES)}")
    if arguments.cpu_time and arguments.threads != 1:
        raise InputError(
            "--cpu-time: expected --threads 1, as the seconds of several threads would add up"
        )
    hold_freed_memory()
    use_threads(arguments)
    options = ModelOptions(
        models=tuple(arguments.models),
        rounds=arguments.rounds,
        batch=arguments.batch,
        cpu_time=arguments.cpu_time,
    )
    results = measure_models(options, prepare_out(arguments.out))
    publish(arguments.out, render_report(results), [make_table(results)])
    return int(bool(results["failed"]))
