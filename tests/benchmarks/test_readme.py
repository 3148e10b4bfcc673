"""The docs' tables: that they are what the published results give, and how they are made."""

import json
import re
from dataclasses import asdict, replace

import pytest

from benchmarks.harness.errors import InputError
from benchmarks.readme import BLOCKS, PAGES, PUBLISHED, fill

EMPTY = "".join(
    f"before\n<!-- BEGIN {name} -->\nold\n<!-- END {name} -->\nafter\n" for name in BLOCKS
)


@pytest.fixture
def published(tmp_path, run_of, config_of):
    (tmp_path / "horizon").mkdir()
    config = config_of(2, [0, 1], ["adam", "gls"])
    (tmp_path / "horizon" / "config.json").write_text(json.dumps(config))
    runs = [
        run_of(losses, optimizer=name, seed=seed)
        for name, seed, losses in (
            ("adam", 0, [0.9, 0.5]), ("adam", 1, [0.9, 0.7]),
            ("gls", 0, [0.9, 0.25]), ("gls", 1, [0.9, 0.42]),
        )
    ]  # fmt: skip
    lines = [json.dumps(asdict(record)) + "\n" for run in runs for record in run]
    (tmp_path / "horizon" / "epochs.jsonl").write_text("".join(lines))
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_is_what_its_results_give(page):
    text = page.read_text()
    assert "<!-- BEGIN " in text
    assert fill(text, PUBLISHED) == text, "run make readme"


def test_only_the_blocks_change(published):
    filled = fill(EMPTY, published)
    assert "| mlp | Adam | 0.001 | - | 0.6000 [0.5000, 0.7000] | 2 |" in filled
    assert "| mlp | GLS | 0.001 | - | 0.3350 [0.2500, 0.4200] | 2 |" in filled
    head = (
        "Best epochs:\n\n    python -m benchmarks convergence\n\nSome Processor (-), 4 threads of"
    )
    assert head in filled
    assert "<!-- BEGIN epoch -->\n<!-- END epoch -->" in filled
    assert filled.count("before\n<!-- BEGIN ") == filled.count(" -->\nafter\n") == len(BLOCKS)
    assert "old" not in filled
    assert fill(filled, published) == filled


def test_the_first_table_has_every_horizon(tmp_path, run_of, curve_of, config_of):
    for name, optimizers, epochs in (
        ("five-tasks", ("sgd-momentum", "adamw", "gls"), 2), ("horizon", ("adam", "gls"), 3)
    ):  # fmt: skip
        directory = tmp_path / name
        directory.mkdir()
        config = config_of(epochs, [0], optimizers)
        config["invocations"][0]["command"] += f" --epochs {epochs}"
        (directory / "config.json").write_text(json.dumps(config))
        losses = {"sgd-momentum": 0.6, "adamw": 0.5, "adam": 0.4, "gls": 0.25}
        runs = [run_of([0.9, losses[who], 0.9][:epochs], optimizer=who) for who in optimizers]
        records = [record for run in runs for record in run]
        (directory / "epochs.jsonl").write_text(
            "".join(json.dumps(asdict(record)) + "\n" for record in records)
        )
        curves = [
            record
            for who in optimizers
            for record in curve_of([0.9, losses[who]], optimizer=who, epochs=epochs)
        ]
        (directory / "evaluations.jsonl").write_text(
            "".join(json.dumps(asdict(record)) + "\n" for record in curves)
        )
    filled = fill(EMPTY, tmp_path)
    first = filled.split("<!-- BEGIN first -->")[1].split("<!-- END first -->")[0]
    assert "    python -m benchmarks convergence --epochs 2\n    python -m benchmarks conv" in first
    assert (
        "| mlp | digits | 2 | 0.6000 / 1.2000 | 0.5000 / 1.0000 | 0.2500 / 0.5000 | - "
        "| 0.500 / 0.500 |"
    ) in first
    assert (
        "| mlp | digits | 3 | - | - | 0.2500 / 0.5000 | 0.4000 / 0.8000 | 0.625 / 0.625 |"
    ) in first
    assert "GLS's over AdamW or Adam's" in first
    horizon = filled.split("<!-- BEGIN horizon -->")[1].split("<!-- END horizon -->")[0]
    assert "Best epochs:\n\n    python -m benchmarks convergence --epochs 3\n" in horizon
    # From .9 at step 100 to .25 at step 200, .4 is 10/13 of the way: 177 of Adam's 200.
    assert "| mlp | GLS | 0.885 | 0.885 | 0.885 | 0.885 |" in horizon


def test_stability_has_its_counts(tmp_path, run_main):
    status, _, errors = run_main(
        "stability", "--tasks", "mlp", "--dataset", "digits", "--steps", "3", "--normalize", "rms",
        "--rates", "1", "--dampings", "1", "--threads", "1", "--out", tmp_path,
    )  # fmt: skip
    assert status == 0, errors
    block = fill(EMPTY, tmp_path).split("<!-- BEGIN stability -->")[1]
    assert '| mlp | GLS, "rms" | 0 of 1 | ' in block


def test_coverage_has_its_command_and_every_model(tmp_path, run_main):
    status, _, errors = run_main(
        "coverage", "--packages", "torch", "--models", "U-Net", "DLRM", "--out", tmp_path
    )
    assert status == 0, errors
    filled = fill(EMPTY, tmp_path)
    summary = filled.split("<!-- BEGIN coverage -->")[1].split("<!-- END coverage -->")[0]
    assert summary.startswith("\n\n    python -m benchmarks ")
    assert "| **all** | 2 | " in summary
    reasons = filled.split("<!-- BEGIN coverage-reasons -->")[1]
    assert "| embedding, not tied | DLRM 100% | 1 | 100 |" in reasons
    models = filled.split("<!-- BEGIN coverage-models -->")[1]
    assert "| torch | U-Net | " in models


def test_seconds_of_models_have_the_command_of_each_run(tmp_path, run_main, monkeypatch):
    from benchmarks.models import command, run
    from benchmarks.models.cases import CASES

    # Its package is not installed, so that nothing is timed.
    case = replace(CASES["U-Net"], package="no_such_package")
    for module in (command, run):
        monkeypatch.setattr(module, "CASES", {"U-Net": case})
    for batch in (1, 3):
        status, _, errors = run_main("models", "--batch", batch, "--out", tmp_path / f"{batch}")
        assert (status, "is not installed" in errors) == (1, True)
    (tmp_path / "1" / "models.json").rename(tmp_path / "models.json")
    (tmp_path / "3" / "models.json").rename(tmp_path / "models-batch.json")
    block = fill(EMPTY, tmp_path).split("<!-- BEGIN models -->")[1]
    assert block.count("\n    python -m benchmarks ") == 2
    assert block.count("| no_such_package/U-Net | UntimedError: ") == 2


def test_timing_tables_have_their_command_and_verdict(tmp_path, run_main):
    timed = ("--threads", "1", "--rounds", "2", "--seconds", "0.001", "--batch-sizes", "32")
    status, _, errors = run_main(
        "epoch", "--tasks", "tiny", "--shapes", "cifar10", *timed, "--out", tmp_path
    )
    assert status == 0, errors
    block = fill(EMPTY, tmp_path).split("<!-- BEGIN epoch -->")[1]
    assert "\n    python -m benchmarks " in block
    assert re.search(r"\| tiny \| 32 \| [\d.]+ \| [\d.]+ \[[^]]+\] [≤>] 1\.10 \|", block)
    assert "1 threads of " in block


def test_the_command_writes_and_checks(tmp_path, published, run_main):
    readme = tmp_path / "README.md"
    readme.write_text(EMPTY)
    options = ("readme", "--pages", readme, "--published", published)
    status, output, errors = run_main(*options, "--check")
    assert (status, output, errors.count("\n")) == (1, "", 1)
    assert readme.read_text() == EMPTY
    assert run_main(*options) == (0, "", "")
    assert readme.read_text() == fill(EMPTY, published)
    assert run_main(*options, "--check") == (0, "", "")


def test_blocks_are_written_wherever_they_are(tmp_path, published, run_main):
    first, *others = EMPTY.split("before\n")[1:]
    short, long = tmp_path / "README.md", tmp_path / "benchmarks.md"
    short.write_text(first)
    long.write_text(EMPTY)
    options = ("readme", "--pages", short, long, "--published", published)
    assert run_main(*options) == (0, "", "")
    assert short.read_text() == fill(first, published) != first
    assert long.read_text() == fill(EMPTY, published)
    long.write_text(EMPTY)
    status, _, errors = run_main(*options, "--check")
    assert (status, errors.count("\n")) == (1, 1)
    assert str(long) in errors
    long.write_text("".join(others[1:]))
    status, _, errors = run_main(*options)
    assert (status, errors) == (
        2, "error: --pages: expected <!-- BEGIN first --> in one of them, got none\n"
    )  # fmt: skip
    assert long.read_text() == "".join(others[1:])


@pytest.mark.parametrize("name", BLOCKS)
def test_a_marker_that_is_missing_or_doubled_is_named(published, name):
    begin, end = f"<!-- BEGIN {name} -->", f"<!-- END {name} -->"
    for text in (
        EMPTY.replace(end, ""),
        EMPTY.replace(begin, ""),
        EMPTY + begin,
        EMPTY.replace(begin, "x").replace(end, begin).replace("x", end),
    ):
        with pytest.raises(InputError, match=f"expected {begin}"):
            fill(text, published)


def test_damaged_results_give_one_line_and_leave_readme(tmp_path, run_main):
    readme = tmp_path / "README.md"
    readme.write_text(EMPTY)
    options = ("readme", "--pages", readme, "--published")
    for content in ("{", "[]", "{}"):
        (tmp_path / "epoch.json").write_text(content)
        status, output, errors = run_main(*options, tmp_path)
        assert (status, output) == (2, "")
        assert errors == f"error: {tmp_path}: the results of epoch are damaged\n"
    status, _, errors = run_main(*options, tmp_path / "none")
    assert (status, errors) == (2, f"error: --published {tmp_path / 'none'}: no such directory\n")
    status, _, errors = run_main("readme", "--pages", readme, tmp_path / "none")
    assert (status, errors.count("\n")) == (2, 1)
    assert readme.read_text() == EMPTY
