"""Builds gls_fused._C from csrc/; all that needs no decision is in pyproject.toml.

GLS_FUSED_NATIVE=auto  the default: build it; if that fails, install without it and record why
GLS_FUSED_NATIVE=0     install without it
GLS_FUSED_NATIVE=1     a failure to build it is an error
GLS_FUSED_SANITIZE=1   build it for AddressSanitizer and UndefinedBehaviorSanitizer
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from glob import glob
from pathlib import Path

import setuptools

NATIVE = os.environ.get("GLS_FUSED_NATIVE", "auto")
if NATIVE not in ("auto", "0", "1"):
    raise SystemExit(f"gls_fused: error: GLS_FUSED_NATIVE must be auto, 0 or 1, got {NATIVE!r}")

if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"gls_fused: error: building needs setuptools>=77, got {setuptools.__version__}; "
        "run `pip install 'setuptools>=77'` first, or install without --no-build-isolation"
    )

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
except ImportError as error:
    raise SystemExit(
        f"gls_fused: error: building needs torch, which cannot be imported ({error}); "
        "run `pip install 'torch>=2.6,<3'` first, or install without --no-build-isolation"
    ) from None

# No -std: BuildExtension adds the one that torch's headers need. No debug information: Python's
# own -g makes the library many times larger. -fopenmp: at::parallel_for is a template in torch's
# headers, and runs on one thread in code that is compiled without it.
CXX_FLAGS = ["-O3", "-g0"] + (["-fopenmp"] if sys.platform == "linux" else [])
if os.environ.get("GLS_FUSED_SANITIZE") == "1":
    # torch's own libraries carry no type information for `vptr`.
    CXX_FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
LINK_FLAGS = [flag for flag in CXX_FLAGS if flag == "-fopenmp" or "sanitize" in flag]


class BuildNative(BuildExtension):
    """Builds the extension as GLS_FUSED_NATIVE asks, and writes gls_fused/_build_info.py."""

    def run(self) -> None:
        failure = None
        # setuptools clears `inplace` while it builds, and leaves it so where that fails.
        inplace = self.inplace
        if NATIVE == "0":
            failure = "it was left out at install time (GLS_FUSED_NATIVE=0)"
        else:
            try:
                super().run()
            # Whatever it was that failed, the package works without the extension.
            except Exception as error:
                failure = " ".join(f"{error or type(error).__name__}".split())
                if NATIVE == "1":
                    raise SystemExit(
                        f"gls_fused: error: the native extension was not built: {failure}"
                    ) from error
                print(
                    f"gls_fused: warning: installing without the native extension: {failure}",
                    file=sys.stderr,
                )
        built = Path(self.build_lib, "gls_fused")
        source = Path(self.get_finalized_command("build_py").get_package_dir("gls_fused"))
        self.record(failure, source if inplace else built)

    def build_extensions(self) -> None:
        # Such as "ccache g++".
        compiler = get_cxx_compiler().partition(" ")[0]
        if shutil.which(compiler) is None:
            raise RuntimeError(f"no C++ compiler: {compiler!r} not found; install one or set CXX")
        try:
            super().build_extensions()
        except RuntimeError as error:
            # torch's "Error compiling objects for extension": the errors themselves went to stdout.
            raise RuntimeError(
                f"{error}; GLS_FUSED_NATIVE=1 shows the compiler's output"
            ) from error

    def record(self, failure: str | None, package: Path) -> None:
        """Makes `package` say how the build ended, whatever an earlier build left there."""
        if failure:
            # Later commands must not look for, nor pick up, a library.
            for extension in self.extensions:
                (package / Path(self.get_ext_filename(extension.name)).name).unlink(missing_ok=True)
            self.extensions = []
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.py").write_text(
            '"""Written by setup.py; _build_info.pyi says what is in it."""\n\n'
            f"native_failure = {failure!r}\n"
            f"torch_version = {torch.__version__.split('+')[0]!r}\n"
        )


def cpu_kernels(capability: str, flags: list[str]) -> CppExtension:
    """csrc/cpu compiled for one of torch's CPU capabilities; the package loads the right one."""
    return CppExtension(
        f"gls_fused._cpu_{capability.lower()}",
        sources=sorted(glob("csrc/cpu/*.cpp")),
        depends=sorted(glob("csrc/cpu/*.h")),
        define_macros=[("CPU_CAPABILITY", capability), (f"CPU_CAPABILITY_{capability}", None)],
        extra_compile_args={"cxx": CXX_FLAGS + flags},
        extra_link_args=LINK_FLAGS,
    )


AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw"]
CAPABILITIES = {"DEFAULT": []}
if platform.machine() in ("x86_64", "AMD64"):
    CAPABILITIES |= {"AVX2": AVX2, "AVX512": AVX512}

setuptools.setup(
    ext_modules=[
        CppExtension(
            "gls_fused._C",
            sources=sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            define_macros=[
                ("GLS_FUSED_CXX_FLAGS", f'"{" ".join(CXX_FLAGS)}"'),
                ("GLS_FUSED_CPU_CAPABILITIES", ",".join(f'"{name}"' for name in CAPABILITIES)),
            ],
            extra_compile_args={"cxx": CXX_FLAGS},
            extra_link_args=LINK_FLAGS,
        ),
        *(cpu_kernels(name, flags) for name, flags in CAPABILITIES.items()),
    ],
    cmdclass={"build_ext": BuildNative},
)
