"""Parts that fail, hang or are cut off: what the others do, and what is on disk."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.device.parts import BUDGET, Setting, check_parts, more_parts
from benchmarks.device.report import write_report
from benchmarks.device.schedule import GRACE, Part, run_parts

ABOUT = {
    "title": "A check", "command": "check", "started": "now", "dry_run": False,
}  # fmt: skip
PATIENT = 60.0


def part(name, code="pass", limit=PATIENT, **options):
    return Part(name, f"Part {name}", (sys.executable, "-c", code), limit, **options)


def run(tmp_path, *parts, budget=PATIENT):
    def tell(outcomes):
        write_report(outcomes, tmp_path, tmp_path, ABOUT)

    outcomes = run_parts(parts, tmp_path, budget, tell, tmp_path)
    return {outcome.part.name: outcome for outcome in outcomes}


def report_of(tmp_path):
    return (tmp_path / "report.md").read_text()


def recording(name, rest=""):
    """A part that leaves a figure before whatever it does next."""
    return (
        "import json, pathlib, time\n"
        f"pathlib.Path('{name}.json').write_text(json.dumps("
        "{'notes': ['A note.'], 'tables': {'Figures': [{'what': 'speed', 'value': 12.5}]}}))\n"
        f"{rest}"
    )


def test_a_part_that_fails_is_reported_and_the_rest_goes_on(tmp_path):
    found = run(tmp_path, part("bad", "raise SystemExit('it broke')"), part("good"))
    assert (found["bad"].state, found["bad"].status) == ("failed", 1)
    assert found["good"].state == "ok"
    report = report_of(tmp_path)
    assert "| Part bad | failed | 1 |" in report
    assert "it broke" in report
    assert "| Part good | ok | 0 |" in report


def test_a_part_that_runs_out_of_time_leaves_what_it_had(tmp_path):
    # It does not end when it is asked to, nor does its child.
    stubborn = (
        "import signal, subprocess, sys, os\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "pathlib.Path('child').write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    found = run(tmp_path, part("slow", recording("slow", stubborn), limit=2), part("next"))
    assert found["slow"].state == "timed out"
    assert 2 <= found["slow"].seconds < 2 + GRACE + 10
    assert found["next"].state == "ok"
    assert "| speed | 12.5 |" in report_of(tmp_path)
    child = int((tmp_path / "child").read_text())
    assert is_gone(child)


def is_gone(process):
    """Ended, if perhaps not yet waited for by whoever inherited it."""
    for _ in range(100):
        try:
            os.kill(process, 0)
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_who_needs_a_part_waits_for_it_and_the_others_do_not(tmp_path):
    wait_for = "import pathlib, time\nwhile not pathlib.Path('{}').exists(): time.sleep(0.02)\n"
    leave = "import pathlib; pathlib.Path('{}').touch()"
    found = run(
        tmp_path,
        # Ends only when the part after it has.
        part("build", wait_for.format("tested") + leave.format("built"), beside=True),
        part("tests", leave.format("tested")),
        part("built-tests", "import pathlib; assert pathlib.Path('built').exists()",
             needs=("build",)),
    )  # fmt: skip
    assert [outcome.state for outcome in found.values()] == ["ok"] * 3


def test_who_needs_a_part_that_failed_is_skipped(tmp_path):
    broken = part("build", "raise SystemExit(3)", beside=True)
    found = run(tmp_path, broken, part("tests", needs=("build",)), part("rest"))
    assert found["tests"].state == "skipped"
    assert "needs build, which failed" in report_of(tmp_path)
    assert found["rest"].state == "ok"


def test_without_an_essential_part_nothing_else_runs(tmp_path):
    broken = part("machine", "raise SystemExit('no GPU')", essential=True)
    found = run(tmp_path, broken, part("rest"))
    assert [outcome.state for outcome in found.values()] == ["failed", "skipped"]
    assert "no GPU" in report_of(tmp_path)


def test_no_part_begins_without_time(tmp_path):
    found = run(tmp_path, part("long", "import time; time.sleep(600)"), part("late"), budget=3)
    assert found["long"].state == "timed out"
    assert (found["late"].state, found["late"].why) == ("skipped", "no time was left")


def test_spare_time_goes_to_the_next_parts(tmp_path):
    found = run(tmp_path, part("quick", limit=30), part("slow", limit=20), budget=1000)
    assert found["quick"].allowed == 30
    assert 30 < found["slow"].allowed <= 40


RUN = """
import sys
from pathlib import Path
from test_device_schedule import ABOUT, part, recording
from benchmarks.device.report import write_report
from benchmarks.device.schedule import run_parts
here = Path.cwd()
wait = "import os; pathlib.Path('process').write_text(str(os.getpid())); time.sleep(600)"
parts = [part("one", recording("one")), part("two", recording("two", wait)), part("three")]
tell = lambda outcomes: write_report(outcomes, here, here, ABOUT)
run_parts(parts, here, 600, tell, here)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_cut_off_leaves_a_report(tmp_path, number):
    """Even where nobody can clean up."""
    paths = os.pathsep.join([str(Path(__file__).parents[3]), str(Path(__file__).parent)])
    running = subprocess.Popen(
        [sys.executable, "-c", RUN], cwd=tmp_path, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    deadline = time.monotonic() + PATIENT
    while not (tmp_path / "process").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(number)
    error = running.communicate(timeout=PATIENT)[1]
    report = report_of(tmp_path)
    assert "| Part one | ok | 0 |" in report
    if number == signal.SIGKILL:
        # What the report said when the second part began.
        assert "| Part two | running |" in report
        os.kill(int((tmp_path / "process").read_text()), signal.SIGKILL)
    else:
        assert b"StoppedError" in error
        assert "| Part two | cut off |" in report
        assert "| Part three | skipped: the run was cut off |" in report
        # Of both parts.
        assert report.count("| speed | 12.5 |") == 2


def test_the_parts_fit_into_nine_minutes():
    setting = Setting(Path("parts"), Path("out"), None, dry_run=False)
    ahead = [part.limit for part in check_parts(setting) if not part.beside]
    assert sum(ahead) <= BUDGET
    assert BUDGET + 2 * GRACE < 540
    for parts in (check_parts(setting), more_parts(setting)):
        names = [part.name for part in parts]
        assert len(set(names)) == len(names)
        assert all(set(part.needs) <= set(names[: names.index(part.name)]) for part in parts)
