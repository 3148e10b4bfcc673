"""What nvcc made of the CUDA kernels, read by the tools that Triton's package carries."""

import dataclasses
import re
import subprocess
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclasses.dataclass(frozen=True)
class Resources:
    """Per thread, but for shared memory, in bytes, which is a block's."""

    registers: int
    stack: int
    local: int
    shared: int


def read_resources(file, architecture=None):
    """Resources by architecture and kernel, "update_flat_kernel<float, true, false>"."""
    options = ["-arch", architecture] if architecture else []
    found, target = {}, architecture
    for line in run("cuobjdump", *options, "--dump-resource-usage", file).splitlines():
        if match := re.match(r"arch = (\w+)", line):
            target = match[1]
        elif match := re.match(r" Function (\w+):", line):
            name = match[1]
        elif " REG:" in line:
            numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            found.setdefault(target, {})[name] = Resources(
                *(numbers[key] for key in ("REG", "STACK", "LOCAL", "SHARED"))
            )
    return {target: _demangled(kernels) for target, kernels in found.items()}


def read_accesses(file, architecture, folder):
    """By kernel: how often each access of each width stands in it, {"LDG 128": 12, "STL 32": 1}."""
    run("cuobjdump", "-arch", architecture, "-xelf", "all", Path(file).resolve(), cwd=folder)
    found = {}
    for cubin in sorted(Path(folder).glob("*.cubin")):
        name = None
        for line in run("nvdisasm", "-c", cubin).splitlines():
            if match := re.match(r"\.text\.(\w+):", line):
                name = match[1]
                found[name] = {}
            elif match := re.search(r"\b(LDG|STG|LDL|STL)\.?(\S*)", line):
                width = re.search(r"\b(8|16|64|128)\b|\.[US](8|16)\b", match[2])
                bits = next(filter(None, width.groups())) if width else "32"
                key = f"{match[1]} {bits}"
                found[name][key] = found[name].get(key, 0) + 1
    return _demangled(found)


def run(tool, *arguments, cwd=None):
    return subprocess.run(
        [TOOLS / tool, *arguments], check=True, capture_output=True, text=True, cwd=cwd
    ).stdout


def _demangled(kernels):
    names = subprocess.run(
        ["c++filt", *kernels], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return dict(zip((_short(name) for name in names), kernels.values(), strict=True))


def _short(name):
    """Without what all have in common, and the arguments."""
    name = name.replace("gls_fused::cuda::", "").removeprefix("void ")
    return name[: name.index("(")]
