"""The subcommand `kernels`: `pytest benchmarks/kernels` in a process of its own, and its table."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.arguments import (
    add_out,
    add_threads,
    positive_number,
    prepare_out,
    use_threads,
)
from benchmarks.harness.errors import InputError
from benchmarks.harness.files import write_json
from benchmarks.harness.heap import hold_freed_memory
from benchmarks.harness.present import publish
from benchmarks.harness.runs import describe_run, finish_run
from benchmarks.kernels.report import make_table, pick_cases, render_report

JSON_FILE = "kernels.json"
ROOT = Path(__file__).parents[2]
# pytest's exit status for options it does not understand, and where no test was selected.
USAGE, NOTHING_SELECTED = 4, 5


def add_kernels(subparsers: Any) -> None:
    """Register `kernels`."""
    parser = subparsers.add_parser(
        "kernels",
        help="GB/s and GFLOP/s of every op, backend and shape, on the CPU",
        description="Run pytest benchmarks/kernels and make a table of it; exit status 1, and no "
        "table, where an op does not agree with the reference.",
        allow_abbrev=False,
    )
    parser.add_argument("--select", default="", metavar="EXPR", help="as pytest's -k")
    parser.add_argument(
        "--seconds",
        type=positive_number,
        default=0.5,
        help="of one case, about; default: %(default)s",
    )
    add_threads(parser)
    add_out(parser, "results/kernels")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, write kernels.json and report.md, print the table and the report's path."""
    out = prepare_out(arguments.out)
    use_threads(arguments)
    # The session holds freed memory too, and this says so.
    hold_freed_memory()
    results = describe_run(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as scratch:
        recorded = Path(scratch) / "benchmark.json"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "benchmarks/kernels", "-q", "--no-header"),
                *("-p", "no:cacheprovider", "--benchmark-quiet", "--benchmark-disable-gc"),
                *("-k", arguments.select),
                f"--benchmark-json={recorded}",
                f"--benchmark-max-time={arguments.seconds}",
            ],
            cwd=ROOT,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode == NOTHING_SELECTED:
            raise InputError(f"--select {arguments.select!r} selects nothing")
        if done.returncode == USAGE:
            why = done.stdout.strip().splitlines()[-1].removeprefix("ERROR: ")
            raise InputError(f"--select {arguments.select!r}: {why}")
        if done.returncode != 0:
            print(done.stdout, file=sys.stderr)
            print("error: a check or pytest failed, nothing is reported", file=sys.stderr)
            return 1
        results["cases"] = pick_cases(json.loads(recorded.read_text()))
    finish_run(results)
    write_json(out / JSON_FILE, results)
    publish(out, render_report(results), [make_table(results)])
    return 0
