"""The scaling experiment: its fits on fabricated points, its gate, its command line."""

from typing import Any

import pytest
from tiny import read_strictly

from benchmarks.scaling import run as scaling
from benchmarks.scaling.report import render_report
from benchmarks.scaling.run import Point, extra_seconds, fit_power, make_task

RUN = (
    "scaling", "--sweeps", "rank", "--rank", "2", "4", "--rounds", "2", "--seconds", "0.001",
    "--threads", "1",
)  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr("benchmarks.scaling.command.Point", lambda: Point(8, 16, 2, 4))


def fabricated(environment: dict[str, Any]) -> dict[str, Any]:
    def point(value: int, gls: float) -> dict[str, Any]:
        return {
            "sweep": "width",
            "value": value,
            "seconds_per_step": {"gls": [gls] * 2, "adam": [0.5] * 2, "sgd": [0.25] * 2},
            "minor_faults_per_step": {"gls": [3.0], "adam": [2.0], "sgd": [1.0]},
        }

    return {
        "command": "python -m benchmarks scaling",
        "started": "2026-01-01T00:00:00+00:00",
        "ended": "2026-01-01T00:01:00+00:00",
        "git_commit": None,
        "platform": "Linux",
        "load_average_before": 0.1,
        "load_average_after": 1.0,
        "environment": {**environment, "vector_instructions": "AVX2", "heap": "kept"},
        "settings": {"base": {"batch": 1, "width": 2, "depth": 3, "rank": 4}, "rounds": 2,
                     "slice_seconds": 0.1, "lr": 1e-8},
        # What is added grows as the square: .25, 1, 4, and one point where nothing is.
        "points": [point(1, 0.5), point(2, 1.25), point(4, 4.25), point(8, 0.2)],
    }  # fmt: skip


def test_exponents_and_their_standard_errors():
    fit = fit_power([1, 2, 4, 8], [3, 12, 48, 192])
    assert (fit.exponent, fit.error) == (pytest.approx(2), pytest.approx(0, abs=1e-7))
    # Residuals -e, 2 e, -e about a line of slope 1 over x = -1, 0, 1: an error of sqrt(3) e.
    tilted = fit_power([0.1, 1, 10], [0.1 / 1.1, 1.1**2, 10 / 1.1])
    assert tilted.exponent == pytest.approx(1)
    assert tilted.error == pytest.approx(3**0.5 * 0.0413926852)
    assert fit_power([1, 2], [1, 2]).error is None
    assert fit_power([1, 2, 3], [1, 4, -1]).exponent == pytest.approx(2)
    assert fit_power([1, 2], [1, 0]) is None


def test_what_is_added_is_taken_within_rounds():
    assert extra_seconds({"gls": [3.0, 13.0], "sgd": [1.0, 10.0]}) == [2.0, 3.0]


def test_the_report_of_fabricated_points(config_of):
    report = render_report(fabricated(config_of(1, [0], ["gls"])["settings"]["environment"]))
    assert "| width | 1 to 8 | 3 of 4 | 2.00 ± 0.00 |" in report
    assert (
        "| width | 2 | 1250.000 | 500.000 | 250.000 | 1000000 [1000000, 1000000] | 5.000 " in report
    )
    assert "| 3 / 2 / 1 |" in report
    assert "3 hidden layers of width 2" in report


def test_a_point_is_a_model_of_its_size():
    model = make_task(Point(width=16, depth=5)).build((1, 1, 16))
    sizes = [tuple(p.shape) for p in model.parameters() if p.ndim == 2]
    assert sizes == [(16, 16)] * 5 + [(10, 16)]


def test_the_command_varies_what_it_is_asked_to(tmp_path, monkeypatch, run_main):
    ranks = []
    gls = scaling.GLS
    monkeypatch.setattr(
        scaling, "GLS", lambda model, **kw: ranks.append(kw["rank"]) or gls(model, **kw)
    )
    status, output, errors = run_main(*RUN, "--out", tmp_path)
    assert status == 0, errors
    assert output.splitlines()[-1] == str(tmp_path / "report.md")
    results = read_strictly(tmp_path / "scaling.json")
    assert ranks == [2, 4] == [point["rank"] for point in results["points"]]
    for point in results["points"]:
        assert (point["batch"], point["width"], point["depth"]) == (8, 16, 2)
        assert point["gate"]["double"] < 1e-9
        for name in ("gls", "adam", "sgd"):
            assert len(point["seconds_per_step"][name]) == 2
            assert len(point["minor_faults_per_step"][name]) == 2
    assert "## Exponents" in (tmp_path / "report.md").read_text()


def test_a_red_gate_ends_the_command_before_any_figure(tmp_path, monkeypatch, run_main):
    monkeypatch.setattr("benchmarks.workloads.gate.TOLERANCE", -1.0)
    status, output, errors = run_main(*RUN, "--out", tmp_path)
    assert (status, output, errors.count("\n")) == (1, "", 1)
    assert "in float64 GLS is " in errors
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_keeps_the_points_it_has(tmp_path, monkeypatch, run_main):
    measure = scaling._measure_point

    def interrupt(options, point):
        if point.rank == 4:
            raise KeyboardInterrupt
        return measure(options, point)

    monkeypatch.setattr(scaling, "_measure_point", interrupt)
    status, output, _ = run_main(*RUN, "--out", tmp_path)
    assert (status, output) == (130, "")
    assert [path.name for path in tmp_path.iterdir()] == ["scaling.json"]
    assert len(read_strictly(tmp_path / "scaling.json")["points"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sweeps", "height"), "invalid choice: 'height'"),
        (("--rank", "0"), "expected an integer >= 1, got '0'"),
        (("--width", "8", "8"), "--width: 8 8 names one twice"),
        (("--rounds", "0"), "expected an integer >= 1, got '0'"),
        (("--seconds", "nan"), "expected a number > 0, got 'nan'"),
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
