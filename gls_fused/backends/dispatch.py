"""Which implementation runs: backends are modules with the same functions and signatures."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterable
from types import ModuleType

import torch

from gls_fused.backends.choices import CHOICES

# In the order in which `auto` prefers them.
_MODULES = {
    "triton": "gls_fused.backends.triton",
    "native": "gls_fused.backends.native",
    "reference": "gls_fused.reference",
}
# The devices a backend can have kernels for, where that is not every device torch has; `native` has
# those for CUDA where they were built. Triton's interpreter also takes tensors on the CPU, but only
# who asks for it by name gets that.
_DEVICES = {"triton": {"cuda"}, "native": {"cpu", "cuda"}}
# What `auto` is on CUDA devices where both of these can be used; not a name for users.
_MIXED, _MIXED_OF = "mixed", ("triton", "native")


def available_backends() -> dict[str, str | None]:
    """Every backend's reason for being unavailable here, or None where it can be used."""
    errors = {name: _load(name)[1] for name in _MODULES}
    return {name: None if error is None else str(error) for name, error in errors.items()}


def resolve_backend(name: str, devices: Iterable[str]) -> ModuleType:
    """The module behind a backend's name; `auto` is the first that can be used.

    On CUDA devices where both "triton" and "native" can be, it is `mixed`, whose ops are of either.

    Args:
        devices: types of the devices that the parameters are on.
    Raises:
        ValueError: no such backend.
        RuntimeError: the backend is not available, with the build's or import's error as its cause,
            or has no kernels for one of the devices; says what to install where that would help.
    """
    if name not in ("auto", _MIXED, *_MODULES):
        raise ValueError(f"backend: expected auto, {', '.join(_MODULES)}, got {name!r}")
    needed = set(devices)
    if name == _MIXED:
        for part in _MIXED_OF:
            resolve_backend(part, needed)
        return importlib.import_module("gls_fused.backends.mixed")
    if name == "auto":
        if needed == {"cuda"} and all(_is_usable(part, needed) for part in _MIXED_OF):
            return resolve_backend(_MIXED, needed)
        # Without a layer there is nothing to be fast at.
        known = [name for name in _MODULES if needed or name != "triton"]
        name = next(name for name in known if _is_usable(name, needed))
    module, error = _load(name)
    if module is None:
        raise RuntimeError(f"backend {name!r} is not available: {error}") from error
    missing = _missing(name, module, needed)
    if name == "triton" and _interprets():
        missing -= {"cpu"}
    if missing:
        why = module.cuda_failure if (name, min(missing)) == ("native", "cuda") else None
        raise RuntimeError(
            f"backend {name!r} has no kernels for {min(missing)}, use 'auto'"
            + (f"; they were not built: {why}" if why else "")
        )
    return module


def build_info() -> dict[str, object]:
    """How the native backend was built.

        torch: the release it was compiled against, such as "2.14.1"
        compiler, flags: what compiled its CPU kernels, and how
        cpu_capabilities: torch's names of those that they were compiled for, such as "AVX512"
        running: the one of them that it uses
        cuda: the version of the toolkit its CUDA kernels were built with; None without them
        cuda_architectures: such as "sm_90"
        cuda_failure: why there are no CUDA kernels; None where there are

    Raises:
        RuntimeError: it is not available, with the build's or import's error as its cause.
    """
    native = resolve_backend("native", ())
    from gls_fused import _C, _build_info

    failure = native.cuda_failure
    return {
        **_C.build_info(),
        "running": native.cpu_capability,
        "cuda": None if failure else _build_info.cuda_version,
        "cuda_architectures": [] if failure else _build_info.cuda_architectures,
        "cuda_failure": failure,
    }


def backend_name(backend: ModuleType) -> str:
    """The name under which `resolve_backend` gives this module."""
    return backend.__name__.rpartition(".")[2]


def describe_backend(name: str) -> str:
    """As users read the name of a layer's backend: of `mixed`, which ops are whose.

    Such as "triton, native for sketch_rows and invert_cores".
    """
    if name != _MIXED:
        return name
    ops: dict[str, list[str]] = {part: [] for part in _MIXED_OF}
    for op, (part, _) in CHOICES.items():
        ops[part].append(op)
    more, fewer = sorted(_MIXED_OF, key=lambda part: -len(ops[part]))
    return f"{more}, {fewer} for {' and '.join(ops[fewer])}" if ops[fewer] else more


def _is_usable(name: str, needed: set[str]) -> bool:
    module = _load(name)[0]
    return module is not None and not _missing(name, module, needed)


def _missing(name: str, module: ModuleType, needed: set[str]) -> set[str]:
    """The devices of `needed` that a backend has no kernels for."""
    missing = needed - _DEVICES.get(name, needed)
    if name == "native" and module.cuda_failure is not None:
        missing |= needed & {"cuda"}
    return missing


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, Exception | None]:
    try:
        if name == "triton" and not (torch.cuda.is_available() or _interprets()):
            raise ImportError(
                "there is no CUDA device; on a CPU it runs only in Triton's interpreter, for tests "
                "(TRITON_INTERPRET=1, set before Python starts)"
            )
        return importlib.import_module(_MODULES[name]), None
    except (ImportError, OSError) as error:
        return None, error


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
