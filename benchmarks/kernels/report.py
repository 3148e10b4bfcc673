"""What a benchmark records beside its seconds, and the table of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from benchmarks.harness.ceilings import Ceilings
from benchmarks.harness.runs import describe_machine
from benchmarks.harness.tables import Table


def describe_case(
    benchmark: Any,
    ceilings: Ceilings,
    op: str,
    shape: str,
    backend: str,
    flops: int,
    bytes_moved: int,
) -> None:
    """Record in extra_info what the case is, its rates, and how near the bound it comes.

    The bound is the time that the copy's rate needs for its bytes or the GEMM's for its flops,
    whichever is longer.
    """
    benchmark.extra_info.update(
        {"op": op, "shape": shape, "backend": backend, "flops": flops, "bytes": bytes_moved}
    )
    benchmark.extra_info["ceilings"] = asdict(ceilings)
    # Without statistics, with --benchmark-disable, there is no rate.
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median
        bound = max(bytes_moved / ceilings.copy, flops / ceilings.gemm)
        benchmark.extra_info["GB/s"] = bytes_moved / seconds / 1e9
        benchmark.extra_info["GFLOP/s"] = flops / seconds / 1e9
        benchmark.extra_info["of_bound"] = bound / seconds


def pick_cases(recorded: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What pytest-benchmark's JSON holds of each case, without the machine's name and the like."""
    return [
        {
            **found["extra_info"],
            **{key: found["stats"][key] for key in ("median", "q1", "q3", "rounds")},
        }
        for found in recorded["benchmarks"]
    ]


def make_table(results: Mapping[str, Any]) -> Table:
    """One row per op, shape and backend."""
    rows = [
        (
            case["op"],
            case["shape"],
            case["backend"],
            f"{1e6 * case['median']:.1f} [{1e6 * case['q1']:.1f}, {1e6 * case['q3']:.1f}]",
            f"{case['GB/s']:.2f}",
            f"{case['GFLOP/s']:.2f}",
            f"{case['of_bound']:.2f}",
        )
        for case in sorted(results["cases"], key=lambda case: case["op"])
    ]
    return Table(
        "Kernels",
        "Median [lower, upper quartile] of a call. The bound is what the copy's rate allows for "
        "the bytes or the GEMM's for the flops, whichever takes longer; arrays that stay in the "
        "caches can exceed it, as a call finds its arrays where the last one left them.",
        ("op", "shape", "backend", "µs", "GB/s", "GFLOP/s", "of the bound"),
        tuple(rows),
        labels=3,
    )


def render_report(results: Mapping[str, Any]) -> str:
    """The whole report.md."""
    ceilings = results["cases"][0]["ceilings"]
    lines = [
        *describe_machine(results),
        f"- Ceilings, measured in the same session: copy {ceilings['copy'] / 1e9:.1f} GB/s, read "
        f"and written; float32 GEMM {ceilings['gemm'] / 1e9:.0f} GFLOP/s.",
        "- float32, the arrays of the tasks' models at batch 128, rank 32: images of CIFAR-10's "
        "shape, sequences of 64 characters. Every op was checked "
        "against the reference in float64 before it was timed.",
    ]
    return "\n\n".join(["# Kernels", "\n".join(lines), make_table(results).markdown()]) + "\n"
