"""The subcommand `host`: its options, and what it prints."""

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
from benchmarks.harness.heap import hold_freed_memory
from benchmarks.harness.present import publish
from benchmarks.host.report import make_table, render_report
from benchmarks.host.run import LAYERS, HostOptions, measure_host


def add_host(subparsers: Any) -> None:
    """Register `host`."""
    parser = subparsers.add_parser(
        "host",
        help="seconds of the host in step(), over the number of layers",
        description="Time step() of narrow layers with GLS and fused Adam in turn, after checking "
        "that GLS does what its reference does, exit status 1 if not. With --stubbed, of the "
        "Triton backend without starting its kernels, in Triton's interpreter "
        "(TRITON_INTERPRET=1).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        type=positive,
        default=list(LAYERS),
        metavar="N",
        help=f"numbers of layers; default: {' '.join(map(str, LAYERS))}",
    )
    for name, default, what in (
        ("--width", 64, "of every layer"),
        ("--batch", 32, "rows a step"),
        ("--rounds", 15, "of ten steps"),
    ):
        shown = f"{what}; default: %(default)s"
        parser.add_argument(name, type=positive, default=default, metavar="N", help=shown)
    parser.add_argument(
        "--stubbed", action="store_true", help="Triton's kernels are prepared, and not started"
    )
    add_threads(parser)
    add_out(parser, "results/host")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, write host.json and report.md, print the table and the report's path."""
    refuse_twice(arguments, "layers")
    hold_freed_memory()
    use_threads(arguments)
    options = HostOptions(
        layers=tuple(arguments.layers),
        width=arguments.width,
        batch=arguments.batch,
        rounds=arguments.rounds,
        stubbed=arguments.stubbed,
    )
    results = measure_host(options, prepare_out(arguments.out))
    publish(arguments.out, render_report(results), [make_table(results)])
    return 0
