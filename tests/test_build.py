"""Installing gls_fused: with and without a compiler, and what a user is told when it goes wrong."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from runpy import run_path

import pytest
import torch
from tolerances import TRAJECTORY, assert_near

ROOT = Path(__file__).parents[1]
NO_COMPILER = {"CC": "/nonexistent", "CXX": "/nonexistent"}


def run_python(*arguments, cwd=ROOT, python=sys.executable, **environment):
    return subprocess.run(
        [python, *arguments],
        cwd=cwd,
        env={
            **os.environ,
            "GLS_FUSED_NATIVE": "auto",
            "GLS_FUSED_CUDA": "0",
            **environment,
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def build_in_place(source, **environment):
    return run_python("setup.py", "build_ext", "--inplace", cwd=source, **environment)


def build_wheel(source, destination, **environment):
    command = ["-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", destination]
    return run_python(*command, source, **environment)


def record_of(package):
    return run_path(str(package / "_build_info.py"))


def native_failure(package):
    return record_of(package)["native_failure"]


@pytest.fixture
def source(tmp_path):
    """A copy of what a build reads, without what an earlier build left."""
    copy = tmp_path / "source"
    ignored = shutil.ignore_patterns("*.so", "_build_info.py", "__pycache__")
    for name in ("gls_fused", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    return copy


@pytest.mark.parametrize("name", ["GLS_FUSED_NATIVE", "GLS_FUSED_CUDA"])
def test_unknown_mode_is_one_clear_line(name):
    done = run_python("setup.py", "--name", **{name: "bad"})
    assert done.returncode == 1
    assert done.stderr == f"gls_fused: error: {name} must be auto, 0 or 1, got 'bad'\n"


def test_cuda_without_native_is_one_clear_line():
    done = run_python("setup.py", "--name", GLS_FUSED_NATIVE="0", GLS_FUSED_CUDA="1")
    assert done.returncode == 1
    assert done.stderr == (
        "gls_fused: error: GLS_FUSED_CUDA=1 needs GLS_FUSED_NATIVE auto or 1, got '0'\n"
    )


def test_missing_torch_is_one_clear_line():
    without_torch = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--name'];"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    done = run_python("-c", without_torch)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "run `pip install 'torch>=2.9,<3'` first" in done.stderr


def test_source_tree_that_was_never_built_says_so(source):
    # Without the finder of the editable install, which knows what was built elsewhere.
    program = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]; "
        "import gls_fused; print(gls_fused.available_backends()['native'])"
    )
    done = run_python("-c", program, cwd=source, PYTHONPATH=str(source))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("not built: this is a source tree; run `pip install")


def test_build_info_names_this_torch():
    native = pytest.importorskip("gls_fused._C", reason="the native extension is not built")
    info = native.build_info()
    assert info["torch"] == torch.__version__.split("+")[0]
    assert re.match(r"(gcc|clang) \d+", info["compiler"])
    assert "-O3" in info["flags"]
    libraries = (path.name.split(".")[0] for path in (ROOT / "gls_fused").glob("_cpu_*.so"))
    assert {f"_cpu_{name.lower()}" for name in info["cpu_capabilities"]} == set(libraries)
    assert native_failure(ROOT / "gls_fused") is None


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_build_info_names_the_running_kernels(capability):
    if capability == "avx512" and not torch.cpu._is_avx512_supported():
        pytest.skip("this CPU has no AVX-512")
    native = pytest.importorskip("gls_fused._C", reason="the native extension is not built")
    report = "import gls_fused, json; print(json.dumps(gls_fused.build_info()))"
    done = run_python("-c", report, ATEN_CPU_CAPABILITY=capability)
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    running, record = info.pop("running"), record_of(ROOT / "gls_fused")
    for key in ("version", "architectures", "failure"):
        assert info.pop("cuda" if key == "version" else f"cuda_{key}") == record[f"cuda_{key}"]
    assert info == native.build_info()
    assert running in info["cpu_capabilities"]
    # torch takes less where the CPU has less.
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert running == capability.upper()


def test_library_for_another_torch_is_refused(monkeypatch):
    record = pytest.importorskip("gls_fused._build_info", reason="it was never built")
    monkeypatch.setattr(record, "native_failure", None)
    monkeypatch.setattr(record, "torch_version", "1.0.0")
    running = torch.__version__.split("+")[0]
    said = f"built against torch 1.0.0, and {running} is running; install gls_fused's wheel for "
    with pytest.raises(ImportError, match=re.escape(said + f"torch {running}, or")):
        run_path(str(ROOT / "gls_fused" / "backends" / "native.py"))


def test_build_requirements_are_listed_alike():
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = (ROOT / "requirements-build.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == (
        pyproject["build-system"]["requires"]
    )


def test_source_archive_has_all_sources_whatever_is_built_here(source, tmp_path):
    for name in ("MANIFEST.in", "constraints.txt", "requirements-build.txt"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "examples", source / "examples")
    made = run_python("setup.py", "-q", "sdist", "-d", str(tmp_path), cwd=source)
    assert made.returncode == 0, made.stdout + made.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    wanted = [*source.glob("csrc/**/*.*"), *source.glob("examples/*.py"), source / "MANIFEST.in"]
    assert {str(path.relative_to(source)) for path in wanted} <= names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        (NO_COMPILER, "no C++ compiler: '/nonexistent' not found"),
        ({"GLS_FUSED_NATIVE": "0"}, "GLS_FUSED_NATIVE=0"),
    ],
    ids=["no compiler", "left out"],
)
def test_wheel_without_extension_works_and_says_why(source, tmp_path, environment, reason):
    # The file of an earlier editable install must not end up in the wheel.
    (source / "gls_fused" / "_build_info.py").write_text("native_failure = None\n")

    done = build_wheel(source, tmp_path, **environment)

    assert done.returncode == 0, done.stdout + done.stderr
    warned = "warning: installing without the native extension: no C++" in done.stdout + done.stderr
    assert warned == (environment is NO_COMPILER)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    assert reason in native_failure(site / "gls_fused")
    assert not list(site.rglob("*.so"))
    assert (site / "gls_fused" / "py.typed").exists()
    imported = run_python(
        "-c", "import gls_fused.reference as r; print(r.__file__)", cwd=site, PYTHONPATH=str(site)
    )
    assert imported.returncode == 0, imported.stderr
    assert Path(imported.stdout.strip()).is_relative_to(site)


TRAINING = """
import copy, json, sys, torch, gls_fused
net = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 5)).double()
batches = torch.randn(10, 64, 20, dtype=torch.float64)
why = gls_fused.available_backends()["native"]
report = {"file": gls_fused.__file__, "why": why, "info": gls_fused.build_info() if not why else {}}
for backend in ("reference", "auto" if why else "native"):
    model = copy.deepcopy(net)
    optimizer = gls_fused.GLS(model)
    for batch in batches:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    report[backend] = torch.cat([p.flatten() for p in model.parameters()]).tolist()
print(json.dumps(report))
"""


@pytest.mark.slow
@pytest.mark.timeout(1500)  # a build of all CPU kernels
def test_wheel_is_used_without_a_compiler(source, tmp_path):
    """By an environment of its own, which has this torch and none of this checkout."""
    if shutil.which("c++") is None or shutil.which("make") is None:
        pytest.skip("needs make and a C++ compiler")
    shutil.copy(ROOT / "Makefile", source)
    made = subprocess.run(
        ["make", "--old-file=setup", "wheel", f"VENV={sys.prefix}"],
        cwd=source,
        env={**os.environ, "GLS_FUSED_CUDA": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    assert made.stdout == f"dist/{wheel.name}\n"
    release = torch.__version__.split("+")[0]
    assert wheel.name.startswith(f"gls_fused-0.1.0+torch{release}-cp")
    with zipfile.ZipFile(wheel) as content:
        metadata = content.read(f"gls_fused-0.1.0+torch{release}.dist-info/METADATA").decode()
    assert re.findall(r"^Requires-Dist: (torch\b.*)", metadata, re.MULTILINE) == [
        f"torch=={release}"
    ]

    venv.create(tmp_path / "fresh")
    python = tmp_path / "fresh" / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "fresh")}))
    # In a folder that is named so, editable packages are not found.
    (site / "torch.pth").write_text(sysconfig.get_path("purelib"))
    bare = {"PATH": "", **NO_COMPILER}

    def train():
        done = run_python("-c", TRAINING, cwd=tmp_path, python=python, **bare)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    # Which finds the torch that the wheel requires.
    installed = run_python("-m", "pip", "--python", python, "install", "--no-index", wheel, **bare)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    report = train()
    assert Path(report["file"]).is_relative_to(site)
    assert report["why"] is None
    assert report["info"]["torch"] == release
    found = {path.name.split(".")[0] for path in (site / "gls_fused").glob("_cpu_*.so")}
    wanted = {"default", "avx2", "avx512"} if platform.machine() == "x86_64" else {"default"}
    assert found == {f"_cpu_{name}" for name in wanted}
    assert_near(*(torch.tensor(report[name]) for name in ("native", "reference")), TRAJECTORY)

    # Another torch than it was built for.
    record = site / "gls_fused" / "_build_info.py"
    record.write_text(record.read_text().replace(f"'{release}'", "'1.0.0'"))
    report = train()
    assert report["why"].startswith("it was built against torch 1.0.0, and ")
    assert report["auto"] == report["reference"]


@pytest.mark.slow
def test_required_extension_that_cannot_be_built_is_an_error(source, tmp_path):
    done = build_wheel(source, tmp_path, GLS_FUSED_NATIVE="1", **NO_COMPILER)
    assert done.returncode != 0
    assert "gls_fused: error: the native extension was not built: no C++" in (
        done.stdout + done.stderr
    )
    assert not list(tmp_path.glob("*.whl"))


@pytest.mark.slow
def test_record_follows_the_last_build(source):
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    package = source / "gls_fused"

    assert build_in_place(source, **NO_COMPILER).returncode == 0
    assert "no C++ compiler" in native_failure(package)

    built = build_in_place(source, GLS_FUSED_NATIVE="1")
    assert built.returncode == 0, built.stdout + built.stderr
    assert native_failure(package) is None
    assert list(package.glob("_C*.so"))

    with open(source / "csrc" / "bindings.cpp", "a") as bindings:
        bindings.write("\n#error broken on purpose\n")
    assert build_in_place(source).returncode == 0
    assert "compil" in native_failure(package).lower()
    assert not list(package.glob("_C*.so"))


# ---- the CUDA toolkit ---------------------------------------------------------------------------


def find_toolkit(changes="pass", **environment):
    """What setup.py finds, and its reason for finding nothing, after `changes` to torch."""
    find = (
        "import runpy, sys, torch, setuptools; from torch.utils import cpp_extension;"
        f"{changes};"
        "setuptools.setup = lambda **_: None; sys.argv = ['setup.py'];"
        "found = runpy.run_path('setup.py'); toolkit = found['TOOLKIT'];"
        "print(toolkit and toolkit.architectures, '|', found['NO_TOOLKIT'])"
    )
    done = run_python("-c", find, **{"GLS_FUSED_CUDA": "auto", **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split(" | ")


@pytest.fixture
def toolkit(tmp_path):
    """Makes a CUDA toolkit of some version, of which only what setup.py looks at is there."""

    def make(version, headers=True, runtime=True):
        (tmp_path / "bin").mkdir()
        (tmp_path / "include").mkdir()
        (tmp_path / "lib64").mkdir()
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.write_text(
            "#!/bin/sh\ncase $1 in\n"
            f"--version) echo 'Cuda compilation tools, release {version}, V{version}.1' ;;\n"
            f"--dryrun) echo '#$ TOP={tmp_path}/bin/..' >&2 ;;\n"
            "*) echo compute_80; echo compute_90 ;;\nesac\n"
        )
        nvcc.chmod(0o755)
        for name in ("cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h") if headers else ():
            (tmp_path / "include" / name).touch()
        if runtime:
            (tmp_path / "lib64" / "libcudart.so").touch()
        return tmp_path

    return make


def at(root):
    return f"torch.version.cuda = '13.0'; cpp_extension.CUDA_HOME = {str(root)!r}"


def test_default_architectures_are_those_nvcc_knows(toolkit):
    assert find_toolkit(at(toolkit("13.2"))) == ["['8.0', '9.0']", "None"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"version": "12.4"},
            "nvcc is of CUDA 12.4 and torch of CUDA 13.0: the major",
        ),
        (
            {"version": "13.0", "headers": False},
            "no cuda_runtime.h in .*install the CUDA toolkit's",
        ),
        (
            {"version": "13.0", "runtime": False},
            "no libcudart.so in .*lib64; install CUDA's runtime",
        ),
    ],
    ids=["major", "header", "runtime"],
)
def test_unfit_toolkit_is_one_clear_line(toolkit, options, reason):
    found, why = find_toolkit(at(toolkit(**options)))
    assert found == "None"
    assert re.search(reason, why), why
    assert "\n" not in why


def test_missing_toolkit_and_torch_without_cuda_say_what_to_install(tmp_path):
    assert find_toolkit(at(tmp_path)) == [
        "None",
        f"no CUDA toolkit: nvcc not found in {tmp_path}; install CUDA 13.0 or set CUDA_HOME",
    ]
    found, why = find_toolkit("torch.version.cuda = None")
    assert (found, "install a build of torch for CUDA" in why) == ("None", True)


@pytest.mark.parametrize("name", ["GLS_FUSED_NATIVE", "GLS_FUSED_CUDA"])
def test_kernels_left_out_name_what_left_them_out(name):
    found, why = find_toolkit(**{name: "0"})
    assert found == "None"
    assert re.findall(r"GLS_FUSED_\w+=0", why) == [f"{name}=0"]


def test_cuda_is_never_asked_for_a_gpu():
    """A machine that builds need not have one."""
    assert "is_available" not in (ROOT / "setup.py").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)  # a build of all CPU kernels
def test_cuda_that_cannot_be_built_leaves_the_rest(source):
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    home = {"CUDA_HOME": "/nonexistent", "GLS_FUSED_CUDA": "auto"}
    required = build_in_place(source, **home | {"GLS_FUSED_CUDA": "1"})
    assert required.returncode == 1
    assert "gls_fused: error: no CUDA kernels: no CUDA toolkit" in required.stderr

    built = build_in_place(source, **home)
    assert built.returncode == 0, built.stdout + built.stderr
    record = record_of(source / "gls_fused")
    assert record["native_failure"] is None
    assert "no CUDA toolkit" in record["cuda_failure"]
    assert (record["cuda_version"], record["cuda_architectures"]) == (None, [])
