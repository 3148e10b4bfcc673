"""The subcommand `scaling`: its options, and what it prints."""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.harness.arguments import (
    add_choices,
    add_machine,
    positive,
    positive_number,
    prepare_out,
    refuse_twice,
    use_threads,
)
from benchmarks.harness.heap import hold_freed_memory
from benchmarks.harness.present import publish
from benchmarks.scaling.report import make_tables, render_report
from benchmarks.scaling.run import SWEEPS, Point, ScalingOptions, measure_scaling


def add_scaling(subparsers: Any) -> None:
    """Register `scaling`."""
    parser = subparsers.add_parser(
        "scaling",
        help="what GLS adds to a step over batch size, width, depth and rank",
        description="Time steps of an MLP with GLS, Adam and SGD in turn, varying one size at a "
        "time, and fit exponents; after checking that GLS does what its reference does, exit "
        "status 1 if not.",
        allow_abbrev=False,
    )
    add_choices(parser, "--sweeps", tuple(SWEEPS), tuple(SWEEPS))
    for name, values in SWEEPS.items():
        shown = " ".join(map(str, values))
        parser.add_argument(
            f"--{name}",
            nargs="+",
            type=positive,
            default=list(values),
            metavar="N",
            help=f"values of that sweep; default: {shown}",
        )
    parser.add_argument("--rounds", type=positive, default=15, help="default: %(default)s")
    parser.add_argument(
        "--seconds",
        type=positive_number,
        default=0.2,
        help="of one optimizer in one round, about; at least 10 steps; default: %(default)s",
    )
    add_machine(parser, "results/scaling")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, write scaling.json and report.md, print the tables and the report's path."""
    refuse_twice(arguments, "sweeps", *SWEEPS)
    hold_freed_memory()
    use_threads(arguments)
    options = ScalingOptions(
        sweeps={name: tuple(getattr(arguments, name)) for name in arguments.sweeps},
        base=Point(),
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        device=arguments.device,
    )
    results = measure_scaling(options, prepare_out(arguments.out))
    publish(arguments.out, render_report(results), make_tables(results))
    return 0
