import os

# cuBLAS is deterministic only with a fixed workspace, chosen before its first use.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from hypothesis import settings

from gls_fused import available_backends

torch.set_num_threads(1)
# Memory from torch.empty is then filled with NaN, so that a value nobody wrote shows.
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True

settings.register_profile("quick", max_examples=25, deadline=None, derandomize=True, database=None)
settings.load_profile("quick")


@pytest.fixture(autouse=True, scope="session")
def uninitialised_memory_is_poisoned():
    assert torch.empty(3).isnan().all()


@pytest.fixture(
    params=[n for n, why in available_backends().items() if why is None and n != "triton"]
)
def backend(request):
    """Every backend that is available here for the CPU."""
    return request.param
