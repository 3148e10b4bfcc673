"""The stability experiment: what counts as diverged, its resumption, tables and heat maps."""

import json
import math
from dataclasses import asdict
from typing import Any

import pytest
from tiny import read_strictly

from benchmarks.stability import run as stability
from benchmarks.stability.report import make_tables, plot_task, ratio_to, render_report
from benchmarks.stability.run import Cell

RUN = (
    "stability", "--tasks", "mlp", "--dataset", "digits", "--steps", "30", "--normalize", "rms",
    "none", "--rates", "1", "1e9", "--dampings", "1", "10", "--threads", "1",
)  # fmt: skip


def cell(normalize: str | None, lr: float, loss: float | None, damping: float | None) -> Cell:
    diverged = loss is None or loss > 2.0
    return Cell("mlp", normalize, lr, damping, 2.0, loss, diverged, 0.1)


def fabricated(environment: dict[str, Any]) -> dict[str, Any]:
    cells = [
        cell(None, 0.001, 0.5, None), cell(None, 0.1, 4.0, None), cell(None, 1.0, None, None),
        cell("rms", 0.001, 0.25, 0.3), cell("rms", 0.1, 1.5, 0.3), cell("rms", 1.0, None, 0.3),
        cell("rms", 0.001, 0.75, 3.0), cell("rms", 0.1, 6.0, 3.0), cell("rms", 1.0, 12345.0, 3.0),
    ]  # fmt: skip
    return {
        "command": "python -m benchmarks stability",
        "started": "2026-01-01T00:00:00+00:00",
        "ended": "2026-01-01T00:01:00+00:00",
        "git_commit": None,
        "platform": "Linux",
        "load_average_before": 0.1,
        "load_average_after": 1.0,
        "environment": {**environment, "vector_instructions": "AVX2", "heap": "kept"},
        "settings": {
            "steps": 200, "last_steps": 20, "seed": 0, "gls": {"rank": 8},
            "tasks": {"mlp": {"data": "digits", "train_images": 1437, "batch_size": 128}},
        },
        "cells": [asdict(one) for one in cells],
    }  # fmt: skip


@pytest.fixture
def results(config_of) -> dict[str, Any]:
    return fabricated(config_of(1, [0], ["gls"])["settings"]["environment"])


def test_the_report_counts_what_diverged_and_what_is_ahead_of_adam(results, tmp_path):
    report = render_report(results)
    assert "| mlp | Adam | 2 of 3 | - | 0.5000 | 0.001 | - |" in report
    # Ahead at .001 once, and at .1 where Adam diverged.
    assert '| mlp | GLS, "rms" | 3 of 6 | 2 of 6 | 0.2500 | 0.001 | 0.3 |' in report
    assert "| Adam | - | 0.5000 | (4.0000) | diverged |" in report
    assert '| GLS, "rms" | 3 | 0.7500 | (6.0000) | (1.2e+04) |' in report
    assert "](stability-mlp.png)" in report
    assert "- GLS options other than its defaults: rank=8" in report
    cells = [Cell(**one) for one in results["cells"]]
    plot_task(cells, "mlp", tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert all(len(row) == len(t.header) for t in make_tables(results) for row in t.rows)


def test_ratios_to_adam():
    adam, lost = cell(None, 0.1, 0.5, None), cell(None, 0.1, None, None)
    assert ratio_to(cell("rms", 0.1, 0.25, 1.0), adam) == 0.5
    assert ratio_to(cell("rms", 0.1, 0.25, 1.0), lost) == 0
    assert ratio_to(cell("rms", 0.1, 3.0, 1.0), adam) == math.inf
    assert math.isnan(ratio_to(cell("rms", 0.1, 0.25, 1.0), None))


def test_the_command_trains_every_cell_and_resumes(tmp_path, monkeypatch, run_main):
    train, trained = stability._train, []

    def interrupt(options, dataset, key, on_batch):
        if len(trained) == 4:
            raise KeyboardInterrupt
        trained.append(key)
        return train(options, dataset, key, on_batch)

    with monkeypatch.context() as patch:
        patch.setattr(stability, "_train", interrupt)
        status, _, errors = run_main(*RUN, "--out", tmp_path)
    assert status == 130
    assert errors.splitlines()[-1].startswith("interrupted; complete runs are kept")
    before = read_strictly(tmp_path / "stability.json")["cells"]
    assert len(before) == 4
    status, _, errors = run_main(*RUN, "--out", tmp_path)
    assert (status, errors.count("\n")) == (2, 1)
    assert "holds stability.json: add --resume" in errors
    status, _, errors = run_main(*RUN, "--out", tmp_path, "--resume", "--steps", "9")
    assert (status, errors) == (2, "error: --resume: steps was 30 and is 9 now\n")

    status, output, errors = run_main(*RUN, "--out", tmp_path, "--resume")
    assert status == 0, errors
    assert output.splitlines()[-1] == str(tmp_path / "report.md")
    assert errors.count("already complete") == 4
    results = read_strictly(tmp_path / "stability.json")
    cells = results["cells"]
    assert cells[:4] == before
    # Adam at two rates, two ways to scale at two rates and two dampings.
    assert len({(c["normalize"], c["lr"], c["damping"]) for c in cells}) == len(cells) == 2 + 8
    assert {c["lr"] for c in cells} == {1e-3, 1e6}
    assert {c["damping"] for c in cells} == {None, 0.3, 3.0}
    # GLS's steps are bounded, Adam's are not.
    far = {(c["normalize"], c["diverged"]) for c in cells if c["lr"] == 1e6}
    assert far == {(None, True), ("rms", False), ("none", False)}
    usual = [c for c in cells if c["lr"] == 1e-3 and c["normalize"] in (None, "rms")]
    assert not any(c["diverged"] for c in usual)
    assert all(c["loss"] < c["first_loss"] for c in usual)
    # Each grid's value reaches GLS.
    assert len({c["loss"] for c in usual}) == 3
    assert len({c["loss"] for c in cells if c["lr"] == 1e-3}) == 5
    # All start from the same weights and the same batch.
    assert len({c["first_loss"] for c in cells}) == 1
    assert (tmp_path / "stability-mlp.png").exists()
    once = json.dumps([c["loss"] for c in cells])
    assert run_main(*RUN, "--out", tmp_path, "--overwrite")[0] == 0
    again = read_strictly(tmp_path / "stability.json")["cells"]
    assert json.dumps([c["loss"] for c in again]) == once


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "rnn"), "invalid choice: 'rnn'"),
        (("--normalize", "best"), "--gls: "),
        (("--normalize", "rms", "rms"), "--normalize: rms rms names one twice"),
        (("--rates", "0"), "expected a number > 0, got '0'"),
        (("--dampings", "x"), "expected a number > 0, got 'x'"),
        (("--steps", "0"), "expected an integer >= 1, got '0'"),
        (("--batch-size", "2000"), "--batch-size 2000 is more than mlp has data to train on"),
        (("--gls", "damping=1"), "--gls: damping is what is gone over: use --dampings"),
        (("--gls", "dampin=1"), "--gls: unknown option 'dampin'"),
        (("--resume", "--overwrite"), "exclude each other"),
        (("--resume",), "--resume: "),
    ],
)
def test_a_bad_option_gives_one_line(tmp_path, run_main, arguments, message):
    status, output, errors = run_main(*RUN, "--out", tmp_path, *arguments)
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("error: ")
    assert message in errors


@pytest.mark.parametrize("content", ["", "{}", '{"cells": [{"task": 1}]}'])
def test_damaged_results_give_one_line(tmp_path, run_main, content):
    (tmp_path / "stability.json").write_text(content)
    status, _, errors = run_main(*RUN, "--out", tmp_path, "--resume")
    assert (status, errors) == (
        2, f"error: --resume: {tmp_path / 'stability.json'} is damaged\n"
    )  # fmt: skip
