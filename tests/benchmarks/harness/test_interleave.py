"""Rounds: ratios within them, their order, the steps of a slice."""

import pytest

from benchmarks.harness.interleave import choose_steps, pair_ratios, quartiles, run_rounds, turn


class Clock:
    """A runner whose steps take a given time, for which the log says when it ran."""

    def __init__(self, name: str, log: list[tuple[str, int]], seconds: float) -> None:
        self.name, self.log, self.seconds = name, log, seconds

    def run(self, steps: int) -> float:
        self.log.append((self.name, steps))
        return steps * self.seconds


def test_ratios_are_taken_within_rounds():
    # A machine that slows down fourfold in the middle of the run.
    adam = [1.0, 1.0, 4.0, 4.0]
    gls = [1.1, 1.2, 4.4, 4.8]
    ratios = pair_ratios(gls, adam)
    assert ratios == pytest.approx([1.1, 1.2, 1.1, 1.2])
    assert quartiles(ratios).median == pytest.approx(1.15)
    assert (quartiles(ratios).low, quartiles(ratios).high) == pytest.approx((1.1, 1.2))
    assert quartiles([2.0]).low == quartiles([2.0]).high == 2.0
    with pytest.raises(ValueError, match="shorter"):
        pair_ratios(gls, adam[:3])


def test_every_round_has_every_contender_in_another_order():
    log: list[tuple[str, int]] = []
    runners = {name: Clock(name, log, 0.5) for name in "abc"}
    taken = run_rounds(runners, {"a": 2, "b": 2, "c": 1}, 6)
    assert taken == {name: [0.5] * 6 for name in "abc"}
    rounds = ["".join(name for name, _ in log[i : i + 3]) for i in range(0, 18, 3)]
    assert rounds == ["abc", "cba", "bca", "acb", "cab", "bac"]
    assert {steps for name, steps in log if name == "c"} == {1}
    assert turn(["a"], 5) == ["a"]


@pytest.mark.parametrize(
    ("adam", "expected"),
    [(0.001, 400), (0.01, 40), (0.5, 10)],
)
def test_slices_hold_the_same_steps_in_whole_periods(adam, expected):
    seconds = {"gls": 1.2 * adam, "adam": adam, "muon": 30 * adam}
    steps = choose_steps(seconds, {"gls": 10, "adam": 1, "muon": 1}, "adam", 0.4)
    assert steps == {"gls": expected, "adam": expected, "muon": expected // 10}
