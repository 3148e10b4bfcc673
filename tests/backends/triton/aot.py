"""Compiling what the launchers launch, for a GPU that is not there, and reading the machine code.

The launchers run on CPU tensors with `launch` replaced by a recorder, so every kernel is compiled
with the constants, the options and the divisibility that a real launch of that shape has.
"""

import contextlib
import dataclasses
import re
import subprocess
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from gls_fused.backends.triton import (
    blend,
    commit,
    core,
    measure,
    rounding,
    rows,
    sketch,
    subspace,
    symmetric,
    update_plan,
)

MODULES = (
    *(rows, sketch, blend, commit, core, measure, rounding),
    *(subspace, symmetric, update_plan),
)
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that one program may have: CUDA C++ Programming Guide, table of compute
# capabilities, "maximum amount of shared memory per thread block"; LDS of a CU on gfx942.
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel with the arguments of one launch."""

    kernel: object
    arguments: dict

    @property
    def name(self):
        return self.kernel.__name__

    @property
    def constants(self):
        """Constants and options, by name."""
        fixed = {p.name for p in self.kernel.params if p.is_constexpr}
        names = {p.name for p in self.kernel.params}
        return {k: v for k, v in self.arguments.items() if k in fixed or k not in names}

    @property
    def key(self):
        """What tells two machine codes apart."""
        return self.name, *(
            (name, _trait(name, value, self.constants)) for name, value in self.arguments.items()
        )


@dataclasses.dataclass(frozen=True)
class Code:
    """What the compiler made.

    Attributes:
        registers: per thread.
        spills: instructions that load from or store to local memory.
        instructions: all of them; 0 if not counted.
        widths: bits of every global load and store in the code, by mnemonic.
        tensor_cores: whether products of float32 or less are made on them; None if not looked at.
    """

    registers: int
    shared: int
    spills: int
    instructions: int
    widths: dict
    tensor_cores: bool | None


@contextlib.contextmanager
def recorded(monkeypatch):
    """The launches made inside, none of which runs."""
    launches = []

    def record(kernel, programs, device, **arguments):
        if all(programs):
            launches.append(Launch(kernel, arguments))

    with monkeypatch.context() as patch:
        for module in MODULES:
            patch.setattr(module, "launch", record)
        yield launches


def specialize(backend, value):
    """What Triton knows of an argument when it compiles: its type, and whether 16 divides it."""
    try:
        from triton._C.libtriton import native_specialize_impl
    except ImportError:  # triton 3.5
        from triton.runtime.jit import create_specialize_impl

        return create_specialize_impl(backend.get_arg_specialization)(value)
    return native_specialize_impl(type(backend), value, False, True, True)


def compile_launch(launch, target):
    """The compiled kernel, specialised as Triton's own launcher does."""
    backend = make_backend(target)
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            kind, trait = "constexpr", None
        else:
            kind, trait = specialize(backend, value)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(index,)] = value
        elif isinstance(trait, str):
            attributes[(index,)] = backend.parse_attr(trait)
    options = {k: v for k, v in launch.arguments.items() if k not in signature}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options)


def read_cuda(compiled, folder):
    """Registers, shared memory, spills and access widths of a cubin."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = _run("cuobjdump", "--dump-resource-usage", cubin)
    (registers,) = re.findall(r"REG:(\d+)", usage)
    code = _run("nvdisasm", "-c", cubin)
    widths = {}
    for name, kind in re.findall(r"\b(LDG|LDGSTS|STG)\.E(\S*)", code):
        found = re.search(r"\.(?:ENL2\.)?(8|16|64|128|256)\b|\.[US](8|16)\b", kind)
        bits = int(next(filter(None, found.groups()))) if found else 32
        widths.setdefault(name, []).append(bits)
    return Code(
        registers=int(registers),
        shared=compiled.metadata.shared,
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        instructions=len(re.findall(r"/\*[0-9a-f]{4,}\*/", code)),
        widths=widths,
        # HMMA up to sm_90, with wgmma HGMMA; UTCHMMA is sm_100's.
        tensor_cores=bool(re.search(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b", code)),
    )


def read_hip(compiled):
    """The same from the assembly's own notes, where they say it."""
    notes = compiled.asm["amdgcn"]

    def note(key):
        return sum(int(value) for value in re.findall(rf"\.{key}:\s+(\d+)", notes))

    return Code(
        registers=note("vgpr_count"),
        shared=compiled.metadata.shared,
        spills=note("vgpr_spill_count") + note("sgpr_spill_count"),
        instructions=0,
        widths={},
        tensor_cores=None,
    )


def _trait(name, value, constants):
    if name in constants:
        return str(value)
    if hasattr(value, "data_ptr"):
        return value.dtype, value.data_ptr() % 16
    return value == 1, value % 16 == 0


def _run(tool, *arguments):
    return subprocess.run(
        [TOOLS / tool, *arguments], check=True, capture_output=True, text=True
    ).stdout
