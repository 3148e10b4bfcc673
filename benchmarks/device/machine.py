"""The machine that is measured: a GPU, or for a dry run the CPU in its place."""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from benchmarks.harness.interleave import Quartiles, quartiles
from gls_fused import available_backends, build_info
from gls_fused.backends.dispatch import resolve_backend

Action = Callable[[], object]

# More than any L2.
FLUSH_BYTES = 256 * 2**20
WARM_UP = 3


class Gpu:
    """The current CUDA device.

    Attributes:
        runs: of which a median is taken.
        warm_up: runs before a capture.
        replays: of a captured step, before its weights are looked at.
    """

    dry = False
    device = torch.device("cuda")
    runs = 30
    replays = 8
    warm_up = 3
    captures = "CUDA graph"

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)

    def seconds(self, action: Action) -> Quartiles:
        """Of single runs by CUDA events, each of which finds nothing in L2."""
        taken = []
        for index in range(WARM_UP + self.runs):
            self._flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            action()
            end.record()
            end.synchronize()
            if index >= WARM_UP:
                taken.append(start.elapsed_time(end) / 1e3)
        return quartiles(taken)

    def synchronise(self) -> None:
        torch.cuda.synchronize()

    def capture(self, action: Action) -> Action:
        """A replay of the action, captured after some runs as torch's documentation asks."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.warm_up):
                action()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            action()
        return graph.replay

    def peak_bytes(self, action: Action) -> int | None:
        """By which the peak of torch's allocations rises above what was there before."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    @contextlib.contextmanager
    def profiled(self) -> Iterator[None]:
        """What a profiler that waits for it is to see."""
        torch.cuda.profiler.start()
        yield
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()

    def backends(self) -> dict[str, ModuleType]:
        """Those with kernels for CUDA here; says which have none, and why."""
        reasons = dict(available_backends())
        if reasons["native"] is None:
            failure = build_info()["cuda_failure"]
            reasons["native"] = None if failure is None else str(failure)
        return _resolve(reasons, "cuda")


class Cpu:
    """For a dry run: a clock in the place of events, a plain call in that of a graph's replay."""

    dry = True
    device = torch.device("cpu")
    runs = 1
    replays = 1
    warm_up = 1
    captures = "plain call"

    def seconds(self, action: Action) -> Quartiles:
        taken = []
        for _ in range(self.runs):
            start = time.perf_counter()
            action()
            taken.append(time.perf_counter() - start)
        return quartiles(taken)

    def synchronise(self) -> None:
        pass

    def capture(self, action: Action) -> Action:
        """The action itself, after as many runs."""
        for _ in range(self.warm_up):
            action()
        return action

    def peak_bytes(self, action: Action) -> int | None:
        """None: a process's peak never falls."""
        action()
        return None

    @contextlib.contextmanager
    def profiled(self) -> Iterator[None]:
        yield

    def backends(self) -> dict[str, ModuleType]:
        """Triton's in the interpreter, and the CPU's kernels in the place of those for CUDA."""
        return _resolve(available_backends(), "cpu")


Machine = Gpu | Cpu


def find_machine(*, dry_run: bool) -> Machine:
    """The CPU for a dry run, else the GPU.

    Raises:
        SystemExit: torch can use no GPU.
    """
    if dry_run:
        torch.set_num_threads(1)
        return Cpu()
    if not torch.cuda.is_available():
        raise SystemExit("error: there is no GPU that torch can use; --dry-run needs none")
    return Gpu()


def _resolve(reasons: Any, device: str) -> dict[str, ModuleType]:
    found = {}
    for name in ("triton", "native"):
        if reasons[name] is None:
            found[name] = resolve_backend(name, [device])
        else:
            print(f"without {name}: {reasons[name]}", file=sys.stderr, flush=True)
    return found
