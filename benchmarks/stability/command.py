"""The subcommand `stability`: its options, and what it prints."""

from __future__ import annotations

import argparse
import inspect
import sys
from typing import Any

from benchmarks.harness.arguments import (
    add_machine,
    positive,
    positive_number,
    prepare_out,
    refuse_twice,
    seed,
    setting,
    settings,
    use_threads,
)
from benchmarks.harness.environment import command_line
from benchmarks.harness.errors import InputError
from benchmarks.harness.present import publish
from benchmarks.harness.progress import make_reporter
from benchmarks.stability.report import (
    cells_in,
    make_count_table,
    plot_name,
    plot_task,
    render_report,
    tasks_of,
)
from benchmarks.stability.run import JSON_FILE, StabilityOptions, measure_stability
from benchmarks.workloads.arguments import add_data
from benchmarks.workloads.optimizers import check_gls_options
from benchmarks.workloads.tasks import TASKS
from gls_fused import GLS

INTERRUPTED = 130
DEFAULT_TASKS = ("mlp", "autoencoder", "transformer")
NORMALIZES = ("auto", "factored", "rms", "adam", "sgd", "none")
# Of GLS's defaults: half decades and decades.
RATES = (1 / 30, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
DAMPINGS = (0.01, 0.1, 1.0, 10.0, 100.0)


def add_stability(subparsers: Any) -> None:
    """Register `stability`."""
    parser = subparsers.add_parser(
        "stability",
        help="learning rates x damping x ways to scale a step: where GLS diverges",
        description="Train some steps at each learning rate and damping with each way to scale "
        "GLS's step, and with Adam at each learning rate.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=list(DEFAULT_TASKS),
        choices=list(TASKS),
        metavar="TASK",
        help=f"among {', '.join(TASKS)}; default: {' '.join(DEFAULT_TASKS)}",
    )
    parser.add_argument(
        "--normalize",
        nargs="+",
        default=list(NORMALIZES),
        metavar="NAME",
        help=f"default: {' '.join(NORMALIZES)}",
    )
    parser.add_argument(
        "--rates",
        nargs="+",
        type=positive_number,
        default=list(RATES),
        metavar="FACTOR",
        help="times GLS's default learning rate; default: 1/30 to 100 in half decades",
    )
    parser.add_argument(
        "--dampings",
        nargs="+",
        type=positive_number,
        default=list(DAMPINGS),
        metavar="FACTOR",
        help="times GLS's default damping; default: 1/100 to 100 in decades",
    )
    parser.add_argument("--steps", type=positive, default=200, help="default: %(default)s")
    parser.add_argument("--batch-size", type=positive, help="default: 128, of the transformer 32")
    parser.add_argument("--seed", type=seed, default=0, help="default: %(default)s")
    parser.add_argument(
        "--gls",
        nargs="+",
        action="extend",
        type=setting,
        default=[],
        metavar="KEY=VALUE",
        help="other options for GLS, such as rank=64",
    )
    add_data(parser)
    add_machine(parser, "results/stability")
    parser.add_argument("--resume", action="store_true", help="go on in --out")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the earlier results in --out"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, write stability.json, heat maps and report.md; print the counts and the path."""
    options = _options(arguments)
    use_threads(arguments)
    out = prepare_out(arguments.out)
    if (out / JSON_FILE).exists() and not (arguments.resume or arguments.overwrite):
        raise InputError(
            f"--out {out} holds {JSON_FILE}: add --resume to go on, or --overwrite to start anew"
        )
    try:
        with make_reporter() as reporter:
            results = measure_stability(options, out, reporter, resume=arguments.resume)
    except KeyboardInterrupt:
        given = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
        again = command_line([*given, "--resume"])
        print(f"interrupted; complete runs are kept, continue with: {again}", file=sys.stderr)
        return INTERRUPTED
    cells = cells_in(results)
    for task in tasks_of(cells):
        plot_task(cells, task, out / plot_name(task))
    publish(out, render_report(results), [make_count_table(results)])
    return 0


def _options(arguments: argparse.Namespace) -> StabilityOptions:
    refuse_twice(arguments, "tasks", "normalize", "rates", "dampings")
    if arguments.resume and arguments.overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    gls = settings(arguments.gls, "--gls")
    for name, option in (("normalize", "--normalize"), ("damping", "--dampings")):
        if name in gls:
            raise InputError(f"--gls: {name} is what is gone over: use {option}")
    for normalize in arguments.normalize:
        check_gls_options({**gls, "normalize": normalize}, ["gls"], arguments.tasks)
    defaults = inspect.signature(GLS).parameters
    return StabilityOptions(
        tasks=tuple(arguments.tasks),
        normalizes=tuple(arguments.normalize),
        rates=_times(defaults["lr"].default, arguments.rates),
        dampings=_times(defaults["damping"].default, arguments.dampings),
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        gls=gls,
        device=arguments.device,
        dataset=arguments.dataset,
        data=arguments.data,
        text=arguments.text,
    )


def _times(default: float, factors: list[float]) -> tuple[float, ...]:
    """Rounded, so that .001 x .3 is .0003 wherever it is computed."""
    return tuple(float(f"{default * factor:.6g}") for factor in sorted(factors))
