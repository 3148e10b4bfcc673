"""Installing gls_fused: with and without a compiler, and what a user is told when it goes wrong."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from runpy import run_path

import pytest
import torch

ROOT = Path(__file__).parents[1]
NO_COMPILER = {"CC": "/nonexistent", "CXX": "/nonexistent"}


def run_python(*arguments, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "GLS_FUSED_NATIVE": "auto", **environment},
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


def native_failure(package):
    return run_path(str(package / "_build_info.py"))["native_failure"]


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


def test_unknown_mode_is_one_clear_line():
    done = run_python("setup.py", "--name", GLS_FUSED_NATIVE="bad")
    assert done.returncode == 1
    assert done.stderr == ("gls_fused: error: GLS_FUSED_NATIVE must be auto, 0 or 1, got 'bad'\n")


def test_missing_torch_is_one_clear_line():
    without_torch = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--name'];"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    done = run_python("-c", without_torch)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "run `pip install 'torch>=2.6,<3'` first" in done.stderr


def test_build_info_names_this_torch():
    native = pytest.importorskip("gls_fused._C", reason="the native extension is not built")
    info = native.build_info()
    assert info["torch"] == torch.__version__.split("+")[0]
    assert re.match(r"(gcc|clang) \d+", info["compiler"])
    assert "-O3" in info["flags"]
    assert (info["cuda"], info["cuda_architectures"]) == (None, [])
    libraries = (path.name.split(".")[0] for path in (ROOT / "gls_fused").glob("_cpu_*.so"))
    assert {f"_cpu_{name.lower()}" for name in info["cpu_capabilities"]} == set(libraries)
    assert native_failure(ROOT / "gls_fused") is None


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_build_info_names_the_running_kernels(capability):
    native = pytest.importorskip("gls_fused._C", reason="the native extension is not built")
    report = "import gls_fused, json; print(json.dumps(gls_fused.build_info()))"
    done = run_python("-c", report, ATEN_CPU_CAPABILITY=capability)
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    running = info.pop("running")
    assert info == native.build_info()
    assert running in info["cpu_capabilities"]
    # torch takes less where the CPU has less.
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert running == capability.upper()


def test_build_requirements_are_listed_alike():
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = (ROOT / "requirements-build.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == (
        pyproject["build-system"]["requires"]
    )


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
