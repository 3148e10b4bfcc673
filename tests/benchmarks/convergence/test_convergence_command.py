"""The command line of convergence and demo: whole runs on digits, and what it refuses."""

import inspect
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.convergence.records import read_epochs
from benchmarks.workloads.data import Dataset
from benchmarks.workloads.optimizers import OPTIMIZERS
from gls_fused import GLS

ROOT = Path(__file__).parents[3]
RUN = ("convergence", "--dataset", "digits", "--tasks", "mlp", "--threads", "1", "--seeds", "0")


def strict_lines(path: Path) -> list[dict[str, object]]:
    def refuse(name: str) -> None:
        raise ValueError(name)

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def start(*arguments: object, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def run_main(tmp_path, capsys) -> Callable[..., tuple[int, str, str]]:
    """(status, standard output, standard error) of a run in this process."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    return run


def test_a_whole_run_writes_every_file(tmp_path):
    out = tmp_path / "results"
    process = start(
        *RUN, "--tasks", "mlp", "autoencoder", "--optimizers", "sgd", "adam", "--seeds", 0, 1,
        "--epochs", 2, "--grid-epochs", 1, "--lr", "adam=0.003", "--search-seed", 2, "--out", out,
        cwd=tmp_path,
    )  # fmt: skip
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output.splitlines()[-1] == str(out / "report.md")
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "convergence.png",
        "epochs.jsonl",
        "report.md",
    ]
    # Not a terminal: a line per epoch, no control characters.
    assert "\x1b" not in errors + output
    assert "mlp Adam lr 0.003 seed 1  epoch 2/2  train loss" in errors
    lines = strict_lines(out / "epochs.jsonl")
    final = [line for line in lines if line["phase"] == "final"]
    assert len(final) == 2 * 2 * 2 * 2
    assert {line["lr"] for line in final if line["optimizer"] == "adam"} == {0.003}
    assert all((line["validation_error"] is None) == (line["task"] != "mlp") for line in final)
    (config,) = strict_config(out)
    assert config["settings"]["environment"]["threads"] == 1
    assert config["invocations"][0]["command"].startswith("python -m benchmarks convergence")
    for task in ("mlp", "autoencoder"):
        searched = {
            line["lr"]: line["train_loss"]
            for line in lines
            if line["phase"] == "search" and line["task"] == task
        }
        # SGD's grid, extended wherever its best was at the edge.
        assert {0.03, 0.1, 0.3, 1.0} <= searched.keys()
        best = min(searched, key=lambda lr: searched[lr] or math.inf)
        chosen = [line for line in final if line["optimizer"] == "sgd" and line["task"] == task]
        assert {line["lr"] for line in chosen} == {best}
        assert len(searched) == 6 or min(searched) < best < max(searched)


def strict_config(out: Path) -> list[dict[str, object]]:
    return [json.loads((out / "config.json").read_text())]


def test_interrupted_and_resumed(tmp_path):
    out = tmp_path / "results"
    arguments = (*RUN, "--optimizers", "sgd", "adam", "--lr-grid", "off", "--epochs", 40)
    # A shell that runs the tests in the background has SIGINT ignored, and a child inherits that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start(*arguments, "--out", out, cwd=tmp_path)
    signal.signal(signal.SIGINT, before)
    path = out / "epochs.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and b'"optimizer": "adam"' in path.read_bytes():
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert last.startswith("interrupted; complete runs are kept, continue with: python -m benchma")
    assert last.endswith("--resume")
    kept = [record for record in read_epochs(path) if record.optimizer == "sgd"]
    assert len(kept) == 40
    partial = [record for record in read_epochs(path) if record.optimizer == "adam"]
    assert 0 < len(partial) < 40

    resumed = start(*arguments, "--out", out, "--resume", cwd=tmp_path)
    _, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors
    assert "SGD lr 0.1 seed 0  already complete" in errors
    records = read_epochs(path)
    # The complete run keeps even its seconds; the incomplete one was taken again, whole.
    assert records[:40] == kept
    assert [record.epoch for record in records[40:]] == list(range(1, 41))
    assert records[40].train_loss == partial[0].train_loss


def test_a_diverged_run_is_recorded_and_the_next_goes_on(tmp_path, run_main):
    out = tmp_path / "results"
    status, output, _ = run_main(
        *RUN, "--optimizers", "sgd", "adam", "--lr", "sgd=1e30", "adam=0.001", "--epochs", 2,
        "--out", out,
    )  # fmt: skip
    assert status == 0
    lines = strict_lines(out / "epochs.jsonl")
    diverged = [line for line in lines if line["optimizer"] == "sgd"]
    assert diverged[-1]["diverged"]
    assert diverged[-1]["train_loss"] is None
    assert len([line for line in lines if line["optimizer"] == "adam"]) == 2
    assert "diverged (1 of 1)" in (out / "report.md").read_text()
    assert "diverged" in output


def test_results_are_not_overwritten_by_accident(tmp_path, run_main):
    arguments = (
        *RUN,
        "--optimizers",
        "adam",
        "--lr",
        "adam=0.001",
        "--epochs",
        1,
        "--out",
        tmp_path,
    )
    assert run_main(*arguments)[0] == 0
    before = (tmp_path / "epochs.jsonl").read_bytes()
    status, _, errors = run_main(*arguments)
    assert (status, errors.count("\n")) == (2, 1)
    assert "is not empty: add --resume" in errors
    assert (tmp_path / "epochs.jsonl").read_bytes() == before
    status, _, errors = run_main(*arguments, "--batch-size", 64, "--resume")
    assert (status, errors) == (2, "error: --resume: batch_size was 128 and is 64 now\n")
    assert run_main(*arguments, "--seeds", 0, 1, "--resume")[0] == 0
    assert (tmp_path / "epochs.jsonl").read_bytes().startswith(before)
    assert len(read_epochs(tmp_path / "epochs.jsonl")) == 2
    assert run_main(*arguments, "--overwrite")[0] == 0
    assert len(read_epochs(tmp_path / "epochs.jsonl")) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "rnn"), "invalid choice: 'rnn'"),
        (("--tasks", "mlp", "mlp"), "--tasks: mlp mlp names one twice"),
        (("--optimizers", "lion"), "invalid choice: 'lion'"),
        (("--epochs", "0"), "expected an integer >= 1, got '0'"),
        (("--epochs", "many"), "expected an integer >= 1, got 'many'"),
        (("--batch-size", "-3"), "expected an integer >= 1, got '-3'"),
        (("--batch-size", "1438"), "--batch-size 1438 is more than the 1437 training images"),
        (("--seeds", "-1"), "expected an integer >= 0, got '-1'"),
        (("--seeds", "1", "1"), "--seeds: 1 1 names one twice"),
        (("--lr", "adam"), "expected NAME=VALUE"),
        (("--lr", "adam=nan"), "expected a number > 0, got 'nan'"),
        (("--lr", "lion=1"), "expected NAME=VALUE"),
        (("--optimizers", "sgd", "--lr", "adam=1"), "--lr: adam is not among --optimizers sgd"),
        (("--optimizers", "sgd", "--lr-gls", "1"), "--lr: gls is not among --optimizers sgd"),
        (("--lr-gls", "0"), "expected a number > 0, got '0'"),
        (("--lr-grid", "wide"), "--lr-grid: expected NAME=VALUE"),
        (("--lr-grid", "lion=1,2"), "--lr-grid: unknown optimizer 'lion'"),
        (("--lr-grid", "adam=1,x"), "--lr-grid adam=1,x: expected a number > 0, got 'x'"),
        (("--train-images", "0"), "--train-images 0: expected an integer >= 1"),
        (("--train-images", "rnn=5"), "--train-images: unknown task 'rnn'"),
        (("--device", "tpu"), "no such device: 'tpu'"),
        (("--device", "meta"), "expected cpu or cuda, got 'meta'"),
        (("--threads", "0"), "expected an integer >= 1, got '0'"),
        (("--dataset", "imagenet"), "invalid choice: 'imagenet'"),
        (("--dataset", "auto", "--data", "absent"), "--data absent: no such directory"),
        (("--dataset", "auto", "--data", "."), "no CIFAR-10 or Fashion-MNIST files in ."),
        (("--dataset", "patches"), "the data set patches has no labels"),
        (("--gls", "damping"), "expected KEY=VALUE, got 'damping'"),
        (("--gls", "damping=inf"), "--gls is given, but neither gls nor gls-sgd nor gls-tuned"),
        (("--gls", "damping=[1]"), "expected a number, a word or a truth value"),
        (
            ("--optimizers", "gls", "--gls", "dampin=1"),
            "--gls: unknown option 'dampin', choose",
        ),
        (
            ("--optimizers", "gls", "--gls", "process_group=1"),
            "--gls: unknown option 'process_group', choose",
        ),
        (("--optimizers", "gls", "--gls", "lr=1"), "use --lr gls=VALUE"),
        (("--optimizers", "gls", "--gls", "damping=-1"), "--gls: "),
        (("--optimizers", "gls", "--gls", "rank=few"), "--gls: "),
        (("--optimizers", "gls-sgd"), "gls-sgd runs at SGD's learning rate"),
        (("--text", "absent", "--tasks", "transformer"), "--text absent: No such file"),
        (("--schedule", "step"), "invalid choice: 'step'"),
        (("--warmup", "-1"), "expected an integer >= 0, got '-1'"),
        (("--weight-decays", "0", "1"), "--weight-decays are searched with --tries only"),
        (("--optimizers", "sgd", "--search-seed", "0"), "--search-seed 0 is among --seeds"),
        (("--optimizers", "sgd", "--tries", "2"), "--tries 2 is less than the 4 rates of sgd's"),
        (("--resume",), "--resume: results/convergence holds no config.json"),
        (("--resume", "--overwrite"), "--resume and --overwrite exclude each other"),
        (("--epoch", "3"), "unrecognized arguments: --epoch 3"),
    ],
)
def test_a_bad_option_gives_one_line(tmp_path, monkeypatch, run_main, arguments, message):
    monkeypatch.chdir(tmp_path)
    defaults = (*RUN, "--optimizers", "adam", "--lr-grid", "adam=0.001")
    status, output, errors = run_main(*defaults, *arguments)
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("error: ")
    assert message in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [(), ("converge",)])
def test_a_command_is_needed(run_main, arguments):
    status, _, errors = run_main(*arguments)
    assert (status, errors.count("\n")) == (2, 1)
    assert errors.startswith("error: ")


def test_a_corrupt_file_gives_one_line_and_no_traceback(tmp_path):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"not gzip")
    process = start("convergence", "--data", tmp_path, "--optimizers", "adam", cwd=tmp_path)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith(f"error: {tmp_path}/train-images-idx3-ubyte.gz: damaged gzip file")


def test_demo_replaces_its_results_and_ends_with_the_report(tmp_path, monkeypatch, run_main):
    monkeypatch.chdir(tmp_path)
    arguments = ("demo", "--dataset", "digits", "--tasks", "mlp", "--optimizers", "sgd", "adam")
    for _ in range(2):
        status, output, _ = run_main(*arguments, "--epochs", 1, "--threads", 1)
        assert status == 0
        assert output.splitlines()[-1] == "results/demo/report.md"
        assert "Training loss" in output
    records = read_epochs(Path("results/demo/epochs.jsonl"))
    assert {record.seed for record in records if record.phase == "final"} == {0}
    # The searches see another seed.
    assert {record.seed for record in records if record.phase == "search"} == {1000}


def test_without_files_each_task_gets_data_it_can_use(tmp_path, monkeypatch, run_main):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("benchmarks.workloads.data.SYSTEM_FASHION_MNIST", tmp_path / "absent")
    images = torch.rand(40, 3, 32, 32)
    patches = Dataset("patches", images, None, images[:5], None, 0.0, 1.0)
    small, labels = images[:, :1, :8, :8], torch.zeros(40, dtype=torch.int64)
    digits = Dataset("digits", small, labels, small[:5], labels[:5], 0.0, 1.0)
    monkeypatch.setattr(
        "benchmarks.convergence.run.load_dataset",
        lambda name, *, supervised, **_: digits if supervised else patches,
    )
    status, _, errors = run_main(
        "convergence", "--tasks", "mlp", "autoencoder", "--optimizers", "adam", "--lr-grid", "off",
        "--epochs", 1, "--batch-size", 8, "--seeds", 0, "--threads", 1,
    )  # fmt: skip
    assert status == 0, errors
    records = read_epochs(Path("results/convergence/epochs.jsonl"))
    assert {(record.task, record.dataset) for record in records} == {
        ("mlp", "digits"),
        ("autoencoder", "patches"),
    }


def test_gls_takes_sgds_learning_rate_and_its_own_options(tmp_path, run_main):
    status, _, errors = run_main(
        *RUN, "--optimizers", "gls-sgd", "sgd", "gls", "--epochs", 2, "--out", tmp_path,
        "--lr-grid", "off", "sgd=0.03,0.1,0.3", "--gls", "damping=0.5", "rank=8",
    )  # fmt: skip
    assert status == 0, errors
    records = read_epochs(tmp_path / "epochs.jsonl")
    rates = {record.optimizer: record.lr for record in records if record.phase == "final"}
    assert rates["gls-sgd"] == rates["sgd"] >= 0.1
    assert rates["gls"] == inspect.signature(GLS).parameters["lr"].default
    assert {record.optimizer for record in records if record.phase == "search"} == {"sgd"}
    (config,) = strict_config(tmp_path)
    assert config["settings"]["gls"] == {"damping": 0.5, "rank": 8}
    assert "damping=0.5, rank=8" in (tmp_path / "report.md").read_text()


def test_every_optimizer_has_the_same_tries_and_a_failing_peer_is_reported(
    tmp_path, monkeypatch, run_main
):
    class Breaking(torch.optim.SGD):
        def step(self):
            raise torch.linalg.LinAlgError("eigh: did | not converge")

    def broken(model, lr, decay, options):
        return Breaking(model.parameters(), lr=lr)

    monkeypatch.setitem(OPTIMIZERS, "soap", replace(OPTIMIZERS["soap"], make=broken, needs="json"))
    monkeypatch.setitem(OPTIMIZERS, "psgd-kron", replace(OPTIMIZERS["psgd-kron"], needs="absent"))
    arguments = (
        *RUN, "--optimizers", "adamw", "soap", "psgd-kron", "gls-tuned", "gls", "adam",
        "--epochs", 2, "--grid-epochs", 1, "--tries", 5, "--lr-grid", "auto", "adam=0.01",
        "--evaluate-every", 4, "--schedule", "cosine", "--warmup", 3, "--batch-size", 256,
        "--out", tmp_path,
    )  # fmt: skip
    status, _, errors = run_main(*arguments)
    assert status == 0, errors
    assert (
        "PSGD-Kron is left out: absent is not installed: pip install 'gls_fused[peers]'" in errors
    )
    lines = strict_lines(tmp_path / "epochs.jsonl")
    tried = {
        name: [
            (line["lr"], line["weight_decay"])
            for line in lines
            if (line["phase"], line["optimizer"]) == ("search", name)
        ]
        for name in ("adamw", "soap", "gls-tuned", "gls", "adam")
    }
    assert [len(set(pairs)) for pairs in tried.values()] == [5, 5, 5, 0, 3]
    # A grid of one rate.
    assert set(tried["adam"]) == {(0.01, decay) for decay in (0.0, 0.01, 0.1)}
    assert {line["seed"] for line in lines if line["phase"] == "search"} == {1000}
    for name in ("adamw", "gls-tuned"):
        (chosen,) = {
            (line["lr"], line["weight_decay"])
            for line in lines
            if (line["phase"], line["optimizer"]) == ("final", name)
        }
        losses = {
            (line["lr"], line["weight_decay"]): line["validation_loss"]
            for line in lines
            if (line["phase"], line["optimizer"]) == ("search", name)
        }
        assert chosen == min(losses, key=losses.get)
    evaluations = strict_lines(tmp_path / "evaluations.jsonl")
    assert [line["step"] for line in evaluations if line["optimizer"] == "gls"] == [4, 8]
    assert {line["phase"] for line in evaluations} == {"final"}
    report = (tmp_path / "report.md").read_text()
    assert "## Failures" in report
    assert "did \\| not converge" in report
    assert "- PSGD-Kron is left out: absent is not installed" in report
    assert (
        "over rates and weight decays 0, 0.01, 0.1; by the lowest validation loss, on seed 1000"
        in report
    )
    assert "- Learning rates: cosine, after 3 steps of warm-up" in report
    # Two runs of one command give the same losses.
    again = tmp_path / "again"
    assert run_main(*arguments[:-1], again)[0] == 0
    first, second = (
        [(line["train_loss"], line["validation_loss"]) for line in strict_lines(out / file)]
        for out in (tmp_path, again)
        for file in ("evaluations.jsonl",)
    )
    assert first == second


def test_our_own_failure_is_not_swallowed(tmp_path, monkeypatch, run_main):
    def broken(model, lr, decay, options):
        raise RuntimeError("ours")

    monkeypatch.setitem(OPTIMIZERS, "adam", replace(OPTIMIZERS["adam"], make=broken))
    with pytest.raises(RuntimeError, match="ours"):
        run_main(*RUN, "--optimizers", "adam", "--lr-grid", "off", "--out", tmp_path)


def test_a_text_and_sizes_of_its_own(tmp_path, run_main):
    text = tmp_path / "text"
    text.write_text("to be or not to be, that is the question. " * 100)
    out = tmp_path / "out"
    status, _, errors = run_main(
        *RUN, "--tasks", "transformer", "--optimizers", "gls", "--text", text, "--epochs", 1,
        "--batch-size", 128, "transformer=16", "--train-images", "transformer=32",
        "--validation-images", 3, "--out", out,
    )  # fmt: skip
    assert status == 0, errors
    (config,) = strict_config(out)
    data = config["settings"]["data of transformer"]
    assert (data["name"], data["train_images"], data["validation_images"]) == ("text", 32, 3)
    assert config["settings"]["batch size of transformer"] == 16
    report = (out / "report.md").read_text()
    assert "text, 32 training sequences, 3 for validation; " in report
    assert " parameters; batches of 16\n" in report
    (line,) = strict_lines(out / "epochs.jsonl")
    assert 2 < line["train_loss"] < 4
    assert 0 < line["validation_error"] < 1


def test_options_of_gls_reach_it(tmp_path, run_main):
    losses = {}
    for damping in (0.01, 100):
        out = tmp_path / str(damping)
        arguments = (*RUN, "--optimizers", "gls", "--epochs", 1, "--out", out)
        assert run_main(*arguments, "--gls", f"damping={damping}")[0] == 0
        losses[damping] = read_epochs(out / "epochs.jsonl")[0].train_loss
    assert losses[0.01] != losses[100]
