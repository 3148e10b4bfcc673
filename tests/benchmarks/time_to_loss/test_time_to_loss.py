"""Time to loss: its arithmetic on fabricated curves, its interleaving, its command line."""

import math
from typing import Any

import pytest
from tiny import TINY, read_strictly

from benchmarks.time_to_loss import run as time_to_loss
from benchmarks.time_to_loss.report import bound_of, render_report, second_ratio
from benchmarks.time_to_loss.run import Reached, checkpoint_steps, reach, running_mean, target_of
from benchmarks.workloads.contenders import Trainer
from benchmarks.workloads.optimizers import OPTIMIZERS
from benchmarks.workloads.shapes import synthesise
from benchmarks.workloads.training import train

RUN = (
    "time-to-loss", "--tasks", "mlp", "--dataset", "digits", "--epochs", "2", "--seeds", "0", "1",
    "--threads", "1",
)  # fmt: skip


def fabricated_run(seed: int, gls: list[float | None]) -> dict[str, Any]:
    return {
        "seed": seed,
        "epochs": [0.5, 1.0, 1.5, 2.0],
        "adam": {"seconds": [1.0, 2.0, 3.0, 4.0], "train_loss": [None, 0.5, 0.3, 0.4]},
        "gls": {"seconds": [1.5, 3.0, 4.5, 6.0], "train_loss": gls},
        "minor_faults_per_step": {"adam": [0.0] * 4, "gls": [7.0] * 4},
    }


def fabricated(*runs: dict[str, Any], environment: dict[str, Any]) -> dict[str, Any]:
    return {
        "command": "python -m benchmarks time-to-loss",
        "started": "2026-01-01T00:00:00+00:00",
        "ended": "2026-01-01T00:01:00+00:00",
        "git_commit": None,
        "platform": "Linux",
        "load_average_before": 0.1,
        "load_average_after": 1.0,
        "environment": {**environment, "vector_instructions": "AVX2", "heap": "kept"},
        "settings": {"epochs": 5, "batch_size": 8, "checkpoints_per_epoch": 2, "gls": {}},
        "tasks": [
            {
                "task": "mlp",
                "data": "fashion-mnist",
                "train_images": 60_000,
                "lr": {"adam": 0.001, "gls": 0.002},
                "search": [{"lr": 0.001, "train_loss": 0.25}, {"lr": 1.0, "train_loss": None}],
                "runs": list(runs),
            }
        ],
    }


@pytest.fixture
def environment(config_of):
    return config_of(1, [0], ["gls"])["settings"]["environment"]


def test_the_target_is_adams_lowest_and_nothing_is_interpolated():
    run = fabricated_run(0, [None, 0.31, 0.29, 0.1])
    target = target_of(run)
    assert target == 0.3
    assert reach(run, "adam", target) == Reached(1.5, 3.0)
    assert reach(run, "gls", target) == Reached(1.5, 4.5)
    assert second_ratio(run) == pytest.approx(1.5)
    assert second_ratio(fabricated_run(0, [None, 0.9, 0.8, None])) == math.inf
    diverged = fabricated_run(0, [None, 0.3, 0.2, 0.1])
    diverged["adam"]["train_loss"] = [None] * 4
    assert target_of(diverged) is second_ratio(diverged) is None


def test_the_running_mean_is_of_an_epochs_worth_of_steps():
    assert running_mean([1.0, 2.0], 3) is None
    assert running_mean([9.0, 1.0, 2.0, 6.0], 3) == 3.0
    assert running_mean([9.0, 1.0, math.nan, 6.0], 3) is None
    assert checkpoint_steps(25, 2)[:4] == [2, 5, 8, 10]
    assert checkpoint_steps(25, 2)[9::10] == [25, 50]


def test_the_report_gives_the_median_seed_its_spread_and_the_verdict(environment):
    runs = [
        fabricated_run(0, [None, 0.3, 0.2, 0.1]),
        fabricated_run(1, [None, 0.4, 0.3, 0.1]),
        fabricated_run(2, [None, 0.4, 0.4, 0.3]),
    ]
    report = render_report(fabricated(*runs, environment=environment))
    assert "| 0.001 | 0.002 | 3 | 1.500 [1.000, 2.000] | 0.45 | missed by 233.3% |" in report
    assert "| mlp | 1 | 0.3000 | 1.5 | 1.5 | 3.00 | 4.50 | 1.500 | 1.500 | 0 / 7 |" in report
    assert "0.001: 0.2500, 1: diverged" in report
    never = [fabricated_run(seed, [None, 0.4, 0.4, 0.4]) for seed in range(2)]
    report = render_report(fabricated(*never, environment=environment))
    assert "missed: not reached" in report


def test_bounds_hold_for_what_they_were_set_for():
    task = {"task": "mlp", "data": "fashion-mnist", "train_images": 60_000}
    assert bound_of(task, 5) == bound_of({**task, "task": "cnn"}, 5) == 0.45
    assert bound_of({**task, "task": "autoencoder"}, 5) == 0.5
    assert bound_of(task, 4) is bound_of({**task, "train_images": 100}, 5) is None
    assert bound_of({**task, "data": "digits"}, 5) is None


def test_a_trainer_goes_the_way_that_a_training_run_goes():
    data = synthesise((3, 32, 32), 70)
    trainer = Trainer(TINY, data, lambda model: OPTIMIZERS["sgd"].build(model, 0.1, {}), 32, seed=3)
    losses = []
    for _ in range(4):
        trainer.step()
        losses.append(trainer.loss.item())
    epochs = train(
        TINY, data, lambda model: OPTIMIZERS["sgd"].build(model, 0.1, {}),
        seed=3, epochs=2, batch_size=32,
    )  # fmt: skip
    means = [running_mean(losses[:2], 2), running_mean(losses, 2)]
    assert [result.train_loss for result in epochs] == pytest.approx(means)


def test_the_command_alternates_and_writes_strict_json(tmp_path, monkeypatch, run_main):
    ran = []
    start = time_to_loss.Run.run

    def log(self, steps):
        ran.append((type(self.optimizer).__name__, steps))
        return start(self, steps)

    monkeypatch.setattr(time_to_loss.Run, "run", log)
    status, output, errors = run_main(*RUN, "--lr", "adam=0.003", "--out", tmp_path)
    assert status == 0, errors
    assert output.splitlines()[-1] == str(tmp_path / "report.md")
    results = read_strictly(tmp_path / "time_to_loss.json")
    (task,) = results["tasks"]
    assert (task["data"], task["steps_per_epoch"], task["search"]) == ("digits", 11, [])
    assert task["lr"] == {"gls": 1e-3, "adam": 0.003}
    assert task["gate"]["double"] < 1e-9
    # Two of a warm-up, then two a checkpoint, each the first equally often.
    assert len(ran) == 2 * (2 + 2 * 20)
    assert [name for name, _ in ran[2:10]] == [
        "GLS",
        "Adam",
        "Adam",
        "GLS",
        "Adam",
        "GLS",
        "GLS",
        "Adam",
    ]
    for name in ("GLS", "Adam"):
        assert sum(steps for who, steps in ran[2:42] if who == name) == 22
    assert [run["seed"] for run in task["runs"]] == [0, 1]
    for run in task["runs"]:
        assert run["epochs"][9::10] == [1.0, 2.0]
        for name in ("gls", "adam"):
            assert run[name]["seconds"] == sorted(run[name]["seconds"])
            assert [loss is None for loss in run[name]["train_loss"]] == [True] * 9 + [False] * 11
            assert len(run["minor_faults_per_step"][name]) == 20
        assert run["adam"]["train_loss"][19] < run["adam"]["train_loss"][9]
    assert "## Seed by seed" in (tmp_path / "report.md").read_text()


def test_the_transformer_trains_on_a_text(tmp_path, run_main):
    text = tmp_path / "text"
    text.write_text("to be or not to be, that is the question. " * 200)
    status, _, errors = run_main(
        *RUN, "--tasks", "transformer", "--text", text, "--batch-size", "4", "--epochs", "1",
        "--train-images", "40", "--seeds", "0", "--lr", "adam=0.003", "--out", tmp_path,
    )  # fmt: skip
    assert status == 0, errors
    (task,) = read_strictly(tmp_path / "time_to_loss.json")["tasks"]
    assert (task["data"], task["train_images"], task["batch_size"]) == ("text", 40, 4)
    assert task["steps_per_epoch"] == 10
    assert 2 < task["runs"][0]["gls"]["train_loss"][-1] < 4


def test_adams_rate_is_searched(tmp_path, monkeypatch, run_main):
    monkeypatch.setattr(time_to_loss, "_train_seed", lambda *_: pytest.skip("searched"))
    seen = []
    monkeypatch.setattr(
        time_to_loss, "search_rate", lambda grid, evaluate: seen.append(evaluate(grid[0])) or 0.5
    )
    with pytest.raises(pytest.skip.Exception):
        run_main(*RUN, "--out", tmp_path)
    assert 0 < seen[0] < 3


def test_a_red_gate_ends_the_command_before_any_figure(tmp_path, monkeypatch, run_main):
    monkeypatch.setattr("benchmarks.workloads.gate.TOLERANCE", -1.0)
    status, output, errors = run_main(*RUN, "--out", tmp_path)
    assert (status, output, errors.count("\n")) == (1, "", 1)
    assert errors.startswith("error: mlp, batch 128: in float64 GLS is ")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_keeps_the_seeds_it_has(tmp_path, monkeypatch, run_main):
    train_seed = time_to_loss._train_seed

    def interrupt(options, task, dataset, rates, seed):
        if seed == 1:
            raise KeyboardInterrupt
        return train_seed(options, task, dataset, rates, seed)

    monkeypatch.setattr(time_to_loss, "_train_seed", interrupt)
    status, output, errors = run_main(*RUN, "--lr", "adam=0.003", "--out", tmp_path)
    assert (status, output) == (130, "")
    assert errors.endswith("interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["time_to_loss.json"]
    (task,) = read_strictly(tmp_path / "time_to_loss.json")["tasks"]
    assert len(task["runs"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "rnn"), "invalid choice: 'rnn'"),
        (("--epochs", "0"), "expected an integer >= 1, got '0'"),
        (("--batch-size", "144"), "--batch-size 144: mlp has 1437 training images, fewer than"),
        (("--seeds", "1", "1"), "--seeds: 1 1 names one twice"),
        (("--lr", "lion=1"), "expected NAME=VALUE with a NAME among"),
        (("--lr", "adam=-1"), "expected a number > 0, got '-1'"),
        (("--lr", "muon=1"), "--lr: muon is not trained, adam and gls are"),
        (("--gls", "damp=1"), "--gls: unknown option 'damp'"),
        (("--gls", "params=1"), "--gls: unknown option 'params'"),
        (("--gls", "rank=4", "rank=8"), "--gls: rank rank names one twice"),
        (("--gls", "split=3"), "--gls: split: expected a divisor of the 512 outputs"),
        (("--seeds", str(2**63)), "expected an integer below 9223372036854775808"),
        (("--lr", "gls"), "expected NAME=VALUE"),
        (("--gls", "damping=-1"), "--gls: "),
        (("--data", "missing"), "--data missing: no such directory"),
        (("--out", "file"), "--out file"),
    ],
)
def test_a_bad_option_gives_one_line(tmp_path, monkeypatch, run_main, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    status, output, errors = run_main(*RUN, "--out", tmp_path / "out", *arguments)
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("error: ")
    assert message in errors
    assert not (tmp_path / "out" / "time_to_loss.json").exists()
