"""The kernels' benchmarks: that a wrong op is refused, what is counted, and the command line."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import read_strictly

from benchmarks.harness.ceilings import Ceilings
from benchmarks.kernels.cases import BATCH, Case, layers_of, make_adam, make_cases
from benchmarks.kernels.report import describe_case, render_report
from gls_fused import reference

CASES = {case.name: case for case in make_cases()}
SMALL = (
    "precondition_rows [128, 128]",
    "sketch_rows [128, 128]",
    "take_patches [128, 3, 32, 32], 5x5",
    "precondition_gradient [10, 128]",
    "precondition_gradient [40, 27], no bias",
    "sketch_rows [1024, 27], no bias",
    "refresh_subspace [129, 32]",
    "invert_core [32, 32]",
    "update_layers_ cnn, momentum 0.9",
    "update_layers_ cnn, momentum 0",
    "orthogonal_updates cnn",
)


def test_every_op_and_every_layer_of_the_models_is_there():
    # The classifier of an MLP of 3072-1024-512-10 and the autoencoder's bottleneck of 128.
    shapes = {case.shape for case in CASES.values() if case.op == "precondition_gradient"}
    assert {"[1024, 3072]", "[512, 1024]", "[10, 512]", "[128, 1024]", "[3072, 1024]"} <= shapes
    convolutions = [layer for layer in layers_of("cnn") if layer.window]
    assert len(convolutions) == 2
    # The residual network's convolutions have no bias, one of its stages' strides is 2.
    names = set(CASES)
    assert "precondition_gradient [40, 360], no bias" in names
    assert "take_patches [128, 40, 32, 32], 3x3 by 2" in names
    assert not any(layer.bias for layer in layers_of("resnet") if layer.window)
    # 128 sequences of 64 characters.
    assert "precondition_rows [8192, 512]" in names
    assert "sketch_rows [1024, 512]" in names
    assert {f"[{c.outputs}, {c.size}]" for c in convolutions} <= shapes
    assert all(layer.inputs[0] == BATCH for layer in layers_of("mlp"))
    assert {case.op for case in CASES.values()} == {case.split()[0] for case in SMALL}


@pytest.mark.parametrize("name", SMALL)
def test_a_wrong_or_unwritten_result_is_refused(name):
    case = CASES[name]
    value = case.make(torch.float32)(reference)
    values = [value] if isinstance(value, torch.Tensor) else value
    tensors = sum(isinstance(x, torch.Tensor) for x in values)
    case.check(corrupted(case, lambda x: x, 0))
    # An update is in place, and its first parameter stands for the others.
    for index in range(1 if case.op == "update_layers_" else tensors):
        for change in (lambda x: 1.001 * x, lambda x: x * torch.nan, torch.zeros_like):
            with pytest.raises(AssertionError, match="relative error"):
                case.check(corrupted(case, change, index))


def corrupted(case: Case, change: Any, index: int) -> SimpleNamespace:
    """The reference with one result of the case's op changed."""

    def op(*arrays: Any, **options: Any) -> Any:
        value = getattr(reference, case.op)(*arrays, **options)
        if value is None:
            arrays[0][index].copy_(change(arrays[0][index]))
            return None
        if isinstance(value, torch.Tensor):
            return change(value)
        return (*value[:index], change(value[index]), *value[index + 1 :])

    return SimpleNamespace(**{case.op: op})


def test_what_is_counted():
    rows = CASES["precondition_rows [128, 3072]"]
    assert rows.flops == 4 * 128 * 3073 * 32
    assert rows.bytes == 4 * (2 * 128 * 3072 + 3073 * 32)
    optimizer, count = make_adam("mlp")
    assert count == 3073 * 1024 + 1025 * 512 + 513 * 10
    assert CASES["update_layers_ mlp, momentum 0.9"].bytes == 20 * count
    assert CASES["update_layers_ mlp, momentum 0"].bytes == 12 * count
    before = optimizer.param_groups[0]["params"][0].detach().clone()
    optimizer.step()
    assert not torch.equal(before, optimizer.param_groups[0]["params"][0])


def test_rates_stand_beside_the_bound():
    def describe(flops: int, moved: int, stats: Any) -> dict[str, Any]:
        benchmark = SimpleNamespace(extra_info={}, stats=stats)
        describe_case(benchmark, Ceilings(1e9, 1e12), "op", "[1]", "native", flops, moved)
        return benchmark.extra_info

    half = SimpleNamespace(stats=SimpleNamespace(median=0.5))
    info = describe(int(1e11), int(2e8), half)
    assert (info["GB/s"], info["GFLOP/s"], info["of_bound"]) == pytest.approx((0.4, 200, 0.4))
    # Here the GEMM is what bounds it.
    assert describe(int(4e11), int(2e8), half)["of_bound"] == pytest.approx(0.8)
    assert "GB/s" not in describe(1, 1, None)


def test_the_command_measures_what_is_selected(tmp_path, run_main):
    status, output, errors = run_main(
        "kernels", "--select", "invert_core and reference", "--seconds", "0.001", "--threads", "1",
        "--out", tmp_path,
    )  # fmt: skip
    assert status == 0, errors
    assert output.splitlines()[-1] == str(tmp_path / "report.md")
    results = read_strictly(tmp_path / "kernels.json")
    (case,) = results["cases"]
    assert (case["op"], case["backend"], case["shape"]) == ("invert_core", "reference", "[32, 32]")
    assert 0 < case["q1"] <= case["median"] <= case["q3"]
    assert case["ceilings"]["copy"] > 0 < case["ceilings"]["gemm"]
    assert "machine_info" not in results
    report = (tmp_path / "report.md").read_text()
    assert report == render_report(results)
    assert "| invert_core | [32, 32] | reference | " in report


def test_a_red_check_ends_the_command_without_a_figure(tmp_path, monkeypatch, run_main):
    failed = SimpleNamespace(returncode=1, stdout="E relative error")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: failed)
    status, output, errors = run_main("kernels", "--out", tmp_path)
    assert (status, output) == (1, "")
    assert errors == "E relative error\nerror: a check or pytest failed, nothing is reported\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--select", "no_such_op"), "--select 'no_such_op' selects nothing"),
        (("--select", "("), "--select '(': "),
        (("--seconds", "0"), "expected a number > 0, got '0'"),
        (("--threads", "0"), "expected an integer >= 1, got '0'"),
        (("--out", "file"), "--out file"),
    ],
)
def test_a_bad_option_gives_one_line(tmp_path, monkeypatch, run_main, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    status, output, errors = run_main("kernels", "--out", tmp_path / "out", *arguments)
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("error: ")
    assert message in errors
