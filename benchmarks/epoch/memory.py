"""Peak memory of one optimizer, in a process of its own: `python -m benchmarks.epoch.memory`.

ru_maxrss would not do: a process inherits it from its parent across exec, and importing torch
leaves a peak above what is in use. The kernel's own high-water mark can be set back.
"""

from __future__ import annotations

import contextlib
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.workloads.contenders import CONTENDERS, Trainer
from benchmarks.workloads.shapes import SHAPES, synthesise
from benchmarks.workloads.tasks import TASKS

# A start, two gatherings and a move of the basis.
STEPS = 12
# Batches to go through.
BATCHES = 2
SMALL_BATCH = 8


def measure_memory(
    optimizer: str, task: str, shape: str, batch_size: int, device: torch.device
) -> int:
    """Bytes by which a fresh process's peak grows from before the model to after `STEPS` steps."""
    request = [optimizer, task, shape, batch_size, str(device), torch.get_num_threads()]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.epoch.memory", json.dumps(request)],
        cwd=Path(__file__).parents[2],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return int(done.stdout)


def main() -> None:
    """Measure what the only argument asks for, and print the bytes."""
    optimizer, task, shape, batch_size, device, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    target = torch.device(device)
    dataset = synthesise(SHAPES[shape].shape, BATCHES * batch_size).to(target)
    build = CONTENDERS[optimizer].build
    # What the first steps of any model load is no model's.
    small = (8, 8) if TASKS[task].text else (1, 8, 8)
    warm_up = synthesise(small, 2 * SMALL_BATCH).to(target)
    Trainer(TASKS[task], warm_up, build, SMALL_BATCH).next_steps(STEPS)
    before = _start_peak(target)
    trainer = Trainer(TASKS[task], dataset, build, batch_size)
    trainer.next_steps(STEPS)
    print(_peak(target) - before)


def _start_peak(device: torch.device) -> int:
    """Set the peak back to what is in use, where that is possible, and return it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return _peak(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    if found is not None:
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Elsewhere than on Linux, macOS counts in bytes.
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
