"""Two sets that exclude each other, as Triton decides when it is imported whether it interprets.

TRITON_INTERPRET=1 pytest tests/backends/triton    the kernels on the CPU, against the reference
pytest tests                              the kernels compiled for GPUs, none of which is needed
"""

import os

import pytest

triton = pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = ["test_compiled*"] if INTERPRETED else ["test_interpreted*"]
