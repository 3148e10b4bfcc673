"""Which crash of a launch is not the project's."""

import subprocess
import sys

import pytest
from launch import died_outside_of_python

IN_PYTHON = "import ctypes; ctypes.string_at(0)"
# A thread that starts at an address where no code is.
ELSEWHERE = (
    "import ctypes, time; "
    "ctypes.CDLL(None).pthread_create(ctypes.byref(ctypes.c_ulong()), None, ctypes.c_void_p(8), 0);"
    "time.sleep(10)"
)


@pytest.mark.parametrize(
    ("code", "elsewhere"), [(IN_PYTHON, False), (ELSEWHERE, True), ("raise SystemExit(1)", False)]
)
def test_thread_that_crashed(code, elsewhere):
    command = [sys.executable, "-X", "faulthandler", "-c", code]
    finished = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert finished.returncode
    assert died_outside_of_python(finished.stderr) == elsewhere
