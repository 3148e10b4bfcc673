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
QUICK = ("ddp_cases", "fsdp_cases", "loop_cases")
# A rank that waits this long for another one fails.
PATIENCE = timedelta(seconds=60)


def torchrun(world_size, *command, **environment):
    """The finished process of a launch; its workers' output is kept, errors in between."""
    paths = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={world_size}", *map(str, command)),
        ],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",
            # Without it restarted workers read the addresses of the killed ones:
            # https://github.com/pytorch/pytorch/issues/135712
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@functools.cache
def run_cases(modules, world_size):
    """What each case of the modules' CASES gave, "" or a report of the ranks that failed; or the
    output of a launch in which a worker ended otherwise than by returning.
    """
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder, "outcomes.json")
        command = HERE / "launch.py", outcomes, *modules
        finished = torchrun(world_size, *command)
        if died_outside_of_python(finished.stdout):
            # With one thread for the kernels the others are gloo's. One has been seen to die in
            # gloo::transport::tcp::Pair::recv (torch 2.14), once in hundreds of launches, of which
            # those with the kernels under AddressSanitizer had nothing to report.
            finished = torchrun(world_size, *command)
        return finished.stdout if finished.returncode else json.loads(outcomes.read_text())


def died_outside_of_python(output):
    """Whether a process with Python's faulthandler ended by a segmentation fault in a thread that
    was not Python's.
    """
    return "Fatal Python error: Segmentation fault" in output and "Current thread" not in output


def check_case(module, name, world_size=2):
    # What is quick goes into one launch, as starting costs more than the cases.
    outcomes = run_cases(QUICK if world_size == 2 else (module,), world_size)
    report = outcomes if isinstance(outcomes, str) else outcomes[module][name]
    assert not report, report


def start_worker():
    """What tests/conftest.py does, and the process group."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    dist.init_process_group("gloo", timeout=PATIENCE)


def stop_worker():
    # One that leaves earlier could break what another still receives.
    dist.barrier()
    dist.destroy_process_group()


def run_case(case):
    """The reports of the ranks on which it failed."""
    failure = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            case()
    except BaseException:  # noqa: BLE001  # pytest's failures and DCP's errors are no Exceptions
        failure = f"rank {dist.get_rank()}: {traceback.format_exc()}"
    failures = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    return "\n".join(filter(None, failures))


def main(path, *modules):
    start_worker()
    outcomes = {
        module: {
            name: run_case(case) for name, case in importlib.import_module(module).CASES.items()
        }
        for module in modules
    }
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(outcomes))
    stop_worker()


if __name__ == "__main__":
    main(*sys.argv[1:])
