"""The host's seconds in a step: what is timed, what is stubbed, the command."""

import os
import subprocess
import sys

import pytest
from tiny import read_strictly

from benchmarks.host.report import make_table
from benchmarks.host.run import HostOptions, Stepper, gathering, ordinary

RUN = ("host", "--layers", "1", "2", "--width", "8", "--batch", "4", "--rounds", "2")
TINY = HostOptions(layers=(2,), width=8, batch=4, rounds=1, stubbed=False)


def test_each_round_gathers_once():
    stepper = Stepper(2, TINY, gls=True)
    gathered = []
    layer = stepper.optimizer._preconditioner.layers[0]
    for _ in range(20):
        gathered.append(layer.gathers)
        stepper.run(1)
    assert [index for index, gathers in enumerate(gathered) if gathers] == [9, 19]
    steps = {"gls": list(range(20))}
    assert gathering(steps) == [9, 19]
    assert sorted([*ordinary(steps), 9, 19]) == list(range(20))


def test_command_and_table(tmp_path, run_main):
    status, printed, errors = run_main(*RUN, "--threads", 1, "--out", tmp_path)
    assert status == 0, errors
    results = read_strictly(tmp_path / "host.json")
    assert [point["layers"] for point in results["points"]] == [1, 2]
    for point in results["points"]:
        assert len(point["steps"]["gls"]) == 20
        for name, seconds in point["seconds_per_step"].items():
            assert seconds == [
                pytest.approx(sum(part) / 10)
                for part in (point["steps"][name][:10], point["steps"][name][10:])
            ]
    results["points"] = [
        {
            "layers": 7,
            "seconds_per_step": {"gls": [0.003, 0.003], "adam": [0.002, 0.0025]},
            "steps": {"gls": [0.002] * 9 + [0.012] + [0.002] * 9 + [0.012], "adam": []},
        }
    ]
    (row,) = make_table(results).rows
    assert row == (
        "7", "2.00", "12.00", "3.00", "2.25", "1.35 [1.27, 1.43]", "missed by 12.5%"
    )  # fmt: skip
    assert str(tmp_path / "report.md") in printed


def test_stubbed_launches_start_nothing_and_need_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    program = (
        "import torch\n"
        "from benchmarks.host.run import HostOptions, Stepper\n"
        "stepper = Stepper(2, HostOptions((2,), 8, 4, 1, True), gls=True)\n"
        "before = [p.clone() for p in stepper.model.parameters()]\n"
        "stepper.run(10)\n"
        "assert all(map(torch.equal, before, stepper.model.parameters()))\n"
        "assert stepper.optimizer._preconditioner.layers[0].backend_name == 'triton'\n"
        "stepper.stubbed = False\n"
        "stepper.run(1)\n"
        "assert not all(map(torch.equal, before, stepper.model.parameters()))\n"
    )
    here = os.getcwd()
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": here}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_stubbed_without_the_interpreter_is_one_line(tmp_path, run_main, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    status, _, errors = run_main(*RUN, "--stubbed", "--out", tmp_path)
    assert status == 2
    assert errors.strip() == (
        "error: --stubbed: expected TRITON_INTERPRET=1, set before Python starts"
    )
    assert not list(tmp_path.iterdir())
