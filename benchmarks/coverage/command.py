"""The subcommand `coverage`: its options, and what it prints."""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.coverage.models import MODELS
from benchmarks.coverage.report import make_package_table, make_reason_table, render_report
from benchmarks.coverage.run import measure_coverage
from benchmarks.harness.arguments import add_choices, add_out, prepare_out, refuse_twice
from benchmarks.harness.errors import InputError
from benchmarks.harness.present import publish


def add_coverage(subparsers: Any) -> None:
    """Register `coverage`."""
    parser = subparsers.add_parser(
        "coverage",
        help="how much of published models GLS covers, and what takes Adam's update",
        description="Build published models from their configurations on the meta device, without "
        "weights or a network, and count the parameters that GLS covers. Packages that are not "
        "installed are left out.",
        allow_abbrev=False,
    )
    add_choices(parser, "--packages", tuple(MODELS), tuple(MODELS))
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="NAME",
        help="of the packages' models, these alone; default: all",
    )
    add_out(parser, "results/coverage")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write coverage.json and report.md, print the summary, the reasons and the report's path.

    The status is 1 where a model of an installed package could not be built.
    """
    refuse_twice(arguments, "packages", *(["models"] if arguments.models else []))
    chosen = {package: list(MODELS[package]) for package in arguments.packages}
    if arguments.models is not None:
        known = {name for names in chosen.values() for name in names}
        for name in arguments.models:
            if name not in known:
                raise InputError(f"--models: {name!r} is none of {', '.join(sorted(known))}")
        chosen = {
            package: [name for name in names if name in arguments.models]
            for package, names in chosen.items()
        }
        chosen = {package: names for package, names in chosen.items() if names}
    out = prepare_out(arguments.out)
    results = measure_coverage(chosen, out)
    publish(out, render_report(results), [make_package_table(results), make_reason_table(results)])
    return int(bool(results["failed"]))
