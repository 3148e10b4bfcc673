"""The epoch experiment: its arithmetic on fabricated rounds, its command line."""

from typing import Any

import pytest
import torch
from tiny import TINY, read_strictly

from benchmarks.epoch.floor import work_of
from benchmarks.epoch.memory import measure_memory
from benchmarks.epoch.report import bound_of, make_short_table, make_tables, render_report
from benchmarks.epoch.stages import measure_overhead, profile_stages
from benchmarks.harness.ceilings import Ceilings
from benchmarks.harness.tables import verdict
from benchmarks.workloads.contenders import CONTENDERS
from benchmarks.workloads.gate import check_gls
from benchmarks.workloads.shapes import synthesise
from benchmarks.workloads.tasks import TASKS

RUN = (
    "epoch", "--tasks", "tiny", "--shapes", "cifar10", "--batch-sizes", "32", "--threads", "1",
    "--rounds", "3", "--seconds", "0.001",
)  # fmt: skip


def test_bounds_and_verdicts():
    assert bound_of("cifar10", "mlp", 128, "gls") == 1.05
    assert bound_of("cifar10", "cnn", 128, "gls") == 1.10
    assert bound_of("cifar10", "cnn", 512, "gls") == 1.05
    assert bound_of("cifar10", "autoencoder", 32, "gls") == 1.10
    assert bound_of("cifar10", "mlp", 128, "gls-momentum0") == 1.02
    assert bound_of("cifar10", "cnn", 128, "gls-momentum0") is None
    assert bound_of("fashion-mnist", "mlp", 128, "gls") is None
    assert bound_of("cifar10", "mlp", 128, "adam") is None
    assert verdict(1.05, 1.05) == "met by 0.0%"
    assert verdict(1.155, 1.05) == "missed by 10.0%"
    assert verdict(0.54, 0.6) == "met by 10.0%"


def fabricated() -> dict[str, Any]:
    return {
        "command": "python -m benchmarks epoch",
        "started": "2026-01-01T00:00:00+00:00",
        "ended": "2026-01-01T00:01:00+00:00",
        "git_commit": None,
        "platform": "Linux",
        "load_average_before": 0.1,
        "load_average_after": 1.0,
        "environment": {
            "cpu": "Some Processor",
            "cores": 8,
            "threads": 4,
            "vector_instructions": "AVX2",
            "device": "cpu",
            "heap": "freed memory is kept (glibc 9.9)",
            "torch": "2.99",
            "python": "3.12",
            "gls_fused": "0.9",
        },
        "settings": {"rounds": 2, "slice_seconds": 0.4, "lr": 1e-8, "optimizers": ["gls", "adam"]},
        "cells": [
            {
                "shape": "cifar10",
                "task": "mlp",
                "batch_size": 128,
                "data": "synthetic",
                "steps_per_epoch": 390,
                "parameters": 1000,
                "gate": {"gls": {"double": 1e-14, "single": 1e-3, "allowed": 1e-2}},
                "steps_per_slice": {"gls": 10, "adam": 10},
                "seconds_per_step": {"gls": [0.010, 0.030], "adam": [0.010, 0.020]},
                "minor_faults_per_step": {"gls": [3.0, 5.0], "adam": [0.0, 0.0]},
                "state_bytes": {"gls": 4400, "adam": 8000},
            }
        ],
    }


def test_the_report_of_fabricated_rounds():
    report = render_report(fabricated())
    assert "| mlp, batch 128 | GLS | seconds | 1.250 [1.125, 1.375] | 1.05 | missed by 19.0% |" in (
        report
    )
    assert "| mlp, batch 128 | GLS | state | 0.550 | 0.60 | met by 8.3% |" in report
    # 20 ms times 390 steps.
    assert "| CIFAR-10 | mlp | 128 | GLS | 20.000 | 7.80 | 1.250 [1.125, 1.375] | 1.05 | 4 |" in (
        report
    )
    assert "- Heap: freed memory is kept (glibc 9.9)" in report
    assert "Some Processor" in report
    assert "4 threads of 8 cores" in report
    assert "`python -m benchmarks epoch`" in report
    assert "synthetic standardised images" in report
    assert [table.title for table in make_tables(fabricated())] == [
        "Targets",
        "Seconds per epoch",
        "Optimizer state",
        "Correctness gate",
    ]


def test_the_short_table_says_where_a_bound_is_missed():
    (row,) = make_short_table(fabricated()["cells"]).rows
    assert row == ("mlp", "128", "15.00", "1.250 [1.125, 1.375] > 1.05", "0.550 ≤ 0.60")


def test_a_red_gate_ends_the_command_before_any_figure(tmp_path, monkeypatch, run_main):
    monkeypatch.setattr("benchmarks.workloads.gate.TOLERANCE", -1.0)
    status, output, errors = run_main(*RUN, "--out", tmp_path)
    assert (status, output, errors.count("\n")) == (1, "", 1)
    assert errors.startswith("error: tiny, batch 32: in float64 GLS is ")
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_strict_json_and_a_report(tmp_path, run_main):
    status, output, errors = run_main(*RUN, "--out", tmp_path)
    assert status == 0, errors
    assert output.splitlines()[-1] == str(tmp_path / "report.md")
    results = read_strictly(tmp_path / "epoch.json")
    assert results["environment"]["threads"] == 1
    assert results["command"].startswith("python -m benchmarks")
    (cell,) = results["cells"]
    assert list(cell["seconds_per_step"]) == list(CONTENDERS)
    assert all(len(rounds) == 3 for rounds in cell["seconds_per_step"].values())
    assert all(min(rounds) > 0 for rounds in cell["seconds_per_step"].values())
    assert cell["steps_per_slice"]["gls"] % 10 == 0
    assert {len(faults) for faults in cell["minor_faults_per_step"].values()} == {3}
    assert results["environment"]["heap"] == "as the system has it (no glibc)"
    assert cell["state_bytes"]["adam"] >= 8 * cell["parameters"]
    assert cell["state_bytes"]["sgd"] == 0
    assert cell["data"] == "synthetic"
    assert cell["steps_per_epoch"] == 50_000 // 32
    assert cell["gate"]["gls"]["double"] < 1e-12
    report = (tmp_path / "report.md").read_text()
    assert "## Seconds per epoch" in report
    assert "## Targets" in report


def test_each_task_is_timed_at_the_shapes_it_trains_on(tmp_path, monkeypatch, run_main):
    monkeypatch.setattr(
        "benchmarks.epoch.run._measure_cell",
        lambda options, shape, *rest: {
            **fabricated()["cells"][0],
            "shape": shape,
            "task": rest[1],
            "data": "synthetic",
        },
    )
    arguments = ("epoch", "--batch-sizes", "128", "--threads", "1", "--out", tmp_path)
    status, _, errors = run_main(*arguments, "--tasks", "resnet", "transformer")
    assert status == 0, errors
    cells = read_strictly(tmp_path / "epoch.json")["cells"]
    assert [(cell["shape"], cell["task"]) for cell in cells] == [
        ("cifar10", "resnet"),
        ("fashion-mnist", "resnet"),
        ("text", "transformer"),
    ]
    report = (tmp_path / "report.md").read_text()
    assert "an epoch is 14745 sequences" in report
    status, _, errors = run_main(*arguments, "--tasks", "mlp", "transformer", "--shapes", "cifar10")
    assert status == 0
    assert "transformer is left out" in errors
    status, _, errors = run_main(*arguments, "--tasks", "transformer", "--shapes", "cifar10")
    assert (status, errors) == (
        2,
        "error: --shapes: transformer trains on text, and none of these is\n",
    )


# More rows than a basis has directions: those that no row fills are arbitrary.
@pytest.mark.parametrize(
    ("name", "shape", "batch"), [("resnet", (1, 8, 8), 32), ("transformer", (97, 64), 4)]
)
def test_gls_passes_its_gate_on_every_kind_of_task(name, shape, batch):
    verdict = check_gls(TASKS[name], synthesise(shape, 3 * batch), batch)
    assert verdict.double < 1e-9
    assert 0 < verdict.single <= verdict.allowed


def test_a_profile_names_every_stage():
    stages = profile_stages(TINY, synthesise((3, 32, 32), 256), 32, 1)
    assert list(stages.stages) == [
        "rows", "sketch", "commit", "update, with P at the step site",
        "orthogonal step", "rest of step()", "other",
    ]  # fmt: skip
    for name in list(stages.stages)[2:-1]:
        # So few rows make no orthogonal step.
        assert (stages.stages[name] > 0) == (name != "orthogonal step")
    # What a step takes longer than SGD's without its own step(); noise may make that less than 0.
    assert stages.step - stages.sgd_step < sum(stages.stages.values()) < stages.step
    extra = measure_overhead(2, 0.001).extra
    assert set(extra) == {"gls", "gls-momentum0", "adam"}


def test_memory_is_measured_in_a_process_of_its_own():
    # Resident memory wavers upwards, by what the heap keeps; the least of three does not.
    sizes = {
        name: min(measure_memory(name, "mlp", "cifar10", 8, torch.device("cpu")) for _ in range(3))
        for name in ("sgd", "adam")
    }
    # Adam's two averages of 3.7 million parameters.
    averages = 2 * 4 * 3_676_682
    assert 0.5 * averages < sizes["adam"] - sizes["sgd"] < 2 * averages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "rnn"), "invalid choice: 'rnn'"),
        (("--shapes", "imagenet"), "invalid choice: 'imagenet'"),
        (("--batch-sizes", "0"), "expected an integer >= 1, got '0'"),
        (("--batch-sizes", "9000"), "--batch-sizes: 9000 is more than the 8192 images timed"),
        (("--batch-sizes", "32", "32"), "--batch-sizes: 32 32 names one twice"),
        (("--optimizers", "gls"), "--optimizers: adam is what the others are compared with"),
        (("--seconds", "0"), "expected a number > 0, got '0'"),
        (("--rounds", "x"), "expected an integer >= 1, got 'x'"),
        (("--threads", "-1"), "expected an integer >= 1, got '-1'"),
        (("--device", "tpu"), "no such device: 'tpu'"),
        (("--device", "meta"), "expected cpu or cuda, got 'meta'"),
        (("--device", "cuda:99"), "there is no cuda:99"),
    ],
)
def test_a_bad_option_gives_one_line(tmp_path, monkeypatch, run_main, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, output, errors = run_main(*RUN, *arguments)
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("error: ")
    assert message in errors
    assert list(tmp_path.iterdir()) == []


def test_an_unusable_directory_gives_one_line(tmp_path, run_main):
    (tmp_path / "file").write_text("")
    status, _, errors = run_main(*RUN, "--out", tmp_path / "file")
    assert (status, errors.count("\n")) == (2, 1)
    assert "--out" in errors


def test_the_floor_is_in_the_report_with_its_ceilings():
    results = {**fabricated(), "ceilings": {"copy": 1e10, "gemm": 1e11}}
    extra = work_of("gls", "mlp", 128).seconds(Ceilings(1e10, 1e11))
    extra -= work_of("adam", "mlp", 128).seconds(Ceilings(1e10, 1e11))
    report = render_report(results)
    assert "A model, not a measurement" in report
    assert f"| {1e3 * extra:+.2f} | {1 + extra / 0.015:.3f} | 0.520 |" in report
