"""Part `environment`: what the figures depend on, and what a later part will miss."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import subprocess
from collections.abc import Sequence

import torch

from benchmarks.device.machine import Machine
from benchmarks.device.record import Record
from benchmarks.harness.environment import describe_environment, git_commit
from gls_fused import available_backends

# What a part does without, or with less, where it is missing.
PACKAGES = {
    "triton": "no Triton kernels",
    "ninja": "the build compiles one file after the other",
    "setuptools": "no build",
    "pybind11": "nothing: torch brings its headers along",
    "pytest": "no tests",
    "hypothesis": "no tests",
    "xdist": "the tests run in one process",
    "numpy": "no benchmarks",
    "sklearn": "no time to loss without --data",
    "rich": "no time to loss",
    "matplotlib": "no plots",
}
PROGRAMS = {
    "nvcc": "no CUDA C++ kernels",
    "g++": "no native kernels",
    "compute-sanitizer": "accesses to memory are not checked",
    "ncu": "no profiles",
}
QUERY = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit"


def describe(machine: Machine, record: Record) -> bool:
    """Always true: what is missing is for the parts to miss."""
    facts = {"commit": git_commit() or "unknown", **describe_environment(machine.device)}
    facts["backends"] = ", ".join(facts["backends"])
    for name, why in available_backends().items():
        if why is not None:
            facts[f"without {name}"] = why
    if machine.dry:
        facts["GPU"] = "none: a dry run"
    else:
        properties = torch.cuda.get_device_properties(machine.device)
        facts["compute capability"] = f"{properties.major}.{properties.minor}"
        facts["multiprocessors"] = properties.multi_processor_count
        facts["L2, MB"] = properties.L2_cache_size / 1e6
        facts["memory, GB"] = properties.total_memory / 1e9
        facts[QUERY] = _ask(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"])
    for key, value in facts.items():
        record.add("Machine", what=key, value=str(value))
    for name, without in PACKAGES.items():
        there = importlib.util.find_spec(name) is not None
        record.add("Tools", tool=name, found=_version(name) if there else f"MISSING: {without}")
    for name, without in PROGRAMS.items():
        record.add("Tools", tool=name, found=shutil.which(name) or f"MISSING: {without}")
    return True


def _version(module: str) -> str:
    package = {"sklearn": "scikit-learn", "xdist": "pytest-xdist"}.get(module, module)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "there, of unknown version"


def _ask(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    return (done.stdout or done.stderr).strip()
