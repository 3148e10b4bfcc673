"""The table of the models' seconds, as Markdown and for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.harness.interleave import quartiles
from benchmarks.harness.runs import describe_machine
from benchmarks.harness.tables import NOTHING, Table, spread_cell, verdict
from benchmarks.models.run import WARM_UP, ratios

HEADER = (
    "model",
    "aim",
    "batch",
    "millions of parameters",
    "with a P",
    "orthogonal",
    "AdamW, s",
    "ordinary, s",
    "gathering, s",
    "GLS / AdamW",
)


def make_table(results: Mapping[str, Any]) -> Table:
    """A row for each model, the slowest beside AdamW first, and then those that failed."""
    timed = sorted(
        ((quartiles(ratios(model)), model) for model in results["models"]),
        key=lambda pair: -pair[0].median,
    )
    rows = [
        (
            f"{model['package']}/{model['model']}",
            verdict(ratio.median, model["aim"]),
            f"{model['batch']} x {model['size']}",
            f"{model['parameters'] / 1e6:,.1f}",
            f"{model['covered']:.1%}",
            f"{model['orthogonal']:.0%}",
            *(_seconds_cell(model["seconds"][kind]) for kind in ("adamw", "ordinary", "gathering")),
            spread_cell(ratio, 2),
        )
        for ratio, model in timed
    ]
    empty = (NOTHING,) * (len(HEADER) - 2)
    rows += [(label, why.replace("|", "\\|"), *empty) for label, why in results["failed"].items()]
    kind = "seconds that the process computed" if results["settings"]["cpu_time"] else "seconds"
    return Table(
        "Seconds of published models",
        f"Median {kind} of a whole step, forward to `step()`, and in brackets of `step()` alone: "
        "of fused AdamW, of GLS where it does not gather statistics, and where it does. GLS / "
        "AdamW is of ordinary + (gathering - ordinary) / 10, as one step in ten gathers by "
        "default: median [quartiles] over rounds. With a P, and orthogonal: shares of the "
        "parameters, in layers that GLS covers and in those that take orthogonal steps."
        f"{_cut_off(results)}",
        HEADER,
        tuple(rows),
        labels=3,
    )


def render_report(results: Mapping[str, Any]) -> str:
    """The whole report.md."""
    packages = ", ".join(
        f"{package} {version or 'not installed'}"
        for package, version in results["packages"].items()
    )
    lines = [
        *describe_machine(results),
        f"- {packages}; random weights, inputs and the same weights for both; training mode; "
        f"lr {results['settings']['lr']}, all else by default.",
        f"- {results['settings']['rounds']} rounds after {WARM_UP} steps of either: a step of "
        "AdamW, one of GLS that gathers and one that does not, in an order that turns and reverses "
        "(GLS gathers in every second of its steps).",
    ]
    return (
        "\n\n".join(["# Seconds of models", "\n".join(lines), make_table(results).markdown()])
        + "\n"
    )


def _cut_off(results: Mapping[str, Any]) -> str:
    """Which models a run that was cut off has not come to."""
    seen = {model["model"] for model in results["models"]}
    seen.update(label.split("/", 1)[1] for label in results["failed"])
    left = [name for name in results["settings"]["models"] if name not in seen]
    return f" The run was cut off before {', '.join(left)}." if left else ""


def _seconds_cell(seconds: Mapping[str, list[float]]) -> str:
    whole, update = (statistics.median(seconds[key]) for key in ("whole", "update"))
    return f"{whole:.3g} [{update:.2g}]"
