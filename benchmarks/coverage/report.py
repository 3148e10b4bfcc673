"""The tables of the coverage experiment."""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.coverage.build import INSTALL
from benchmarks.coverage.run import Coverage
from benchmarks.harness.runs import describe_machine
from benchmarks.harness.tables import NOTHING, Table

# What counts as much of a model, and as nearly all of it.
MUCH = 0.1
NEARLY_ALL = 0.97
HALF = 0.5
# A reason with less than this share of every model stands under the last line of the table.
SHOWN = 0.02
EXAMPLES = 3
# Reasons that are one though they name many classes: pattern, title. The first that fits counts.
KINDS = (
    (r"^shared: .*Embedding", "embedding tied to the head"),
    (r"Experts\b", "experts, one parameter for all"),
    (r"Embedding(Bag)?\b", "embedding, not tied"),
    (r"Norm(\dd)?\b", "normalisation"),
)


def models_in(results: Mapping[str, Any]) -> list[Coverage]:
    """Of the results as they are in JSON."""
    return [Coverage(**model) for model in results["models"]]


def make_tables(results: Mapping[str, Any]) -> list[Table]:
    """By package, by reason, by model."""
    return [make_package_table(results), make_reason_table(results), make_model_table(results)]


def make_package_table(results: Mapping[str, Any]) -> Table:
    """How much is covered, over the models of each package and over all."""
    models = models_in(results)
    rows = []
    for package, version in results["packages"].items():
        mine = [model for model in models if model.package == package]
        name = f"{package} {version}" if version else f"{package} (not installed)"
        rows.append((name, *_summary(mine)))
    rows.append(("**all**", *_summary(models)))
    return Table(
        "Coverage",
        "The share of a model's trained parameters that is in layers GLS covers; the others take "
        "Adam's update. Median and mean over the models, and how many have so much.",
        ("package", "models", "median", "mean", "97% or more", "90% or more", "under 50%"),
        tuple(rows),
        labels=1,
    )


def make_reason_table(results: Mapping[str, Any]) -> Table:
    """What takes Adam's update, over all models."""
    shares: dict[str, Counter[str]] = defaultdict(Counter)
    for model in models_in(results):
        for reason, count in model.adam.items():
            shares[kind_of(reason)][model.model] += count / model.parameters
    rows, others = [], Counter[str]()
    for kind, mine in sorted(shares.items(), key=lambda item: -sum(item[1].values())):
        if max(mine.values()) < SHOWN:
            others.update(mine)
        else:
            rows.append(_reason_row(kind, mine))
    if others:
        rows.append(_reason_row("anything else", others))
    return Table(
        "What takes Adam's update",
        "By reason: the models of which it has 10% or more, its shares of all models added up in "
        "percentage points, and where it has most.",
        ("reason", "most in", "models with 10% or more", "sum over models, % points"),
        tuple(rows),
    )


def make_model_table(results: Mapping[str, Any]) -> Table:
    """Every model, with the reasons for the rest."""
    rows = []
    for model in models_in(results):
        kinds: Counter[str] = Counter()
        for reason, count in model.adam.items():
            kinds[kind_of(reason)] += count / model.parameters
        why = "; ".join(f"{kind} {part:.1%}" for kind, part in kinds.most_common() if part >= SHOWN)
        size = f"{model.parameters / 1e6:,.1f}"
        rows.append((model.package, model.model, why or NOTHING, size, f"{model.share:.1%}"))
    return Table(
        "Models",
        f"What takes Adam's update is named from {SHOWN:.0%} of the parameters on.",
        ("package", "model", "takes Adam's update", "millions of parameters", "covered"),
        tuple(rows),
        labels=3,
    )


def render_report(results: Mapping[str, Any]) -> str:
    """The whole report.md."""
    lines = describe_machine(results)
    absent = [package for package, version in results["packages"].items() if version is None]
    if absent:
        lines.append(f"- Not installed, and left out: {', '.join(absent)}; `{INSTALL}`")
    lines += [f"- Not built: {name}: {error}" for name, error in results["failed"].items()]
    tables = [table.markdown() for table in make_tables(results)]
    return "\n\n".join(["# Coverage", "\n".join(lines), *tables]) + "\n"


def kind_of(reason: str) -> str:
    """A reason without what differs from class to class and from layer to layer."""
    for pattern, title in KINDS:
        if re.search(pattern, reason):
            return title
    # A class by its package and name.
    reason = re.sub(r"\b([a-z]\w*)(?:\.\w+)*\.(\w+) (?=is|overrides)", r"\2 of \1 ", reason)
    return re.sub(r"\bhas \d+ groups", "has groups", reason)


def _summary(models: Sequence[Coverage]) -> tuple[str, ...]:
    shares = [model.share for model in models]
    if not shares:
        return ("0", *[NOTHING] * 5)
    return (
        f"{len(shares)}",
        f"{statistics.median(shares):.1%}",
        f"{statistics.mean(shares):.1%}",
        f"{sum(share >= NEARLY_ALL for share in shares)}",
        f"{sum(share >= 1 - MUCH for share in shares)}",
        f"{sum(share < HALF for share in shares)}",
    )


def _reason_row(kind: str, shares: Counter[str]) -> tuple[str, ...]:
    most = ", ".join(f"{model} {part:.0%}" for model, part in shares.most_common(EXAMPLES))
    count = sum(part >= MUCH for part in shares.values())
    return (kind, most, f"{count}", f"{100 * sum(shares.values()):.0f}")
