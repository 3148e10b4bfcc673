"""How a subcommand ends: its report is written, its tables are shown, the report's path is last."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from benchmarks.records import REPORT_FILE, write_atomically
from benchmarks.report import Table

TABLE_WIDTH = 140


def publish(out: Path, report: str, tables: Iterable[Table]) -> None:
    """Write report.md, then show it."""
    path = out / REPORT_FILE
    write_atomically(path, report.encode())
    show(tables, path)


def show(tables: Iterable[Table], report: Path) -> None:
    """Print the tables and the report's path."""
    # A table that is not for a screen need not fit one.
    console = Console() if sys.stdout.isatty() else Console(width=TABLE_WIDTH)
    for table in tables:
        console.print(table.terminal())
    print(report)
