"""The subcommand `time-to-loss`: its options, and what it prints."""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.harness.arguments import (
    add_choices,
    add_machine,
    positive,
    prepare_out,
    refuse_twice,
    seed,
    setting,
    settings,
    use_threads,
)
from benchmarks.harness.errors import InputError
from benchmarks.harness.heap import hold_freed_memory
from benchmarks.harness.present import publish
from benchmarks.time_to_loss.report import make_tables, render_report
from benchmarks.time_to_loss.run import BASELINE, CHALLENGER, TimeOptions, measure_time_to_loss
from benchmarks.workloads.arguments import add_data, rate
from benchmarks.workloads.tasks import TASKS


def add_time_to_loss(subparsers: Any) -> None:
    """Register `time-to-loss`."""
    parser = subparsers.add_parser(
        "time-to-loss",
        help="seconds until GLS reaches Adam's best training loss",
        description="Train every task with Adam, at the best learning rate of a search, and with "
        "GLS, in turns of a tenth of an epoch; after checking that GLS does what its reference "
        "does, exit status 1 if not.",
        allow_abbrev=False,
    )
    add_choices(parser, "--tasks", tuple(TASKS), tuple(TASKS))
    parser.add_argument("--epochs", type=positive, default=5, help="default: %(default)s")
    parser.add_argument("--batch-size", type=positive, help="default: 128, of the transformer 32")
    parser.add_argument("--seeds", nargs="+", type=seed, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument(
        "--lr",
        nargs="+",
        type=rate,
        default=[],
        metavar="NAME=VALUE",
        help=f"of {BASELINE}, instead of searching it, or of {CHALLENGER}",
    )
    parser.add_argument(
        "--gls",
        nargs="+",
        type=setting,
        default=[],
        metavar="KEY=VALUE",
        help="options for GLS, such as damping=.1 rank=64",
    )
    data = add_data(parser)
    data.add_argument(
        "--train-images", type=positive, metavar="N", help="train on at most N images or sequences"
    )
    add_machine(parser, "results/time-to-loss")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, write time_to_loss.json and report.md, print the tables and the report's path."""
    refuse_twice(arguments, "tasks", "seeds")
    hold_freed_memory()
    rates = dict(arguments.lr)
    for name in rates:
        if name not in (BASELINE, CHALLENGER):
            raise InputError(f"--lr: {name} is not trained, {BASELINE} and {CHALLENGER} are")
    use_threads(arguments)
    options = TimeOptions(
        tasks=tuple(arguments.tasks),
        seeds=tuple(arguments.seeds),
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        rates=rates,
        gls=settings(arguments.gls, "--gls"),
        device=arguments.device,
        dataset=arguments.dataset,
        data=arguments.data,
        text=arguments.text,
        train_images=arguments.train_images,
    )
    results = measure_time_to_loss(options, prepare_out(arguments.out))
    publish(arguments.out, render_report(results), make_tables(results))
    return 0
