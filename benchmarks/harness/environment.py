"""What a figure depends on besides the code: hardware, versions, threads, commit, command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import gls_fused


def describe_environment(device: torch.device) -> dict[str, Any]:
    """The hardware and the versions that seconds depend on, as JSON values."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gls_fused": gls_fused.__version__,
        "backends": [name for name, why in gls_fused.available_backends().items() if why is None],
    }


def hardware_of(environment: Mapping[str, Any]) -> str:
    """What a report calls the machine, from what `describe_environment` gave."""
    device, cpu = environment["device"], environment["cpu"]
    return str(cpu) if device == "cpu" else f"{device}, host {cpu}"


def cpu_name() -> str:
    """The processor's model name, or its architecture where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The checkout's commit, "+changes" appended when files differ from it; None outside git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            check=True,
            capture_output=True,
            text=True,
            timeout=10,
        ).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+changes" if changed else commit


def command_line(arguments: Sequence[str] | None = None) -> str:
    """The command that was run, or the one with other arguments, ready to paste in a shell."""
    used = sys.argv[1:] if arguments is None else arguments
    return shlex.join(["python", "-m", "benchmarks", *used])
