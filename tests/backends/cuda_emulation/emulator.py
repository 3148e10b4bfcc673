"""Runs emulated kernels on torch tensors: in several orders, with bounds, races and bytes watched.

    emulator = Emulator("samples/driver.cpp")
    with emulator.memory() as memory:
        x, z = memory.copy("x", x), memory.poison("z", x.shape, x.dtype)
        emulator.call("add", x, x, z, x.numel())
        z.read()

A tensor becomes a buffer of its exact size. A function of the driver takes buffers, None, ints and
bools; other arguments are wrapped in ctypes' types.
"""

import ctypes
import json
import os
from contextlib import contextmanager
from typing import NamedTuple

import torch
from cuda_emulation import build

# Name, the runtime's Order, seed.
ORDERS = {"forward": (0, 0), "reverse": (1, 0), "random": (2, 1), "warps": (3, 0)}
# Set by test_sanitized.py, which has loaded the sanitizers' runtime before Python.
VARIANT = "sanitized" if os.environ.get("GLS_FUSED_EMULATE_SANITIZED") == "1" else "traced"


class EmulationError(Exception):
    """What a kernel, or its launch, did wrong."""


class Moved(NamedTuple):
    """Bytes of global memory."""

    loaded: int
    stored: int


class Buffer(NamedTuple):
    address: int
    shape: torch.Size
    dtype: torch.dtype

    def read(self):
        tensor = torch.empty(self.shape, dtype=self.dtype)
        ctypes.memmove(tensor.data_ptr(), self.address, tensor.nbytes)
        return tensor


class Memory:
    """Global memory, until the `with` ends."""

    def __init__(self, library):
        self._library = library

    def copy(self, name, tensor, *, writable=False, offset=0):
        """`offset`: elements by which the buffer's address misses a multiple of 256 bytes."""
        tensor = tensor.detach().contiguous()
        address = self._library.emulation_allocate(
            name.encode(), tensor.nbytes, offset * tensor.element_size(), writable
        )
        ctypes.memmove(address, tensor.data_ptr(), tensor.nbytes)
        return Buffer(address, tensor.shape, tensor.dtype)

    def poison(self, name, shape, dtype, *, offset=0):
        """A buffer to write to; every bit is set, which makes a float a NaN."""
        bits = torch.full((torch.Size(shape).numel() * dtype.itemsize,), 255, dtype=torch.uint8)
        return self.copy(name, bits.view(dtype).view(shape), writable=True, offset=offset)


class Emulator:
    """A driver, by its path in this folder, and the files of csrc/cuda that it calls."""

    def __init__(self, driver, launchers=(), variant=VARIANT):
        sources = [build.HERE / driver, *(build.ROOT / "csrc" / "cuda" / x for x in launchers)]
        self._library = ctypes.CDLL(str(build.build_library(sources, variant)))
        self._library.emulation_allocate.restype = ctypes.c_void_p
        self._library.emulation_allocate.argtypes = [
            ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_bool,
        ]  # fmt: skip
        self._library.emulation_traffic.restype = ctypes.c_char_p

    @contextmanager
    def memory(self):
        try:
            yield Memory(self._library)
        finally:
            self._library.emulation_release_all()

    @contextmanager
    def order(self, name):
        self._library.emulation_set_order(*ORDERS[name])
        try:
            yield
        finally:
            self._library.emulation_set_order(*ORDERS["forward"])

    def call(self, function, *arguments):
        entry = getattr(self._library, function)
        entry.restype = ctypes.c_char_p
        if (message := entry(*map(to_ctypes, arguments))) is not None:
            raise EmulationError(message.decode())

    @contextmanager
    def traffic(self):
        """Yields a dict that is filled at the end: {kernel: {buffer: Moved}}."""
        moved = {}
        self._library.emulation_reset_traffic()
        yield moved
        for entry in json.loads(self._library.emulation_traffic()):
            buffers = moved.setdefault(entry["kernel"], {})
            buffers[entry["buffer"]] = Moved(entry["loaded"], entry["stored"])

    def run_in_every_order(self, run):
        """The buffers that `run(memory)` returns, as tensors; the same bits in every order."""
        first = None
        for name in ORDERS:
            with self.order(name), self.memory() as memory:
                found = tuple(buffer.read() for buffer in run(memory))
            first = first or found
            for index, (a, b) in enumerate(zip(first, found, strict=True)):
                same = torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
                assert same, f"result {index} depends on the order of threads ({name})"
        return first


def to_ctypes(argument):
    match argument:
        case Buffer():
            return ctypes.c_void_p(argument.address)
        case None:
            return ctypes.c_void_p()
        case bool():
            return ctypes.c_bool(argument)
        case int():
            return ctypes.c_int64(argument)
        case float():
            return ctypes.c_double(argument)
    return argument
