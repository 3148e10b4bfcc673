"""Files of results: complete or not there, and the name that every report has."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

REPORT_FILE = "report.md"


def write_json(path: Path, content: object, *, indent: int = 1) -> None:
    """Write strict JSON in one piece."""
    text = json.dumps(content, indent=indent, allow_nan=False) + "\n"
    write_atomically(path, text.encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by a file that is complete, or leave it as it was."""
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        # mkstemp makes files private; these are for reading by anyone the directory lets in.
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
