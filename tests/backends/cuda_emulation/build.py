"""Compiles a driver, the kernels it includes and the runtime into a library, once per content.

A library is `traced` (every access of a kernel goes through the runtime: bounds, races, bytes) or
`sanitized` (AddressSanitizer and UndefinedBehaviorSanitizer, whose runtime must be loaded before
Python).
"""

import hashlib
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
BUILD = ROOT / "build" / "cuda_emulation"
COMPILER = os.environ.get("CXX") or shutil.which("g++")

# Floats are computed as written, without the host's own contractions. -fno-extern-tls-init and
# -fno-gnu-unique: shared memory is plain thread-local memory of this library alone.
FLAGS = [
    "-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique",
    "-fno-extern-tls-init", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-DGLS_FUSED_EMULATED",
    "-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{HERE / 'include'}",
]  # fmt: skip
SANITIZE = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
]
TRACE = ["-fsanitize=thread,alignment,bounds", "--param", "tsan-instrument-func-entry-exit=0"]
VARIANTS = {"traced": (["-O2"], TRACE), "sanitized": (SANITIZE, SANITIZE)}  # of runtime, of kernels


def build_library(sources: list[Path], variant: str) -> Path:
    return link(sources, variant, ".so", ["-shared", "-Wl,-Bsymbolic"])


def build_program(sources: list[Path], variant: str) -> Path:
    return link(sources, variant, ".program", ["-rdynamic"])


def link(sources: list[Path], variant: str, suffix: str, flags: list[str]) -> Path:
    runtime_flags, kernel_flags = VARIANTS[variant]
    runtime = [compile_object(s, tuple(runtime_flags)) for s in sorted(HERE.glob("runtime/*.cpp"))]
    kernels = [compile_object(source, tuple(kernel_flags)) for source in sources]
    target = BUILD / f"{sources[0].stem}-{digest(*runtime, *kernels)}{suffix}"
    if not target.exists():
        shared = assemble_dynamic_shared(kernels, target.with_suffix(".s"))
        run_to(target, [COMPILER, *flags, *runtime_flags, *runtime, *kernels, shared])
    return target


@cache
def compile_object(source: Path, flags: tuple[str, ...]) -> Path:
    BUILD.mkdir(parents=True, exist_ok=True)
    command = [COMPILER, *FLAGS, *flags, f"-I{source.parent}", "-x", "c++", "-"]
    # The name is for messages and for __FILE__.
    text = f'#line 1 "{source}"\n' + rewrite_launches(source.read_text())
    preprocessed = run([*command, "-E"], text)
    target = BUILD / f"{source.stem}-{digest(preprocessed, command)}.o"
    if not target.exists():
        run_to(target, [*command, "-c"], text)
    return target


def rewrite_launches(text: str) -> str:
    """kernel<<<grid, block, shared, stream>>>(...) -> launch(kernel, grid, block, ..., ...)."""
    return re.sub(
        r"([\w:]+(?:<[^;{}]*?>)?)\s*<<<([^;{}]*?)>>>\(", r"::cuda_emulation::launch(\1, \2, ", text
    )


def assemble_dynamic_shared(kernels: list[Path], source: Path) -> Path:
    """The one place that every `extern __shared__` array is: what is thread-local and undefined."""
    symbols = run(["readelf", "--syms", "--wide", *kernels])
    names = sorted(set(re.findall(r" TLS +\w+ +\w+ +UND (\S+)", symbols)))
    assembly = ['.section .tbss,"awT",@nobits', ".balign 1024"]
    for name in ["cuda_emulation_dynamic_shared", *names]:
        assembly += [f".globl {name}", f".hidden {name}", f".type {name}, @object", f"{name}:"]
    assembly += [f".zero {227 * 1024}", '.section .note.GNU-stack,"",@progbits', ""]
    source.write_text("\n".join(assembly))
    return source


def run_to(target: Path, command: list, text: str | None = None) -> None:
    """Runs a compiler; whoever else builds the same target meanwhile gets a whole file too."""
    partial = target.with_suffix(f".{os.getpid()}{target.suffix}")
    run([*command, "-o", partial], text)
    partial.replace(target)


def run(command: list, text: str | None = None) -> str:
    done = subprocess.run(command, input=text, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return done.stdout


def digest(*parts: object) -> str:
    return hashlib.sha256("".join(map(str, parts)).encode()).hexdigest()[:16]
