"""What is recorded, and how it is shown."""

import json

import pytest

from benchmarks.device.record import Record
from benchmarks.device.report import RESULTS_FILE, grid, result_of, write_report
from benchmarks.device.schedule import Outcome, Part


def test_rows_are_on_disk_as_soon_as_they_are_known(tmp_path):
    record = Record(tmp_path / "kernels.json")
    record.note("A note.")
    record.add("Times", op="x", value=1.5, seconds=[1.0, 2.0])
    record.add("Times", op="y", value=float("nan"))
    found = result_of(tmp_path, "kernels")
    assert found["notes"] == ["A note."]
    assert found["tables"]["Times"] == [
        {"op": "x", "value": 1.5, "seconds": [1.0, 2.0]},
        # JSON has no NaN, and none is to be taken for a figure.
        {"op": "y", "value": "nan"},
    ]
    assert result_of(tmp_path, "steps") is None


def test_a_table_has_the_columns_of_all_rows():
    rows = [
        {"op": "a|b", "µs": 12345.6, "seconds": [1.0]},
        {"op": "c", "µs": None, "seconds": [2.0], "why": "two\nlines"},
    ]
    assert grid(rows).splitlines() == [
        "| op | µs | why |",
        "| --- | ---: | --- |",
        r"| a\|b | 12,346 | - |",
        "| c | - | two lines |",
    ]


@pytest.mark.parametrize("state", ["ok", "failed"])
def test_the_output_of_a_part_is_shown_where_it_failed(tmp_path, state):
    (tmp_path / "ops.log").write_text("first line\nlast line\n")
    Record(tmp_path / "ops.json").add("Ops", op="x")
    outcome = Outcome(Part("ops", "Every op", ("run",), 10.0), state, 0 if state == "ok" else 1)
    about = {"title": "T", "command": "c", "started": "s", "dry_run": True}
    write_report([outcome], tmp_path, tmp_path, about)
    report = (tmp_path / "report.md").read_text()
    assert ("first line" in report) == ("last line" in report) == (state == "failed")
    assert "| x |" in report
    assert "A dry run" in report
    part = json.loads((tmp_path / RESULTS_FILE).read_text())["parts"]["ops"]
    assert part["state"] == state
    assert part["output"] == "first line\nlast line"
    assert part["result"]["tables"] == {"Ops": [{"op": "x"}]}
