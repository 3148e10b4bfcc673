"""Bars in a terminal, lines elsewhere; both count what is done."""

import io

import pytest
from rich.console import Console

from benchmarks.harness.progress import LiveReporter, PlainReporter, make_reporter


@pytest.mark.parametrize("terminal", [True, False])
def test_epochs_of_a_diverged_and_of_a_skipped_run_count_as_done(run_of, terminal):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=150)
    with (LiveReporter if terminal else PlainReporter)(console) as reporter:
        reporter.expect(6)
        reporter.start_run("mlp Adam", 4, 3)
        for record in run_of([0.25, None], epochs=4):
            for _ in range(3):
                reporter.batch()
            reporter.epoch(record)
        reporter.expect(2)
        reporter.skip_run("mlp SGD", 4)
    shown = screen.getvalue()
    assert ("\x1b" in shown) == terminal
    assert "8/8" in shown
    if not terminal:
        assert shown.splitlines() == [
            "[1/6] mlp Adam  epoch 1/4  train loss 0.2500  1.0 s",
            "[4/6] mlp Adam  epoch 2/4  diverged",
            "[8/8] mlp SGD  already complete",
        ]


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_reporter(), PlainReporter)
