"""Runs the cases of a module under torchrun, all in one launch, and brings home what failed.

A case is a function without arguments that runs on every rank. The file is both ends: pytest calls
`run_cases`, torchrun runs `main`.
"""

import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).parent
# A rank that waits this long for another one fails.
PATIENCE = timedelta(seconds=60)


def torchrun(world_size, *command, **environment):
    """The finished process of a launch; its output is kept."""
    paths = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={world_size}", *map(str, command)),
        ],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@functools.cache
def run_cases(module, world_size):
    """What each case of the module's CASES gave, "" or a report of the ranks that failed; or why
    there is no telling.
    """
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder, "outcomes.json")
        finished = torchrun(world_size, HERE / "launch.py", module, outcomes)
        if finished.returncode or not outcomes.exists():
            return finished.stdout
        return json.loads(outcomes.read_text())


def check_case(module, world_size, name):
    outcomes = run_cases(module, world_size)
    report = outcomes if isinstance(outcomes, str) else outcomes[name]
    assert not report, report


def start_worker():
    """What tests/conftest.py does, and the process group."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    dist.init_process_group("gloo", timeout=PATIENCE)


def main(module, path):
    start_worker()
    outcomes = {}
    for name, case in importlib.import_module(module).CASES.items():
        failure = ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                case()
        except Exception:  # noqa: BLE001  # of every rank, to be reported
            failure = f"rank {dist.get_rank()}: {traceback.format_exc()}"
        failures = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
        outcomes[name] = "\n".join(filter(None, failures))
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(outcomes))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
