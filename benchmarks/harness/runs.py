"""What the figures of one run depend on: as its results hold it, and as its report says it."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.harness.environment import (
    command_line,
    describe_environment,
    git_commit,
    hardware_of,
)
from benchmarks.harness.heap import describe_heap


def describe_run(device: torch.device) -> dict[str, Any]:
    """What the figures of one run depend on."""
    return {
        "command": command_line(),
        "started": now(),
        "git_commit": git_commit(),
        "platform": platform.platform(terse=True),
        "environment": {**describe_environment(device), "heap": describe_heap()},
        "load_average_before": os.getloadavg()[0],
    }


def finish_run(results: dict[str, Any]) -> None:
    """Note the end, and how busy the machine was."""
    results["ended"] = now()
    results["load_average_after"] = os.getloadavg()[0]


def describe_machine(results: Mapping[str, Any]) -> list[str]:
    """Hardware, versions, load and command, as list items."""
    environment = results["environment"]
    policy = environment.get("omp_wait_policy") or "unset"
    return [
        f"- Hardware: {hardware_of(environment)}, {environment['vector_instructions']}; "
        f"{environment['threads']} threads of {environment['cores']} cores, "
        f"OMP_WAIT_POLICY {policy}",
        f"- Versions: torch {environment['torch']}, gls_fused {environment['gls_fused']}, "
        f"Python {environment['python']}; {results['platform']}",
        f"- Heap: {environment['heap']}",
        f"- Load average, of the machine, in the minute before: "
        f"{results['load_average_before']:.1f}; in the last minute: "
        f"{results['load_average_after']:.1f}",
        f"- `{results['command']}` (commit {results['git_commit'] or 'unknown'}, "
        f"{results['started']} to {results['ended']})",
    ]


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
