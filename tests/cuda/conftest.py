import pytest
from cuda_emulation import build

if build.COMPILER is None:
    collect_ignore_glob = ["test_emulat*", "test_broken*", "test_sanitized*"]


@pytest.fixture(params=["forward", "reverse", "random", "warps"])
def order(request):
    """In which order the threads of a block, and the blocks, run."""
    return request.param
