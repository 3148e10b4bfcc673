"""What a part measures: rows of named values, whole on disk after each one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.harness.files import write_json


class Record:
    """Rows by the table that they belong to, and notes; a part that is cut off leaves those it had.

    Args:
        path: of the JSON file; None: nothing is written.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.content: dict[str, Any] = {"notes": [], "tables": {}}

    def note(self, text: str) -> None:
        """A sentence that stands above the tables."""
        self.content["notes"].append(text)
        self._write()

    def add(self, table: str, /, **row: Any) -> None:
        """A row; lists in it are kept, but not shown."""
        self.content["tables"].setdefault(table, []).append(row)
        shown = {key: value for key, value in row.items() if not isinstance(value, list)}
        print(f"{table}: {shown}", flush=True)
        self._write()

    def _write(self) -> None:
        if self._path is not None:
            write_json(self._path, _strict(self.content))


def _strict(value: Any) -> Any:
    """JSON has no number that is not finite."""
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_strict(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
