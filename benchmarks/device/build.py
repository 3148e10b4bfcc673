"""Part `build`: the extension with its CUDA kernels, in place, for the GPU at hand."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What a dry run asks setup.py in the place of a build: it then has loaded torch and its settings.
ONLY_LOADED = ("--version",)
# Of a dry run, where there is no GPU to ask.
DRY_CAPABILITY = (9, 0)


def build_extension(arguments: Sequence[str], *, dry_run: bool) -> bool:
    """Run setup.py with them; whether it did what it was asked."""
    if dry_run:
        capability, arguments = DRY_CAPABILITY, ONLY_LOADED
    else:
        import torch

        capability = torch.cuda.get_device_capability()
    command = [sys.executable, "setup.py", *arguments]
    environment = build_environment(capability, dry_run=dry_run)
    if shutil.which("ninja") is None:
        print("ninja is missing: torch compiles one file after the other", flush=True)
    print(f"TORCH_CUDA_ARCH_LIST={environment['TORCH_CUDA_ARCH_LIST']}", *command, flush=True)
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


def build_environment(capability: tuple[int, int], *, dry_run: bool) -> dict[str, str]:
    """One architecture, and no build is better than one without CUDA kernels.

    A dry run is also for machines that have no toolkit.
    """
    return {
        **os.environ,
        "TORCH_CUDA_ARCH_LIST": ".".join(map(str, capability)),
        "GLS_FUSED_NATIVE": "auto" if dry_run else "1",
        "GLS_FUSED_CUDA": "auto" if dry_run else "1",
    }
