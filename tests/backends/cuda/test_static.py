"""The built CUDA kernels, without a GPU: registers, spills, and how wide they access memory.

`python tests/backends/cuda/test_static.py` writes resources.json anew from the built library.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gls_fused import _build_info, available_backends, build_info

pytest.importorskip("triton", reason="carries the tools that read machine code")
from machine_code import read_accesses, read_resources

ROOT = Path(__file__).parents[3]
TABLE = Path(__file__).with_name("resources.json")
if (why := available_backends()["native"] or _build_info.cuda_failure) is not None:
    pytest.skip(f"no CUDA kernels: {why}", allow_module_level=True)
(LIBRARY,) = (ROOT / "gls_fused").glob("_cuda.*")
BUILT = sorted(name for name in build_info()["cuda_architectures"] if name.startswith("sm_"))


def test_what_was_built_is_loaded():
    assert build_info()["cuda_failure"] is None


@pytest.fixture(scope="module")
def resources():
    return read_resources(LIBRARY)


def check_resources(kernels):
    """Nothing is spilled, and two blocks of 256 threads fit an SM."""
    assert kernels
    for name, found in kernels.items():
        assert (found.stack, found.local) == (0, 0), (name, found)
        assert 0 < found.registers <= 128, (name, found)
        # What a block gets without asking for more.
        assert found.shared <= 48 * 1024, (name, found)


def test_nothing_spills(resources):
    assert set(resources) == set(BUILT)
    for kernels in resources.values():
        check_resources(kernels)


def test_resources_are_those_of_the_table(resources):
    """A change here is a change of occupancy: look at it, then write the table anew."""
    table = json.loads(TABLE.read_text())
    if table["cuda"] != build_info()["cuda"]:
        pytest.skip(f"the table is of CUDA {table['cuda']}, this build of {build_info()['cuda']}")
    common = table["kernels"].keys() & resources.keys()
    if not common:
        pytest.skip(f"the table is of {[*table['kernels']]}, this build of {[*resources]}")
    for architecture in common:
        assert as_table(resources[architecture]) == table["kernels"][architecture], architecture


def as_table(kernels):
    return {name: [found.registers, found.shared] for name, found in sorted(kernels.items())}


# ---- widths of accesses -------------------------------------------------------------------------


def wide_accesses(name):
    """16-byte loads and stores that the fast path of a kernel has, or None where it has no such."""
    kernel, *arguments = re.split(r"[<>, ]+", name.rstrip(">"))
    if not arguments:
        return None
    half = arguments[0] in ("__half", "__nv_bfloat16")
    # 16 bytes of a 16-bit parameter stand beside 32 bytes of its averages.
    state = 2 if half else 1
    flags = [argument == "true" for argument in arguments[1:]]
    vectors = {"float": 4, "double": 1}.get(arguments[0], 2)
    rows = {"float": 8, "double": 16}.get(arguments[0], 4)
    if kernel == "update_flat_kernel":
        averages = vectors * state * sum(flags)
        return 2 * vectors + averages, vectors + averages
    if kernel == "square_flat_kernel":
        # Its result, a double2.
        return 2 * vectors, 1
    # Those that follow have a path for rows of 16 bytes beside one for others.
    if kernel == "update_tiles_kernel":
        averages = rows * state * sum(flags)
        return 2 * rows + averages, rows + averages
    if kernel == "update_axes_kernel":
        # Of float64 the rows are a loop. c is read beside D, which the kernel forms or is given.
        rows = 1 if arguments[0] == "double" else rows
        averages = rows * state * flags[1]
        return 2 * rows + state + averages, rows + averages
    if kernel == "combine_kernel" and not flags[0]:
        return None
    return {
        "square_tiles_kernel": (rows, 1), "square_axes_kernel": (rows, 0),
        "combine_kernel": (rows, rows), "project_kernel": (1 if half else 2, 0),
    }.get(kernel)  # fmt: skip


# Reading one takes some 10 seconds: sm_90 quickly, what else was built slowly.
ARCHITECTURES = [pytest.param(name, marks=[pytest.mark.slow] * (name != "sm_90")) for name in BUILT]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streams_are_16_bytes_wide(architecture, tmp_path):
    found = read_accesses(LIBRARY, architecture, tmp_path)
    expected = {name: wide for name in found if (wide := wide_accesses(name))}
    families = {name.partition("<")[0] for name in expected}
    assert families >= {
        "update_flat_kernel", "square_flat_kernel", "update_tiles_kernel", "square_tiles_kernel",
        "update_axes_kernel", "square_axes_kernel", "combine_kernel", "project_kernel",
    }  # fmt: skip
    for name, (loads, stores) in expected.items():
        accesses = found[name]
        assert accesses.get("LDG 128", 0) >= loads, (name, accesses)
        assert accesses.get("STG 128", 0) == stores, (name, accesses)
    for name, accesses in found.items():
        assert not [key for key in accesses if key[:3] in ("LDL", "STL")], (name, accesses)


# ---- the reading itself -------------------------------------------------------------------------


def test_a_kernel_that_spills_is_seen(tmp_path):
    """An array that is indexed at run time has no registers."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not in PATH")
    source, cubin = tmp_path / "spilling.cu", tmp_path / "spilling.cubin"
    source.write_text(
        "__global__ void spilling_kernel(float* x, int at) {"
        "  float all[64] = {};"
        "  for (int i = 0; i < at; ++i) all[int(x[i]) % 64] += 1;"
        "  x[0] = all[at]; }"
    )
    command = [nvcc, "-arch=sm_90", "-cubin", "-o", cubin, source]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(AssertionError, match="spilling_kernel"):
        check_resources(read_resources(cubin, "sm_90")["sm_90"])


def test_narrow_accesses_are_seen(tmp_path):
    """Rows that do not begin at 16 bytes take the other kernel."""
    if "sm_90" not in BUILT:
        pytest.skip("sm_90 was not built")
    found = read_accesses(LIBRARY, "sm_90", tmp_path)
    narrow = found["combine_kernel<float, false>"]
    assert "LDG 32" in narrow
    assert not {"LDG 128", "STG 128"} & narrow.keys()


if __name__ == "__main__":
    content = {
        "cuda": build_info()["cuda"],
        "columns": ["registers per thread", "bytes of static shared memory per block"],
        "kernels": {name: as_table(found) for name, found in read_resources(LIBRARY).items()},
    }
    text = json.dumps(content, indent=1)
    # A kernel to a line.
    TABLE.write_text(re.sub(r"\[\n\s+(\d+),\n\s+(\d+)\n\s+\]", r"[\1, \2]", text) + "\n")
