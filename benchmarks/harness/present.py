"""How a subcommand ends: its report is written, its tables are shown, the report's path is last."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from benchmarks.harness.files import REPORT_FILE, write_atomically
from benchmarks.harness.tables import Table

TABLE_WIDTH = 140


def publish(
    out: Path, report: str, tables: Iterable[Table], *, footer: str = "", width: int = TABLE_WIDTH
) -> None:
    """Write report.md, then show it."""
    path = out / REPORT_FILE
    write_atomically(path, report.encode())
    show(tables, path, footer=footer, width=width)


def show(
    tables: Iterable[Table], report: Path, *, footer: str = "", width: int = TABLE_WIDTH
) -> None:
    """Print the tables, each with the footer if there is one, and the report's path."""
    # A table that is not for a screen need not fit one.
    console = Console() if sys.stdout.isatty() else Console(width=width)
    for table in tables:
        console.print(table.terminal())
        if footer:
            console.print(footer)
    print(report)
