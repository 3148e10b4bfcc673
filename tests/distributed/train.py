"""A training run that saves as it goes, resumes where it can, and may be killed; see main."""

import argparse
import os
import signal
from pathlib import Path

import checkpoint
import torch
import torch.distributed as dist
from fsdp_cases import make, sharded
from launch import start_worker, stop_worker
from ranks import OPTIONS, even, train_on_part, whole
from torch.nn.parallel import DistributedDataParallel

from gls_fused import GLS

BATCH = 24


def train(model, optimizer, steps):
    train_on_part(model, optimizer, "mlp", even(BATCH), steps)


def save(folder, step, model, optimizer):
    """A checkpoint, which counts from the moment that it is named as the last."""
    if isinstance(model, DistributedDataParallel):
        if dist.get_rank() == 0:
            state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, folder / str(step))
    else:
        checkpoint.save(folder / str(step), model, optimizer)
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "new").write_text(str(step))
        (folder / "new").rename(folder / "last")


def load(folder, model, optimizer):
    """The number of the step after the last checkpoint."""
    if not (folder / "last").exists():
        return 0
    step = int((folder / "last").read_text())
    if isinstance(model, DistributedDataParallel):
        state = torch.load(folder / str(step), weights_only=True)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    else:
        checkpoint.load(folder / str(step), model, optimizer)
    return step


def main():
    """Train to step `last`, with a checkpoint every `every` steps; the weights go to `weights`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["ddp", "fsdp"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--last", type=int, required=True)
    parser.add_argument("--every", type=int, required=True)
    parser.add_argument("--killed-at", type=int)
    given = parser.parse_args()
    start_worker()
    model = make("uneven")
    model = sharded(model) if given.kind == "fsdp" else DistributedDataParallel(model)
    optimizer = GLS(model, **OPTIONS)
    first = load(given.folder, model, optimizer)
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    (given.folder / f"attempt{attempt}").write_text(f"from step {first}")
    for step in range(first, given.last):
        if step == given.killed_at and attempt == 0 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        train(model, optimizer, range(step, step + 1))
        if (step + 1) % given.every == 0:
            save(given.folder, step + 1, model, optimizer)
    weights = [whole(p) for p in model.parameters()]
    if dist.get_rank() == 0:
        torch.save(weights, given.folder / "weights")
    stop_worker()


if __name__ == "__main__":
    main()
