"""The table of the host's seconds, as Markdown and for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.harness.interleave import pair_ratios, quartiles
from benchmarks.harness.runs import describe_machine
from benchmarks.harness.tables import Table, spread_cell, verdict
from benchmarks.host.run import gathering, ordinary

# Of fused Adam's, the mean over gathering steps and the others.
TARGET = 1.2


def make_table(results: Mapping[str, Any]) -> Table:
    """A row for each number of layers."""
    rows = []
    for point in results["points"]:
        seconds, steps = point["seconds_per_step"], point["steps"]
        ratio = quartiles(pair_ratios(seconds["gls"], seconds["adam"]))
        rows.append(
            (
                str(point["layers"]),
                _milliseconds(statistics.median(ordinary(steps))),
                _milliseconds(statistics.median(gathering(steps))),
                _milliseconds(quartiles(seconds["gls"]).median),
                _milliseconds(quartiles(seconds["adam"]).median),
                spread_cell(ratio, 2),
                verdict(ratio.median, TARGET),
            )
        )
    kind = "launches stubbed" if results["settings"]["stubbed"] else "kernels run on the CPU"
    return Table(
        f"Host time of a step, {kind}",
        "Milliseconds of `step()` alone: GLS's median of ordinary steps and of those that gather, "
        "one in ten, and the median over rounds of the mean of ten steps, with one of each round "
        f"gathering; Adam's likewise; GLS over Adam, median [quartiles] over rounds; {TARGET} is "
        "aimed at.",
        ("layers", "ordinary", "gathering", "mean", "Adam, fused", "GLS / Adam", "aim"),
        tuple(rows),
        labels=1,
    )


def render_report(results: Mapping[str, Any]) -> str:
    """The whole report.md."""
    settings = results["settings"]
    lines = [
        *describe_machine(results),
        f"- A chain of linear layers of width {settings['width']}, batch {settings['batch']}; "
        f"{settings['rounds']} rounds of ten steps of each, in an order that turns and reverses. "
        "Before, three such layers' weights after some steps are compared with the reference's.",
    ]
    if settings["stubbed"]:
        lines.append(
            "- Launches are stubbed: Triton's kernels and torch's fused Adam are prepared, and not "
            "started, on tensors of the CPU. What a launch costs the host is in neither."
        )
    return (
        "\n\n".join(["# The host's part", "\n".join(lines), make_table(results).markdown()]) + "\n"
    )


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"
