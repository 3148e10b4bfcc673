"""The tables of the scaling experiment, as Markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness.interleave import Quartiles, pair_ratios, quartiles
from benchmarks.harness.runs import describe_machine
from benchmarks.harness.tables import NOTHING, Table, spread_cell
from benchmarks.scaling.run import NAMES, WITHOUT, Fit, extra_seconds, fit_power
from benchmarks.workloads.contenders import BASELINE


def make_tables(results: Mapping[str, Any]) -> list[Table]:
    """The exponents, then every point."""
    return [_fit_table(results), _point_table(results)]


def render_report(results: Mapping[str, Any]) -> str:
    """The whole report.md."""
    settings, base = results["settings"], results["settings"]["base"]
    lines = [
        *describe_machine(results),
        f"- An MLP of {base['depth']} hidden layers of width {base['width']}, as many inputs, "
        f"batch {base['batch']}, rank {base['rank']}; each sweep varies one of the four.",
        f"- Each round runs a slice of GLS, Adam and SGD, about {settings['slice_seconds']:g} s of "
        f"Adam's, in an order that turns and reverses; {settings['rounds']} rounds. Before a point "
        f"is timed, GLS's weights after some steps are compared with its reference's. lr "
        f"{settings['lr']:g}.",
    ]
    tables = [table.markdown() for table in make_tables(results)]
    return "\n\n".join(["# What GLS adds to a step", "\n".join(lines), *tables]) + "\n"


def _fit_table(results: Mapping[str, Any]) -> Table:
    rows = []
    for sweep in dict.fromkeys(point["sweep"] for point in results["points"]):
        points = [point for point in results["points"] if point["sweep"] == sweep]
        values = [point["value"] for point in points]
        extra = [quartiles(extra_seconds(point["seconds_per_step"])).median for point in points]
        whole = [
            [quartiles(point["seconds_per_step"][name]).median for point in points]
            for name in NAMES
        ]
        positive = sum(seconds > 0 for seconds in extra)
        rows.append(
            (
                sweep,
                f"{min(values)} to {max(values)}",
                f"{positive} of {len(points)}",
                *(_fit_cell(fit_power(values, ys)) for ys in (extra, *whole)),
            )
        )
    return Table(
        "Exponents",
        "Seconds grow as the power of what is varied: least squares of the logarithms of the "
        "medians, ± the standard error. A point where GLS is no slower than SGD has no logarithm "
        "and is left out of the first; `points` says how many are in.",
        ("varied", "from, to", "points", "GLS less SGD", "GLS", "Adam", "SGD"),
        tuple(rows),
    )


def _point_table(results: Mapping[str, Any]) -> Table:
    rows = []
    for point in results["points"]:
        rounds = point["seconds_per_step"]
        faults = point["minor_faults_per_step"]
        rows.append(
            (
                point["sweep"],
                str(point["value"]),
                *(f"{1e3 * quartiles(rounds[name]).median:.3f}" for name in NAMES),
                _microseconds(extra_seconds(rounds)),
                spread_cell(quartiles(pair_ratios(rounds["gls"], rounds[WITHOUT]))),
                spread_cell(quartiles(pair_ratios(rounds["gls"], rounds[BASELINE]))),
                " / ".join(f"{quartiles(faults[name]).median:.0f}" for name in NAMES),
            )
        )
    return Table(
        "Point by point",
        "Milliseconds per step, medians; differences and ratios within rounds: median [lower, "
        "upper quartile]. Faults are minor page faults per step, medians of GLS / Adam / SGD.",
        (
            "varied",
            "value",
            "GLS, ms",
            "Adam, ms",
            "SGD, ms",
            "GLS less SGD, µs",
            "GLS / SGD",
            "GLS / Adam",
            "faults",
        ),
        tuple(rows),
        labels=1,
    )


def _fit_cell(fit: Fit | None) -> str:
    if fit is None:
        return NOTHING
    return f"{fit.exponent:.2f}" + ("" if fit.error is None else f" ± {fit.error:.2f}")


def _microseconds(seconds: Sequence[float]) -> str:
    found = quartiles(seconds)
    scaled = Quartiles(1e6 * found.median, 1e6 * found.low, 1e6 * found.high)
    return spread_cell(scaled, 0)
