"""Builds gls_fused._C and its kernels from csrc/; what needs no decision is in pyproject.toml.

GLS_FUSED_NATIVE=auto  the default: build it; if that fails, install without it and record why
GLS_FUSED_NATIVE=0     install without it
GLS_FUSED_NATIVE=1     a failure to build it is an error
GLS_FUSED_CUDA=auto    the default: build its CUDA kernels too; if that fails, record why
GLS_FUSED_CUDA=0       leave them out
GLS_FUSED_CUDA=1       a failure to build them is an error
GLS_FUSED_WHEEL=1      make a wheel whose version names this release of torch, which it requires
GLS_FUSED_SANITIZE=1   build it for AddressSanitizer and UndefinedBehaviorSanitizer, without CUDA
TORCH_CUDA_ARCH_LIST   architectures of the CUDA kernels, "9.0;12.0+PTX"; MAX_JOBS as torch has it
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

import setuptools


def read_mode(name: str) -> str:
    """The value of an environment variable that says whether to build something."""
    mode = os.environ.get(name, "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"gls_fused: error: {name} must be auto, 0 or 1, got {mode!r}")
    return mode


NATIVE, CUDA = read_mode("GLS_FUSED_NATIVE"), read_mode("GLS_FUSED_CUDA")
SANITIZE = os.environ.get("GLS_FUSED_SANITIZE") == "1"
WHEEL = os.environ.get("GLS_FUSED_WHEEL") == "1"
if NATIVE == "0" and CUDA == "1":
    raise SystemExit("gls_fused: error: GLS_FUSED_CUDA=1 needs GLS_FUSED_NATIVE auto or 1, got '0'")

if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"gls_fused: error: building needs setuptools>=77, got {setuptools.__version__}; "
        "run `pip install 'setuptools>=77'` first, or install without --no-build-isolation"
    )

try:
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
except ImportError as error:
    raise SystemExit(
        f"gls_fused: error: building needs torch, which cannot be imported ({error}); "
        "run `pip install 'torch>=2.9,<3'` first, or install without --no-build-isolation"
    ) from None

TORCH_RELEASE = torch.__version__.split("+")[0]

# No -std: BuildExtension adds the one that torch's headers need. No debug information: Python's
# own -g makes the library many times larger. -fopenmp: at::parallel_for is a template in torch's
# headers, and runs on one thread in code that is compiled without it. -fno-math-errno: nobody reads
# errno after a square root, and vectors of them leave none.
CXX_FLAGS = ["-O3", "-g0", "-fno-math-errno"] + (["-fopenmp"] if sys.platform == "linux" else [])
if SANITIZE:
    # torch's own libraries carry no type information for `vptr`.
    CXX_FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
LINK_FLAGS = [flag for flag in CXX_FLAGS if flag == "-fopenmp" or "sanitize" in flag]

CUDA_NAME = "gls_fused._cuda"
# Those that nvcc knows, with code for what comes after the last.
CUDA_ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")
CUDA_HEADERS = ("cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h")


class Toolkit:
    """The CUDA toolkit, which needs no GPU.

    Raises:
        RuntimeError: there is none that fits this torch; says what to install.
    """

    def __init__(self) -> None:
        wanted = torch.version.cuda
        if wanted is None:
            raise RuntimeError(
                f"torch {torch.__version__} is built without CUDA; install a build of torch for "
                "CUDA and a CUDA toolkit of the same major version"
            )
        home = cpp_extension.CUDA_HOME
        nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
        if nvcc is None:
            raise RuntimeError(
                f"no CUDA toolkit: nvcc not found in {home or 'PATH'}; install CUDA {wanted} or "
                "set CUDA_HOME"
            )
        found = re.search(r"release (\d+\.\d+)", self._ask(nvcc, "--version"))
        self.version = found.group(1) if found else "unknown"
        if self.version.split(".")[0] != wanted.split(".")[0]:
            raise RuntimeError(
                f"{nvcc} is of CUDA {self.version} and torch of CUDA {wanted}: the major versions "
                f"must be equal; install CUDA {wanted} or set CUDA_HOME"
            )
        # nvcc itself may be a link or a script elsewhere.
        top = re.search(r"#\$ TOP=(.+)", self._ask(nvcc, "--dryrun", "none.cu"))
        self.root = Path(top.group(1)).resolve() if top else Path(nvcc).resolve().parents[1]
        self.include = self.root / "include"
        missing = [name for name in CUDA_HEADERS if not (self.include / name).is_file()]
        if missing:
            raise RuntimeError(
                f"no {missing[0]} in {self.include}; install the CUDA toolkit's headers"
            )
        runtimes = [
            path for lib in ("lib64", "lib") for path in (self.root / lib).glob("libcudart.so*")
        ]
        if not runtimes:
            raise RuntimeError(f"no libcudart.so in {self.root / 'lib64'}; install CUDA's runtime")
        self.runtime = min(runtimes)
        known = set(re.findall(r"compute_(\d+)", self._ask(nvcc, "--list-gpu-arch")))
        self.architectures = [a for a in CUDA_ARCHITECTURES if a.replace(".", "") in known]

    @staticmethod
    def _ask(nvcc: str, *arguments: str) -> str:
        done = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr


def find_toolkit() -> tuple[Toolkit | None, str | None]:
    """The toolkit to build with, or why there is to be no CUDA kernel."""
    if NATIVE == "0":
        return None, "they need the native extension, which was left out (GLS_FUSED_NATIVE=0)"
    if CUDA == "0":
        return None, "they were left out at install time (GLS_FUSED_CUDA=0)"
    if SANITIZE:
        return None, "they are left out of a sanitized build (GLS_FUSED_SANITIZE=1)"
    try:
        return Toolkit(), None
    except RuntimeError as error:
        return None, str(error)


class BuildNative(BuildExtension):
    """Builds the extension as GLS_FUSED_NATIVE and GLS_FUSED_CUDA ask.

    Writes gls_fused/_build_info.py.
    """

    def run(self) -> None:
        if CUDA == "1" and TOOLKIT is None:
            raise SystemExit(f"gls_fused: error: no CUDA kernels: {NO_TOOLKIT}")
        failure = None
        self.cuda_failure, self.cuda_architectures = NO_TOOLKIT, []
        # setuptools clears `inplace` while it builds, and leaves it so where that fails.
        inplace = self.inplace
        if NATIVE == "0":
            failure = "it was left out at install time (GLS_FUSED_NATIVE=0)"
        else:
            try:
                super().run()
            # Whatever it was that failed, the package works without the extension.
            except Exception as error:
                self.cuda_failure = "they need the native extension, which was not built"
                failure = " ".join(f"{error or type(error).__name__}".split())
                if "1" in (NATIVE, CUDA):
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
        cuda = [extension for extension in self.extensions if extension.name == CUDA_NAME]
        self.extensions = [extension for extension in self.extensions if extension not in cuda]
        try:
            super().build_extensions()
        except RuntimeError as error:
            # torch's "Error compiling objects for extension": the errors themselves went to stdout.
            raise RuntimeError(
                f"{error}; GLS_FUSED_NATIVE=1 shows the compiler's output"
            ) from error
        if cuda:
            self.build_cuda(cuda)

    def build_cuda(self, cuda: list[setuptools.Extension]) -> None:
        """After the rest, which is of use without it."""
        rest, self.extensions = self.extensions, cuda
        listed = ";".join(TOOLKIT.architectures) + "+PTX"
        os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or listed
        cpp_extension.CUDA_HOME = str(TOOLKIT.root)
        try:
            super().build_extensions()
        except Exception as error:
            self.extensions = rest
            self.cuda_failure = " ".join(f"{error or type(error).__name__}".split())
            if CUDA == "1":
                raise SystemExit(
                    f"gls_fused: error: no CUDA kernels: {self.cuda_failure}"
                ) from error
            print(
                f"gls_fused: warning: installing without CUDA kernels: {self.cuda_failure}",
                file=sys.stderr,
            )
            return
        self.extensions = rest + cuda
        flags = " ".join(cpp_extension._get_cuda_arch_flags())
        self.cuda_architectures = re.findall(r",code=(\w+)", flags)

    def record(self, failure: str | None, package: Path) -> None:
        """Makes `package` say how the build ended, whatever an earlier build left there."""
        names = {CUDA_NAME} if self.cuda_failure else set()
        if failure:
            names |= {extension.name for extension in EXTENSIONS}
        # Later commands must not look for, nor pick up, a library.
        for name in names:
            (package / Path(self.get_ext_filename(name)).name).unlink(missing_ok=True)
        self.extensions = [e for e in self.extensions if e.name not in names]
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.py").write_text(
            '"""Written by setup.py; _build_info.pyi says what is in it."""\n\n'
            f"native_failure = {failure!r}\n"
            f"torch_version = {TORCH_RELEASE!r}\n"
            f"cuda_failure = {self.cuda_failure!r}\n"
            f"cuda_version = {None if self.cuda_failure else TOOLKIT.version!r}\n"
            f"cuda_architectures = {self.cuda_architectures!r}\n"
        )


class TiedDistribution(setuptools.Distribution):
    """A distribution whose version names the torch it is built against, and which requires that."""

    def parse_config_files(self, *args: object, **kwargs: object) -> None:
        super().parse_config_files(*args, **kwargs)
        # pyproject.toml has just said what holds where pip builds the package for one's own torch.
        self.metadata.version += f"+torch{TORCH_RELEASE}"
        others = [each for each in self.install_requires if not re.match(r"torch\b", each)]
        needed = [f"torch=={TORCH_RELEASE}", *others]
        self.install_requires = self.metadata.install_requires = needed


def cpu_kernels(capability: str, flags: list[str]) -> CppExtension:
    """csrc/cpu compiled for one of torch's CPU capabilities; the package loads the right one."""
    return CppExtension(
        f"gls_fused._cpu_{capability.lower()}",
        sources=sorted(glob("csrc/cpu/*.cpp")),
        depends=sorted([*glob("csrc/*.h"), *glob("csrc/cpu/*.h")]),
        define_macros=[("CPU_CAPABILITY", capability), (f"CPU_CAPABILITY_{capability}", None)],
        extra_compile_args={"cxx": CXX_FLAGS + flags},
        extra_link_args=LINK_FLAGS,
    )


def cuda_kernels(toolkit: Toolkit) -> CppExtension:
    """csrc/cuda: nvcc compiles the kernels, which include nothing of torch, g++ their launchers."""
    return CppExtension(
        CUDA_NAME,
        sources=sorted([*glob("csrc/cuda/*.cpp"), *glob("csrc/cuda/*.cu")]),
        depends=sorted([*glob("csrc/*.h"), *glob("csrc/cuda/*.h"), *glob("csrc/cuda/*.cuh")]),
        include_dirs=[str(toolkit.include)],
        libraries=["c10_cuda", "torch_cuda"],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": ["-O3"]},
        extra_link_args=[*LINK_FLAGS, str(toolkit.runtime)],
    )


AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw"]
CAPABILITIES = {"DEFAULT": []}
if platform.machine() in ("x86_64", "AMD64"):
    CAPABILITIES |= {"AVX2": AVX2, "AVX512": AVX512}

TOOLKIT, NO_TOOLKIT = find_toolkit()
EXTENSIONS = [
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
    *([cuda_kernels(TOOLKIT)] if TOOLKIT else []),
]
setuptools.setup(
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildNative},
    distclass=TiedDistribution if WHEEL else setuptools.Distribution,
)
