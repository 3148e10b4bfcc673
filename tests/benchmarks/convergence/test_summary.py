"""The comparison's figures, on fabricated histories."""

from benchmarks.convergence.summary import (
    cumulative_seconds,
    final_runs,
    first_reached,
    loss_ratios,
    second_ratios,
    speed_up,
    spread,
)


def test_speed_up_counts_whole_epochs_to_adams_best(run_of):
    adam = run_of([0.5, 0.4, 0.3, 0.2], seconds=3.0)
    gls = run_of([0.45, 0.19, 0.1, 0.05], seconds=4.0)
    found = speed_up(gls, adam)
    assert found.target == 0.2
    assert (found.baseline_epochs, found.epochs) == (4, 2)
    assert (found.baseline_seconds, found.seconds) == (12.0, 8.0)
    assert found.epoch_factor == 2.0
    assert found.second_factor == 1.5


def test_speed_up_takes_the_baselines_lowest_loss_not_its_last(run_of):
    found = speed_up(run_of([0.35, 0.3, 0.1]), run_of([0.5, 0.3, 0.6]))
    assert (found.target, found.baseline_epochs, found.epochs) == (0.3, 2, 2)


def test_an_equal_loss_counts_as_reached_and_a_larger_one_does_not(run_of):
    assert first_reached(run_of([0.4, 0.3]), 0.3) == 2
    found = speed_up(run_of([0.4, 0.31]), run_of([0.4, 0.3]))
    assert (found.epochs, found.seconds) == (None, None)
    assert (found.epoch_factor, found.second_factor) == (None, None)


def test_speed_up_with_diverged_runs(run_of):
    assert speed_up(run_of([0.1]), run_of([None], epochs=3)) is None
    partly = run_of([0.5, None], epochs=3)
    assert speed_up(run_of([0.4, 0.3, 0.2]), partly).target == 0.5
    assert speed_up(partly, run_of([0.4, 0.3, 0.2])).epochs is None


def test_ratios_pair_the_seeds(run_of):
    adam = {seed: run_of([1.0, loss], seed=seed) for seed, loss in ((0, 0.2), (1, 0.4), (2, 0.5))}
    gls = {
        0: run_of([1.0, 0.1], seed=0, seconds=2.0),
        1: run_of([1.0, 0.1], seed=1, seconds=3.0),
        2: run_of([1.0, None], seed=2),
        7: run_of([1.0, 0.1], seed=7),
    }
    assert loss_ratios(gls, adam) == [0.5, 0.25]
    assert second_ratios(gls, adam) == [2.0, 3.0, 1.0]


def test_spread_and_cumulative_seconds(run_of):
    found = spread([1.0, 2.0, 6.0])
    assert (found.mean, found.low, found.high, found.count) == (3.0, 1.0, 6.0, 3)
    assert spread([]) is None
    assert cumulative_seconds(run_of([0.3, 0.2, 0.1], seconds=2.5)) == [2.5, 5.0, 7.5]


def test_only_complete_final_runs_of_the_asked_seeds_count(run_of):
    records = [
        *run_of([0.5, 0.4]),
        *run_of([0.5, None], seed=1, epochs=2),
        *run_of([0.5], seed=2, epochs=2),
        *run_of([0.5, 0.4], seed=3),
        *run_of([0.5, 0.4], phase="search", lr=1.0),
        *run_of([0.5, 0.4, 0.3], optimizer="gls"),
    ]
    runs = final_runs(records, seeds=[0, 1, 2], epochs=2)
    assert list(runs) == [("mlp", "adam")]
    assert sorted(runs["mlp", "adam"]) == [0, 1]
