"""Kernels timed on a GPU: CUDA events, L2 flushed before each run, medians. See device_check.sh."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks.device.run import (
    COPY,
    RUNS,
    TOLERANCE,
    check,
    find_backends,
    measure,
    measure_yardsticks,
)


def main() -> int:
    """Check, measure, write device.json and report.md; 1 without a GPU or with a wrong result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/device"))
    parser.add_argument("--sanitize", action="store_true", help="check only")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: there is no GPU that torch can use", file=sys.stderr)
        return 1
    backends = find_backends()
    errors = {name: check(backend) for name, backend in backends.items()}
    # Not their maximum, which passes over a NaN.
    if not backends or not all(x <= TOLERANCE for found in errors.values() for x in found):
        print(f"error: {errors} from the reference, nothing is measured", file=sys.stderr)
        return 1
    if arguments.sanitize:
        return 0
    found = measure_yardsticks()
    for name, backend in backends.items():
        found |= measure(name, backend)
    gpu = torch.cuda.get_device_name()
    bandwidth = 2 * 2**28 / found[COPY] / 1e9
    content = {"gpu": gpu, "torch": torch.__version__, "errors": errors, "seconds": found}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "device.json").write_text(json.dumps(content, indent=2) + "\n")
    setting = f"torch {torch.__version__}; a copy moves {bandwidth:.0f} GB/s. "
    setting += f"Medians of {RUNS} runs, L2 flushed."
    lines = [f"# Measured on {gpu}", "", setting, "", "| what | µs |", "| --- | ---: |"]
    lines += [f"| {name} | {value * 1e6:.1f} |" for name, value in found.items()]
    (arguments.out / "report.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
