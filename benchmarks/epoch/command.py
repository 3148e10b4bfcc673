"""The subcommand `epoch`: its options, and what it prints."""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.epoch.report import make_tables, render_report
from benchmarks.epoch.run import EpochOptions, measure_epochs
from benchmarks.harness.arguments import (
    add_choices,
    add_machine,
    positive,
    positive_number,
    prepare_out,
    refuse_twice,
    use_threads,
)
from benchmarks.harness.errors import InputError
from benchmarks.harness.heap import hold_freed_memory
from benchmarks.harness.present import publish
from benchmarks.harness.progress import say
from benchmarks.workloads.contenders import BASELINE, CONTENDERS
from benchmarks.workloads.shapes import IMAGES, SHAPES
from benchmarks.workloads.tasks import TASKS


def add_epoch(subparsers: Any) -> None:
    """Register `epoch`."""
    parser = subparsers.add_parser(
        "epoch",
        help="seconds per epoch and bytes of every optimizer, against Adam's",
        description="Time slices of epochs of every optimizer in turn, in one process on the same "
        "data, after checking that GLS does what its reference does; exit status 1 if not.",
        allow_abbrev=False,
    )
    add_choices(parser, "--tasks", tuple(TASKS), tuple(TASKS))
    add_choices(parser, "--shapes", tuple(SHAPES), tuple(SHAPES))
    add_choices(parser, "--optimizers", tuple(CONTENDERS), tuple(CONTENDERS))
    parser.add_argument(
        "--batch-sizes",
        nargs="+",
        type=positive,
        default=[32, 128, 512],
        help="default: 32 128 512",
    )
    parser.add_argument("--rounds", type=positive, default=15, help="default: %(default)s")
    parser.add_argument(
        "--seconds",
        type=positive_number,
        default=0.4,
        help="of one optimizer in one round, about; at least 10 steps; default: %(default)s",
    )
    parser.add_argument(
        "--memory", action="store_true", help="also peak memory, each in a process of its own"
    )
    parser.add_argument(
        "--profile", action="store_true", help="also where the time of GLS's step goes"
    )
    add_machine(parser, "results/epoch")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, write epoch.json and report.md, print the tables and the report's path."""
    refuse_twice(arguments, "tasks", "shapes", "optimizers", "batch_sizes")
    if BASELINE not in arguments.optimizers:
        raise InputError(f"--optimizers: {BASELINE} is what the others are compared with, add it")
    if max(arguments.batch_sizes) > IMAGES:
        raise InputError(
            f"--batch-sizes: {max(arguments.batch_sizes)} is more than the {IMAGES} images timed"
        )
    shapes = [SHAPES[shape] for shape in arguments.shapes]
    left_out = [
        task for task in arguments.tasks if not any(shape.fits(TASKS[task]) for shape in shapes)
    ]
    if len(left_out) == len(arguments.tasks):
        kind = "text" if TASKS[left_out[0]].text else "images"
        raise InputError(f"--shapes: {left_out[0]} trains on {kind}, and none of these is")
    for task in left_out:
        say(f"{task} is left out, as none of --shapes is what it trains on")
    hold_freed_memory()
    use_threads(arguments)
    options = EpochOptions(
        tasks=tuple(arguments.tasks),
        shapes=tuple(arguments.shapes),
        batch_sizes=tuple(arguments.batch_sizes),
        optimizers=tuple(arguments.optimizers),
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        device=arguments.device,
        memory=arguments.memory,
        profile=arguments.profile,
    )
    results = measure_epochs(options, prepare_out(arguments.out))
    publish(arguments.out, render_report(results), make_tables(results))
    return 0
