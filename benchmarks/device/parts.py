"""What is run, in which order, for how long: the parts of device_check.sh and device_more.sh."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.device.schedule import Part

# Of all parts of device_check.sh: with the report and the ends of processes below nine minutes.
BUDGET = 525.0
# Times its limits a dry run's are.
DRY_PATIENCE = 10
DEVICE_TESTS = "tests/backends/device"
# Of a dry run: a few tests that the interpreter is through with in seconds.
DRY_TESTS = "dependent_columns or (refresh_and_core and shape2)"
# Warnings are of the libraries of that machine, which are not what is tested; and without our own
# options, settings of a plugin that is missing there are no error.
PYTEST = ("-m", "pytest", "-q", "-ra", "-o", "addopts=", "-p", "no:cacheprovider", "-W", "default")
SANITIZER_FOUND = 9
# Tests that take long on a CPU, and that know nothing of a device but what torch has.
LONG_TESTS = ("tests/backends/triton", "tests/backends/test_backends.py")


@dataclass(frozen=True)
class Setting:
    """What the parts are told.

    Attributes:
        parts: the folder of their results and logs.
        out: that of the report and the plots.
        data: that of CIFAR-10 or Fashion-MNIST, and of texts; None: what is on the machine.
    """

    parts: Path
    out: Path
    data: Path | None
    dry_run: bool


def check_parts(setting: Setting) -> list[Part]:
    """The most important first."""
    parts = [
        _own(setting, "environment", "Environment", 40, essential=True),
        _build(setting),
        _tests(setting, "triton-tests", "Tests of the Triton kernels", "triton", 130),
        _tests(
            setting, "native-tests", "Tests of the CUDA C++ kernels", "native", 40, needs=("build",)
        ),
        _sanitized(setting, 60),
        _own(setting, "kernels", "Kernels and their floors", 50),
        _own(setting, "steps", "Whole steps", 105),
        _own(setting, "plots", "Plots", 15),
        _own(setting, "graphs", "Captured steps", 20),
        _own(setting, "losses", "Time to Adam's loss", 45),
        _own(setting, "memory", "Peak memory", 20),
    ]
    return _patient(parts) if setting.dry_run else parts


def more_parts(setting: Setting) -> list[Part]:
    """What takes longer, and tells more."""
    parts = [
        _own(setting, "environment", "Environment", 40, essential=True),
        _own(setting, "tiles", "Tiles around the table's", 150),
        _profile(setting, 120),
        _long_tests(setting, 200),
    ]
    return _patient(parts) if setting.dry_run else parts


def _patient(parts: Sequence[Part]) -> list[Part]:
    return [replace(part, limit=DRY_PATIENCE * part.limit) for part in parts]


def _own(setting: Setting, name: str, title: str, limit: float, *, essential: bool = False) -> Part:
    """One of benchmarks/device."""
    return Part(
        name, title, _own_command(setting, name), limit, essential=essential,
        environment=_environment(setting),
    )  # fmt: skip


def _own_command(setting: Setting, name: str, result: str | None = None) -> tuple[str, ...]:
    return (
        *(sys.executable, "-m", "benchmarks.device", "--part", name),
        *("--result", str(setting.parts / f"{result or name}.json")),
        *("--out", str(setting.out), "--parts", str(setting.parts)),
        *(("--data", str(setting.data)) if setting.data else ()),
        *(("--dry-run",) if setting.dry_run else ()),
    )


def _environment(setting: Setting) -> Mapping[str, str]:
    found = {"PYTHONUNBUFFERED": "1"}
    return found | ({"TRITON_INTERPRET": "1"} if setting.dry_run else {})


def _build(setting: Setting) -> Part:
    """In place, for the GPU at hand; a dry run only loads setup.py as the build would."""
    build = ("build_ext", "--inplace")
    command = (sys.executable, "-m", "benchmarks.device", "--part", "build")
    return Part(
        "build",
        "Build of the extension with its CUDA kernels",
        (*command, *(("--dry-run",) if setting.dry_run else ()), "--", *build),
        200,
        beside=True,
        environment={**_environment(setting), "MAX_JOBS": str(os.cpu_count() or 1)},
    )


def _tests(
    setting: Setting, name: str, title: str, backend: str, limit: float,
    needs: tuple[str, ...] = (),
) -> Part:  # fmt: skip
    chosen = f"{backend} and ({DRY_TESTS})" if setting.dry_run else _of_backend(backend)
    command = (sys.executable, *PYTEST, *_in_parallel(setting), "-k", chosen, DEVICE_TESTS)
    return Part(name, title, command, limit, needs=needs, environment=_environment(setting))


def _of_backend(backend: str) -> str:
    """Tests that name no backend are of the native kernels alone."""
    return "triton" if backend == "triton" else "not triton"


def _in_parallel(setting: Setting) -> tuple[str, ...]:
    """Triton's compiler takes most of the time of its tests, on the host."""
    if setting.dry_run or importlib.util.find_spec("xdist") is None:
        return ()
    return ("-n", str(max(1, min(8, (os.cpu_count() or 1) // 2))))


def _sanitized(setting: Setting, limit: float) -> Part:
    """Every op once, and where it is there under compute-sanitizer."""
    command, environment = _own_command(setting, "ops"), dict(_environment(setting))
    title = "Every op once"
    sanitizer = None if setting.dry_run else find_program("compute-sanitizer")
    if sanitizer is None:
        title += ", without compute-sanitizer"
    else:
        title += " under compute-sanitizer"
        command = (sanitizer, "--error-exitcode", str(SANITIZER_FOUND), *command)
        # Else an access beyond a tensor lands in memory that torch keeps.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    return Part("ops", title, command, limit, environment=environment)


def _profile(setting: Setting, limit: float) -> Part:
    """By Nsight Compute, where it is there: a CSV with a line per metric of each kernel."""
    command, title = _own_command(setting, "profile"), "Nsight Compute"
    ncu = None if setting.dry_run else find_program("ncu")
    if ncu is None:
        title += ": not there, each op was only run"
    else:
        sections = ("SpeedOfLight", "Occupancy", "LaunchStats", "MemoryWorkloadAnalysis")
        command = (
            *(ncu, "--profile-from-start", "off", "--csv", "--page", "details"),
            *(word for section in sections for word in ("--section", section)),
            *("--log-file", str(setting.out / "ncu.csv")),
            *command,
        )
    return Part("profile", title, command, limit, environment=_environment(setting))


def _long_tests(setting: Setting, limit: float) -> Part:
    if setting.dry_run:
        chosen: tuple[str, ...] = ("-k", DRY_TESTS, DEVICE_TESTS)
    else:
        chosen = (*LONG_TESTS, DEVICE_TESTS)
    command = (sys.executable, *PYTEST, *_in_parallel(setting), *chosen)
    return Part(
        "long-tests", "The longest tests", command, limit, environment=_environment(setting)
    )


def find_program(name: str) -> str | None:
    """On PATH, or in the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(name, path=str(Path(home, "bin")))
