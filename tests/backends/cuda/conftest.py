import pytest
from cuda_emulation import build


@pytest.fixture(autouse=True, scope="module")
def _compiler(request):
    """Whoever runs kernels here compiles them; test_static reads what setup.py has built."""
    if build.COMPILER is None and request.module.__name__ != "test_static":
        pytest.skip("needs g++")


@pytest.fixture(params=["forward", "reverse", "random", "warps"])
def order(request):
    """In which order the threads of a block, and the blocks, run."""
    return request.param
