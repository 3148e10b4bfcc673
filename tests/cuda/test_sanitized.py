"""The same kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

import re
import subprocess

import pytest
from cuda_emulation import build

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


def run(program, name, kind, n):
    command = [program, name, kind, str(n)]
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
