"""Tables of a report, for Markdown and for the terminal, and the cells that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import rich.box
import rich.table

from benchmarks.harness.interleave import Quartiles

# A cell without a figure.
NOTHING = "-"


@dataclass(frozen=True)
class Table:
    """A titled table of cells that are already text; the first `labels` columns are words."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    labels: int = 2

    def markdown(self) -> str:
        """A heading, the note and the table."""
        return "\n".join([f"## {self.title}", "", self.note, "", self.grid()])

    def grid(self) -> str:
        """The table alone."""
        rule = ["---"] * self.labels + ["---:"] * (len(self.header) - self.labels)
        lines = [_row(self.header), _row(rule), *(_row(cells) for cells in self.rows)]
        return "\n".join(lines)

    def terminal(self) -> rich.table.Table:
        """The same for a rich console."""
        table = rich.table.Table(
            title=self.title, title_justify="left", title_style="bold", box=rich.box.SIMPLE_HEAD
        )
        for index, name in enumerate(self.header):
            table.add_column(name, justify="left" if index < self.labels else "right")
        for cells in self.rows:
            table.add_row(*(cell.replace("**", "") for cell in cells))
        return table


def verdict(value: float, bound: float) -> str:
    """Whether a bound is met, and by how much of it."""
    share = f"{abs(value / bound - 1):.1%}"
    return f"met by {share}" if value <= bound else f"missed by {share}"


def spread_cell(values: Quartiles, digits: int = 3) -> str:
    """Median [lower quartile, upper quartile]."""
    return f"{values.median:.{digits}f} [{values.low:.{digits}f}, {values.high:.{digits}f}]"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
