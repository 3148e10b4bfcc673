"""The subcommands `convergence` and `demo`: their options, and what they print."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.convergence.options import Options
from benchmarks.convergence.report import make_tables
from benchmarks.convergence.run import Experiment
from benchmarks.harness.arguments import (
    device,
    natural,
    positive,
    positive_number,
    refuse_twice,
    seed,
    setting,
    settings,
    use_threads,
)
from benchmarks.harness.environment import command_line
from benchmarks.harness.errors import InputError
from benchmarks.harness.present import show
from benchmarks.harness.progress import make_reporter
from benchmarks.workloads.arguments import add_data, rate
from benchmarks.workloads.data import LOCAL_DATA
from benchmarks.workloads.download import download_cifar10
from benchmarks.workloads.optimizers import OPTIMIZERS
from benchmarks.workloads.schedule import KINDS, Schedule
from benchmarks.workloads.tasks import TASKS

INTERRUPTED = 130
BATCH_SIZE = 128
SEARCH_SEED = 1000
WEIGHT_DECAYS = (0.0, 0.01, 0.1)
DEFAULT_OPTIMIZERS = ("sgd", "adam", "gls", "gls-sgd")
# Together about five minutes of one core, so that the demonstration ends in time on a busy machine.
DEMO_TRAIN_IMAGES = (
    "mlp=10240", "cnn=4096", "autoencoder=5120", "resnet=768", "transformer=512"
)  # fmt: skip
DEMO_VALIDATION_IMAGES = ("2000", "resnet=500", "transformer=160")
DEMO_GRIDS = ("off", "sgd=0.1,0.3,1", "adam=0.0003,0.001,0.003")


def add_convergence(subparsers: Any) -> None:
    """Register `convergence`."""
    parser = subparsers.add_parser(
        "convergence",
        help="train tasks x optimizers x seeds; tables and plots of the losses",
        description="Train every task with every optimizer on every seed, after searching the "
        "baselines' learning rates, and write tables and plots.",
        allow_abbrev=False,
    )
    _add_options(parser)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the earlier results in --out"
    )
    parser.set_defaults(run=run, demo=False)


def add_demo(subparsers: Any) -> None:
    """Register `demo`."""
    parser = subparsers.add_parser(
        "demo",
        help="the same, sized to end within about six minutes on two cores",
        description="The convergence experiment with one seed, small grids, fewer images and less "
        "text; replaces its earlier results.",
        allow_abbrev=False,
    )
    _add_options(parser)
    parser.set_defaults(
        run=run,
        out=Path("results/demo"),
        seeds=[0],
        grid_epochs=1,
        lr_grid=list(DEMO_GRIDS),
        train_images=list(DEMO_TRAIN_IMAGES),
        validation_images=list(DEMO_VALIDATION_IMAGES),
        overwrite=True,
        demo=True,
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the experiment that the options describe; print its tables and the report's path."""
    use_threads(arguments)
    if arguments.download_cifar10:
        download_cifar10(arguments.data or LOCAL_DATA)
    experiment = Experiment(_options(arguments))
    try:
        with make_reporter() as reporter:
            experiment.run(reporter)
        report = experiment.report()
    except KeyboardInterrupt:
        given = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
        again = command_line([*given, "--resume"])
        print(f"interrupted; complete runs are kept, continue with: {again}", file=sys.stderr)
        return INTERRUPTED
    tables = make_tables(experiment.config, experiment.records(), experiment.evaluations())
    show(tables, report)
    return 0


def _add_options(parser: argparse.ArgumentParser) -> None:
    training = parser.add_argument_group("what is trained")
    training.add_argument(
        "--tasks",
        nargs="+",
        default=list(TASKS),
        choices=list(TASKS),
        metavar="TASK",
        help=f"among {', '.join(TASKS)}; default: all",
    )
    training.add_argument(
        "--optimizers",
        nargs="+",
        default=list(DEFAULT_OPTIMIZERS),
        choices=list(OPTIMIZERS),
        metavar="NAME",
        help=f"among {', '.join(OPTIMIZERS)}; default: {' '.join(DEFAULT_OPTIMIZERS)}",
    )
    training.add_argument("--epochs", type=positive, default=4, help="default: %(default)s")
    training.add_argument(
        "--batch-size",
        nargs="+",
        default=[],
        metavar="[TASK=]N",
        help="of every task or of one; default: 128, of the transformer 32",
    )
    training.add_argument("--seeds", nargs="+", type=seed, default=[0, 1, 2], help="default: 0 1 2")
    training.add_argument(
        "--gls",
        nargs="+",
        action="extend",
        type=setting,
        default=[],
        metavar="KEY=VALUE",
        help="options for GLS, such as damping=.1 rank=64",
    )

    training.add_argument(
        "--schedule",
        default="constant",
        choices=KINDS,
        help="of every learning rate, over a run; linear and cosine end at 0; default: constant",
    )
    training.add_argument(
        "--warmup",
        type=natural,
        default=0,
        metavar="STEPS",
        help="in which every learning rate rises to its value; default: %(default)s",
    )
    training.add_argument(
        "--evaluate-every",
        type=positive,
        default=200,
        metavar="STEPS",
        help="also evaluate between the ends of epochs; default: %(default)s",
    )

    rates = parser.add_argument_group("learning rates and weight decays")
    rates.add_argument(
        "--lr-grid",
        nargs="+",
        default=["auto"],
        metavar="GRID",
        help="'auto': search each baseline's own grid; 'off': search nothing; "
        "NAME=VALUE,VALUE,...: this grid for this optimizer. Default: auto",
    )
    rates.add_argument(
        "--grid-epochs",
        type=positive,
        help="epochs of each run of the search; default: as many as --epochs",
    )
    rates.add_argument(
        "--lr",
        nargs="+",
        action="extend",
        type=rate,
        default=[],
        metavar="NAME=VALUE",
        help="fix an optimizer's learning rate instead of searching",
    )
    rates.add_argument(
        "--tries",
        type=positive,
        metavar="N",
        help="search rates and weight decays, with N runs for each optimizer that has a grid; at "
        "the rate of a grid of one, weight decays alone; "
        "default: rates alone, by the grid and at most two extensions",
    )
    rates.add_argument(
        "--weight-decays",
        nargs="+",
        type=_decay,
        metavar="VALUE",
        help=f"searched with --tries; default: {' '.join(f'{x:g}' for x in WEIGHT_DECAYS)}",
    )
    rates.add_argument(
        "--select",
        choices=("train", "validation"),
        help="the loss that a search goes by: the last training loss, or the lowest validation "
        "loss; default: train, with --tries validation",
    )
    rates.add_argument(
        "--search-seed",
        type=seed,
        default=SEARCH_SEED,
        metavar="SEED",
        help="of every search; none of --seeds; default: %(default)s",
    )
    for name in ("gls", "gls-sgd"):
        rates.add_argument(
            f"--lr-{name}",
            dest="lr",
            action="append",
            type=functools.partial(_rate_of, name),
            metavar="VALUE",
            help=f"the same as --lr {name}=VALUE",
        )

    data = add_data(parser)
    data.add_argument(
        "--download-cifar10",
        action="store_true",
        help="first fetch CIFAR-10 (170 MB) into --data, unless it is there",
    )
    data.add_argument(
        "--train-images",
        nargs="+",
        default=[],
        metavar="[TASK=]N",
        help="train on at most N images or sequences, of every task or of one",
    )

    data.add_argument(
        "--validation-images",
        nargs="+",
        default=[],
        metavar="[TASK=]N",
        help="validate on at most N",
    )

    machine = parser.add_argument_group("machine and output")
    machine.add_argument("--device", type=device, default="cpu", help="default: %(default)s")
    machine.add_argument("--threads", type=positive, help="default: torch's own choice")
    machine.add_argument(
        "--out",
        type=Path,
        default=Path("results/convergence"),
        metavar="DIR",
        help="default: %(default)s",
    )
    machine.add_argument(
        "--resume", action="store_true", help="continue in --out; complete runs are kept"
    )


def _options(arguments: argparse.Namespace) -> Options:
    refuse_twice(arguments, "tasks", "optimizers", "seeds")
    if arguments.resume and arguments.overwrite and not arguments.demo:
        raise InputError("--resume and --overwrite exclude each other")
    for name, _ in arguments.lr:
        if name not in arguments.optimizers:
            trained = " ".join(arguments.optimizers)
            raise InputError(f"--lr: {name} is not among --optimizers {trained}")
    decays = arguments.weight_decays
    if decays is not None and arguments.tries is None:
        raise InputError("--weight-decays are searched with --tries only: add it")
    tasks = arguments.tasks
    batch_size, batch_sizes = _parse_batch_sizes(arguments.batch_size, tasks)
    return Options(
        tasks=tuple(arguments.tasks),
        optimizers=tuple(arguments.optimizers),
        seeds=tuple(arguments.seeds),
        epochs=arguments.epochs,
        batch_size=batch_size,
        batch_sizes=batch_sizes,
        grids=_parse_grids(arguments.lr_grid),
        grid_epochs=arguments.grid_epochs or arguments.epochs,
        rates=dict(arguments.lr),
        device=arguments.device,
        dataset=arguments.dataset,
        data=arguments.data,
        text=arguments.text,
        train_images=_parse_counts("--train-images", arguments.train_images, tasks),
        validation_images=_parse_counts("--validation-images", arguments.validation_images, tasks),
        gls=settings(arguments.gls, "--gls"),
        tries=arguments.tries,
        decays=WEIGHT_DECAYS if decays is None else tuple(decays),
        select=arguments.select or ("train" if arguments.tries is None else "validation"),
        search_seed=arguments.search_seed,
        schedule=Schedule(arguments.schedule, arguments.warmup),
        evaluate_every=arguments.evaluate_every,
        out=arguments.out,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
    )


def _parse_grids(texts: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Later entries win; a grid given for one optimizer leaves the others as they are."""
    grids = {name: spec.grid for name, spec in OPTIMIZERS.items() if spec.grid}
    for text in texts:
        if text == "auto":
            continue
        if text == "off":
            grids = {}
            continue
        name, values = _split(text, "--lr-grid")
        if name not in OPTIMIZERS:
            raise InputError(
                f"--lr-grid: unknown optimizer {name!r}, one of {', '.join(OPTIMIZERS)}"
            )
        try:
            grids[name] = tuple(sorted({positive_number(value) for value in values.split(",")}))
        except argparse.ArgumentTypeError as error:
            raise InputError(f"--lr-grid {text}: {error}") from error
    return grids


def _parse_batch_sizes(texts: Sequence[str], tasks: Sequence[str]) -> tuple[int, dict[str, int]]:
    """The size for every task, and those of the tasks that have their own."""
    general = [text for text in texts if "=" not in text]
    sizes = {} if general else {name: size for name in tasks if (size := TASKS[name].batch_size)}
    sizes |= _parse_counts("--batch-size", [text for text in texts if "=" in text], tasks)
    return _count("--batch-size", general[-1]) if general else BATCH_SIZE, sizes


def _parse_counts(option: str, texts: Sequence[str], tasks: Sequence[str]) -> dict[str, int]:
    """Counts by task; a count without a task is for all of them, whatever the order."""
    counts: dict[str, int] = {}
    for text in sorted(texts, key=lambda text: "=" in text):
        name, value = _split(text, option) if "=" in text else ("", text)
        if name and name not in TASKS:
            raise InputError(f"{option}: unknown task {name!r}, one of {', '.join(TASKS)}")
        counts.update(dict.fromkeys([name] if name else tasks, _count(option, value)))
    return counts


def _count(option: str, text: str) -> int:
    try:
        return positive(text)
    except argparse.ArgumentTypeError as error:
        raise InputError(f"{option} {text}: {error}") from error


def _split(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise InputError(f"{option}: expected NAME=VALUE, got {text!r}")
    return name, value


def _decay(text: str) -> float:
    return 0.0 if text.strip() in ("0", "0.0") else positive_number(text)


def _rate_of(name: str, text: str) -> tuple[str, float]:
    return name, positive_number(text)
