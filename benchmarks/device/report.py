"""report.md and results.json from whatever the parts have left so far."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.device.schedule import Outcome
from benchmarks.harness.files import REPORT_FILE, write_atomically, write_json

RESULTS_FILE = "results.json"
PLOTS = ("kernels.png", "steps.png")
# Characters of a part's output: in the report where it did not end well, and in results.json.
TAIL, LONG_TAIL = 1500, 8000


def result_of(parts: Path, name: str) -> dict[str, Any] | None:
    """What a part has recorded; None where it has recorded nothing."""
    try:
        found: dict[str, Any] = json.loads((parts / f"{name}.json").read_text())
    except FileNotFoundError:
        return None
    return found


def write_report(
    outcomes: Sequence[Outcome], out: Path, parts: Path, about: Mapping[str, Any]
) -> None:
    """Replace both files.

    Args:
        about: "title", "command", "started" and "dry_run".
    """
    results = {outcome.part.name: result_of(parts, outcome.part.name) for outcome in outcomes}
    write_json(
        out / RESULTS_FILE,
        {
            **about,
            "parts": {
                outcome.part.name: {
                    "title": outcome.part.title,
                    "state": outcome.state,
                    "why": outcome.why,
                    "status": outcome.status,
                    "seconds": outcome.seconds,
                    "allowed": outcome.allowed,
                    "command": list(outcome.part.command),
                    "output": _tail(parts, outcome.part.name, LONG_TAIL),
                    "result": results[outcome.part.name],
                }
                for outcome in outcomes
            },
        },
    )
    write_atomically(out / REPORT_FILE, _render(outcomes, results, parts, about, out).encode())


def _render(
    outcomes: Sequence[Outcome],
    results: Mapping[str, Mapping[str, Any] | None],
    parts: Path,
    about: Mapping[str, Any],
    out: Path,
) -> str:
    sections = [f"# {about['title']}"]
    if about["dry_run"]:
        sections.append(
            "**A dry run: on a CPU, Triton's kernels in its interpreter, sizes cut. It shows that "
            "the parts run; no figure in it is of a GPU, and none means anything.**"
        )
    sections.append(f"`{about['command']}`, begun at {about['started']}")
    rows = [
        {
            "part": outcome.part.title,
            "outcome": f"{outcome.state}{': ' + outcome.why if outcome.why else ''}",
            "status": "-" if outcome.status is None else str(outcome.status),
            "seconds": outcome.seconds,
            "of at most": outcome.allowed,
        }
        for outcome in outcomes
    ]
    sections.append("## Parts\n\n" + grid(rows))
    for outcome in outcomes:
        sections += _section(outcome, results[outcome.part.name], parts)
    sections += [f"![{plot}]({plot})" for plot in PLOTS if (out / plot).is_file()]
    return "\n\n".join(sections) + "\n"


def _section(outcome: Outcome, result: Mapping[str, Any] | None, parts: Path) -> list[str]:
    name, bad = outcome.part.name, outcome.state in ("failed", "timed out", "cut off")
    tail = _tail(parts, name, TAIL)
    if result is None and not bad and outcome.state != "ok":
        return []
    found = [f"## {outcome.part.title}"]
    if result is not None:
        found += result["notes"]
        for title, rows in result["tables"].items():
            found += [f"### {title}", grid(rows)]
    if bad or result is None:
        # The last line of a part that has no figures, such as pytest's.
        shown = tail if bad else "\n".join(tail.splitlines()[-1:])
        if shown:
            found.append(f"```\n{shown.replace('```', chr(39) * 3)}\n```")
    return found if len(found) > 1 else []


def grid(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of all columns that any row has; those of the first row stand first."""
    columns = list(dict.fromkeys(key for row in rows for key in row if _shows(rows, key)))
    numeric = {key for key in columns if any(_is_number(row.get(key)) for row in rows)}
    rule = ["---:" if key in numeric else "---" for key in columns]
    lines = [columns, rule, *([_cell(row.get(key)) for key in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shows(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    return not any(isinstance(row.get(key), list) for row in rows)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return " ".join(str(value).replace("|", "\\|").split())


def _tail(parts: Path, name: str, characters: int) -> str:
    try:
        text = (parts / f"{name}.log").read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return text[-characters:].strip()
