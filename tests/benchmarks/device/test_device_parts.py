"""The parts themselves: what they refuse, and the whole script on a CPU."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.device import graphs, kernels, machine, ops, steps
from benchmarks.device.build import ROOT, build_environment
from benchmarks.device.cases import make_cases
from benchmarks.device.models import Autocast, allow_precision
from benchmarks.device.ops import TINY
from benchmarks.device.parts import Setting, check_parts
from benchmarks.device.record import Record
from gls_fused import available_backends
from gls_fused.backends.dispatch import resolve_backend

# What every backend has from the reference, and other names of ops that are here.
TORCH_ONLY = {"take_patches", "sum_gram", "invert_gram"}
SINGULAR = {"blend_subspace", "refresh_subspace", "invert_core", "orthogonal_updates"}
CAPTURE = {"LinearCapture", "captured_linear"}


@pytest.fixture
def native(monkeypatch):
    """The only backend of the machine."""
    if available_backends()["native"] is not None:
        pytest.skip("the native backend is not available")
    backend = resolve_backend("native", ["cpu"])
    monkeypatch.setattr(machine.Cpu, "backends", lambda _: {"native": backend})
    return backend


def test_every_op_of_the_backends_has_a_case(native):
    assert {case.op for case in make_cases(TINY, torch.device("cpu"))} == (
        set(native.__all__) - TORCH_ONLY - SINGULAR - CAPTURE - {"TAKES_OTHERS", "commits"}
    )


@pytest.mark.parametrize("op", sorted({case.op for case in make_cases(TINY, torch.device("cpu"))}))
def test_a_wrong_op_is_found_and_not_timed(native, monkeypatch, op):
    """Its first result is off by .001, in 16 bits by .01; in place where that is how it works."""
    right = getattr(native, op)

    def wrong(*args, **kwargs):
        if op.startswith("update"):
            return right(*args, **{**kwargs, "lr": 1.001 * kwargs["lr"]})
        found = right(*args, **kwargs)
        if found is None:
            # What is written to: the sums, the first list, in 16 bits, or the second one.
            written = {"add_sketch_": [args[-1]], "round_params_": args[0]}.get(op, args[1])
            if op == "commit_subspaces_":
                (_, _, *written), *_ = args[0]
            torch._foreach_mul_(written, 1.01 if op == "round_params_" else 1.001)
            return None
        layers = found if isinstance(found, list) else [found]
        off = [(1.001 * layer[0], *layer[1:]) for layer in layers]
        return off if isinstance(found, list) else off[0]

    record = Record(None)
    assert ops.check_ops(machine.Cpu(), record)
    monkeypatch.setattr(native, op, wrong)
    assert not ops.check_ops(machine.Cpu(), record)
    rows = record.content["tables"]["Ops"]
    assert {row["op"] for row in rows if row["outcome"] == "WRONG"} == {op}
    record = Record(None)
    assert not kernels.measure_kernels(machine.Cpu(), record)
    tables = record.content["tables"]
    assert {row["op"] for row in tables["Wrong, and not timed"]} == {op}
    timed = {(row["op"], row["of"]) for row in tables["Kernels"]}
    assert not timed & {(row["op"], row["of"]) for row in tables["Wrong, and not timed"]}


def test_no_backend_is_no_success(monkeypatch):
    monkeypatch.setattr(machine.Cpu, "backends", lambda _: {})
    assert not ops.check_ops(machine.Cpu(), Record(None))


def test_replays_that_go_astray_are_found(native, monkeypatch):
    """As where a graph keeps the rate that it was captured with."""

    def capture(self, action):
        for _ in range(self.warm_up):
            action()
        return lambda: None

    monkeypatch.setattr(machine.Cpu, "capture", capture)
    record = Record(None)
    assert not graphs.check_graphs(machine.Cpu(), record)
    outcomes = [row["outcome"] for row in record.content["tables"]["Graphs"]]
    assert all(outcome.startswith("WRONG") for outcome in outcomes)


def test_a_cell_that_fails_is_named_and_the_next_is_measured(native, monkeypatch):
    cells = steps.TINY_CELLS[:2]
    monkeypatch.setattr(steps, "TINY_CELLS", cells)

    def measure(machine, record, name, precision):
        if name == cells[0][0]:
            raise RuntimeError("out of\nmemory")
        record.add("Steps", model=name)

    monkeypatch.setattr(steps, "_measure_cell", measure)
    record = Record(None)
    assert not steps.measure_steps(machine.Cpu(), record)
    tables = record.content["tables"]
    assert tables["Not measured"][0]["why"] == "RuntimeError: out of memory"
    assert tables["Steps"] == [{"model": cells[1][0]}]


def test_precisions():
    inner = torch.nn.Linear(3, 2)
    seen = []
    inner.register_forward_hook(lambda *found: seen.append(found[-1].dtype))
    model = Autocast(inner, torch.device("cpu"))
    assert model(torch.ones(1, 3)).dtype == torch.float32
    assert seen == [torch.bfloat16]
    # A check in float64 stays one.
    assert model.double()(torch.ones(1, 3).double()).dtype == torch.float64
    before = torch.get_float32_matmul_precision()
    with allow_precision("tf32"):
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
        with allow_precision("float32"):
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == before


def test_the_build_is_for_the_gpu_at_hand(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    found = build_environment((9, 0), dry_run=False)
    assert (found["TORCH_CUDA_ARCH_LIST"], found["GLS_FUSED_CUDA"]) == ("9.0", "1")


def test_the_sanitizer_watches_every_op_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.device.parts.find_program", lambda name: f"/cuda/bin/{name}")
    setting = Setting(tmp_path, tmp_path, None, dry_run=False)
    (part,) = [part for part in check_parts(setting) if part.name == "ops"]
    assert part.command[:3] == ("/cuda/bin/compute-sanitizer", "--error-exitcode", "9")
    assert "--part ops" in " ".join(part.command)
    assert part.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert "TRITON_INTERPRET" not in part.environment


def run_script(*arguments, **environment):
    return subprocess.run(
        ["bash", "benchmarks/device_check.sh", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU that torch can use; --dry-run needs none"):
        machine.find_machine(dry_run=False)


def test_whoever_runs_the_parts_needs_no_torch():
    """One that does not import is a part's failure, and is in the report."""
    code = "import sys, benchmarks.device.__main__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("arguments", [("--data", "/nowhere"), ("--budget", "0")])
def test_bad_options(tmp_path, arguments):
    done = run_script("--out", tmp_path, *arguments)
    assert done.returncode == 2
    assert arguments[0] in done.stderr.splitlines()[-1]
    assert arguments[1] in done.stderr.splitlines()[-1]


# On one core of a busy machine.
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "more", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["check", "more"]
)
def test_a_dry_run_of_the_whole_script(tmp_path, more):
    pytest.importorskip("triton")
    done = run_script("--dry-run", "--out", tmp_path, *(["--more"] if more else []))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["dry_run"]
    states = {name: part["state"] for name, part in results["parts"].items()}
    assert set(states.values()) == {"ok"}, {**states, "output": done.stdout + done.stderr}
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == str(tmp_path / "report.md")
    parts = {name: part["result"] for name, part in results["parts"].items()}
    if more:
        assert {row["change"] for row in parts["tiles"]["tables"]["Tiles"]} == {
            "as in the table", "warps × 2",
        }  # fmt: skip
        return
    for name, table in (
        ("ops", "Ops"), ("kernels", "Kernels"), ("steps", "Steps"), ("graphs", "Graphs"),
        ("losses", "Time to Adam's loss"), ("memory", "Peak memory"),
    ):  # fmt: skip
        assert parts[name]["tables"][table]
        assert f"### {table}" in (tmp_path / "report.md").read_text()
    assert {row["backend"] for row in parts["ops"]["tables"]["Ops"]} == {"triton", "native"}
    assert " passed" in results["parts"]["triton-tests"]["output"]
    assert " passed" in results["parts"]["native-tests"]["output"]
    assert (tmp_path / "kernels.png").is_file()
