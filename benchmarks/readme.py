"""The docs' result tables, made from the published results: the subcommand `readme`.

What stands between `<!-- BEGIN name -->` and `<!-- END name -->` is replaced, in each page that has
these markers; the rest is left.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.convergence.records import (
    CONFIG_FILE,
    EPOCHS_FILE,
    EVALUATIONS_FILE,
    EpochRecord,
    EvaluationRecord,
    read_epochs,
    read_evaluations,
)
from benchmarks.convergence.report import make_tables
from benchmarks.convergence.target_report import make_first_table
from benchmarks.coverage import run as coverage
from benchmarks.coverage.report import make_model_table, make_package_table, make_reason_table
from benchmarks.epoch import run as epoch
from benchmarks.epoch.report import make_short_table
from benchmarks.harness.environment import hardware_of
from benchmarks.harness.errors import InputError
from benchmarks.harness.files import write_atomically
from benchmarks.harness.tables import NOTHING, Table
from benchmarks.host import run as host
from benchmarks.host.report import make_table as make_host_table
from benchmarks.models import run as models
from benchmarks.models.report import make_table as make_seconds_table
from benchmarks.stability import run as stability
from benchmarks.stability.report import make_count_table

ROOT = Path(__file__).parents[1]
PUBLISHED = Path(__file__).with_name("published")
Experiment = tuple[dict[str, Any], list[EpochRecord], list[EvaluationRecord]]
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "coverage.md")


def add_readme(subparsers: Any) -> None:
    """Register `readme`."""
    parser = subparsers.add_parser(
        "readme",
        help="rewrite the docs' result tables from the published results",
        description=f"Rewrite the text between the markers {', '.join(BLOCKS)} of README, "
        "docs/benchmarks.md and docs/coverage.md from the results in benchmarks/published.",
        allow_abbrev=False,
    )
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if stale")
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES, metavar="FILE")
    parser.add_argument("--published", type=Path, default=PUBLISHED, metavar="DIR")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Rewrite the pages, or say which of them is not what would be written."""
    if not arguments.published.is_dir():
        raise InputError(f"--published {arguments.published}: no such directory")
    texts = {}
    for path in arguments.pages:
        try:
            texts[path] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--pages {path}: {error}") from error
    for name in BLOCKS:
        if not any(f"<!-- BEGIN {name} -->" in text for text in texts.values()):
            raise InputError(f"--pages: expected <!-- BEGIN {name} --> in one of them, got none")
    filled = {path: fill(text, arguments.published) for path, text in texts.items()}
    stale = [path for path in texts if filled[path] != texts[path]]
    for path in stale:
        if arguments.check:
            print(f"error: {path} is not what its results give: run make readme", file=sys.stderr)
        else:
            write_atomically(path, filled[path].encode())
    return int(arguments.check and bool(stale))


def fill(text: str, published: Path) -> str:
    """A page with each of its blocks made anew; one without published results is empty.

    Raises:
        InputError: a block that has one marker only or is there twice, or damaged results.
    """
    for name, make in BLOCKS.items():
        begin, end = f"<!-- BEGIN {name} -->", f"<!-- END {name} -->"
        markers = text.count(begin) + text.count(end)
        if markers == 0:
            continue
        parts = re.split(f"{begin}.*?{end}", text, flags=re.DOTALL)
        if len(parts) != 2 or markers != 2:
            raise InputError(f"page: expected {begin} and then {end}, once")
        try:
            content = make(published)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{published}: the results of {name} are damaged") from error
        text = f"{begin}\n{content}{end}".join(parts)
    return text


def _first(published: Path) -> str:
    """One table of all horizons, under the commands that made them."""
    experiments = {name: _experiment(published / name) for name in HORIZONS}
    found = [experiment for experiment in experiments.values() if experiment is not None]
    if not found:
        return ""
    table = make_first_table([(config, records) for config, records, _ in found])
    commands = [f"    {_command(config)}" for config, _, _ in found]
    environment = found[0][0]["settings"]["environment"]
    return "\n".join(
        [
            f"{table.title}:",
            "",
            *commands,
            "",
            f"{_machine(environment)}. {table.note}",
            "",
            table.grid(),
            "",
        ]
    )


def _horizon(name: str) -> Callable[[Path], str]:
    """The best epochs and the shares of Adam's way, of one experiment."""

    def make(published: Path) -> str:
        found = _experiment(published / name)
        if found is None:
            return ""
        config, records, evaluations = found
        tables = make_tables(config, records, evaluations)
        wanted = [table for table in tables if table.title.startswith(("Best epochs", "Until"))]
        environment = config["settings"]["environment"]
        blocks = [
            _block(table.title, _command(config), environment, table)
            for table in wanted
            if "GLS reaches" not in table.title
        ]
        return "\n".join(blocks)

    return make


def _runs(
    json_file: str, make: Callable[[Mapping[str, Any]], Table], title: str | None = None
) -> Callable[[Path], str]:
    """A table of each run of a command: they may differ in tasks, models and batches.

    Args:
        json_file: of the first; those of the others have a "-" and a word more in their names.
        title: of each table; None for the table's own.
    """

    def write(published: Path) -> str:
        blocks = []
        more = sorted(published.glob(json_file.replace(".json", "-*.json")))
        for path in (published / json_file, *more):
            results = _read(path)
            if results is not None:
                table = make(results)
                own = title or table.title
                blocks.append(_block(own, results["command"], results["environment"], table))
        return "\n".join(blocks)

    return write


def _coverage(published: Path) -> str:
    results = _read(published / coverage.JSON_FILE)
    if results is None:
        return ""
    return f"\n    {results['command']}\n\n{_noted(make_package_table(results))}"


def _coverage_part(make: Callable[[Mapping[str, Any]], Table]) -> Callable[[Path], str]:
    """A further table of coverage, without the command."""

    def write(published: Path) -> str:
        results = _read(published / coverage.JSON_FILE)
        return "" if results is None else _noted(make(results))

    return write


def _noted(table: Table) -> str:
    return f"{table.note}\n\n{table.grid()}\n"


def _experiment(directory: Path) -> Experiment | None:
    config = _read(directory / CONFIG_FILE)
    if config is None:
        return None
    return (
        config,
        read_epochs(directory / EPOCHS_FILE),
        read_evaluations(directory / EVALUATIONS_FILE),
    )


def _command(config: Mapping[str, Any]) -> str:
    return str(config["invocations"][0]["command"])


# Experiments of convergence, in the order of the first table.
HORIZONS = ("five-tasks", "horizon")
# By marker.
BLOCKS: Mapping[str, Callable[[Path], str]] = {
    "epoch": _runs(
        epoch.JSON_FILE,
        lambda results: make_short_table(results["cells"]),
        "Seconds per epoch, and bytes of state, against `torch.optim.Adam(fused=True)`",
    ),
    "first": _first,
    **{name: _horizon(name) for name in (*HORIZONS, "whole-search", "transformer")},
    "stability": _runs(stability.JSON_FILE, make_count_table),
    "host": _runs(host.JSON_FILE, make_host_table),
    "coverage": _coverage,
    "coverage-reasons": _coverage_part(make_reason_table),
    "coverage-models": _coverage_part(make_model_table),
    "models": _runs(models.JSON_FILE, make_seconds_table),
}


def _read(path: Path) -> dict[str, Any] | None:
    """The JSON object; None where there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if not isinstance(content, dict):
        raise TypeError(path.name)
    return content


def _block(title: str, command: str, environment: Mapping[str, Any], table: Table) -> str:
    """What is shown, the command, the hardware, how to read the table, the table."""
    return "\n".join(
        [
            f"{title}:",
            "",
            f"    {command}",
            "",
            f"{_machine(environment)}. {table.note}",
            "",
            table.grid(),
            "",
        ]
    )


def _machine(environment: Mapping[str, Any]) -> str:
    return (
        f"{hardware_of(environment)} ({environment.get('vector_instructions') or NOTHING}), "
        f"{environment['threads']} threads of {environment['cores']} cores, torch "
        f"{environment['torch']}"
    )
