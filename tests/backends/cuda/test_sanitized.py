"""The same kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_emulation import build
from cuda_emulation.emulator import ORDERS

HERE = Path(__file__).parent
BROKEN = build.HERE / "broken"
FAULTS = {
    "out_of_bounds": (119, "AddressSanitizer: heap-buffer-overflow"),
    "out_of_shared": (32, "AddressSanitizer: use-after-poison"),
    "out_of_array": (32, "runtime error: index 32 out of bounds"),
    "misaligned": (5, "runtime error: .* misaligned address .* 'const struct float4'"),
    "divergent_barrier": (
        119,
        "divergent_barrier_kernel<false>, block .*: divergent barrier: thread .* waits at",
    ),
}


@pytest.fixture(scope="module")
def program():
    return build.build_program([BROKEN / "driver.cpp", BROKEN / "main.cpp"], "sanitized")


def run(program, name, kind, n, order=0):
    command = [program, name, kind, str(n), str(order)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(program, name):
    n, message = FAULTS[name]
    done = run(program, name, "broken", n)
    assert done.returncode != 0
    assert re.search(message, done.stderr)


@pytest.mark.parametrize("name", FAULTS)
def test_mended_kernel_is_clean(program, name):
    done = run(program, name, "mended", FAULTS[name][0])
    assert (done.returncode, done.stderr) == (0, "")


# Without the race detector, which the sanitized build has not.
@pytest.mark.parametrize("name", ["missing_barrier", "missing_second_barrier"])
def test_a_missing_barrier_shows_in_the_results(program, name):
    orders = [order for order, _ in ORDERS.values()]
    broken = {run(program, name, "broken", 128, order).stdout for order in orders}
    mended = {run(program, name, "mended", 128, order).stdout for order in orders}
    assert len(broken) > 1
    assert len(mended) == 1
    assert "nan" not in mended.pop()


def find_runtime(name):
    return build.run([build.COMPILER, f"-print-file-name={name}"]).strip()


# ASan's runtime must be loaded before Python. Python and torch leak by design, and torch frees with
# `delete` what it allocated otherwise.
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("tests", sorted(path.name for path in HERE.glob("test_emulat*.py")))
def test_kernels_are_clean(tests):
    environment = os.environ | {
        "LD_PRELOAD": f"{find_runtime('libasan.so')} {find_runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",
        "GLS_FUSED_EMULATE_SANITIZED": "1",
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-sq", HERE / tests]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert re.search(r"\d+ passed", done.stdout)
