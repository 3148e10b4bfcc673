"""Report and figure, on fabricated histories."""

import re

from benchmarks.convergence.plots import plot_convergence
from benchmarks.convergence.report import make_tables, render_report

OPTIMIZERS = ("sgd", "adam", "gls", "gls-sgd")


def histories(run_of):
    records = []
    for seed in (0, 1):
        shift = 0.01 * seed
        records += run_of([0.9, 0.6 + shift], seed=seed, optimizer="sgd", lr=0.1)
        records += run_of([0.6, 0.4 + shift], seed=seed, optimizer="adam")
        records += run_of([0.3, 0.2 + shift], seed=seed, optimizer="gls", seconds=1.5)
        records += run_of([0.8, 0.3 + shift], seed=seed, optimizer="gls-sgd", lr=0.1)
    for lr, loss in ((0.03, 0.9), (0.1, 0.7), (0.3, None)):
        records += run_of([loss], phase="search", optimizer="sgd", lr=lr)
    return records


def section(report: str, title: str) -> str:
    return report.split(f"## {title}\n")[1].split("\n## ", maxsplit=1)[0]


def test_report_holds_every_figure_and_its_circumstances(run_of, config_of):
    report = render_report(config_of(2, (0, 1), OPTIMIZERS), histories(run_of))
    for text in (
        "Some Processor; 4 threads, 8 cores, OMP_WAIT_POLICY PASSIVE",
        "torch 2.99, gls_fused 0.9 (backends: reference, native), Python 3.12",
        "digits, 1437 training images, 360 for validation",
        "damping=0.5",
        "`python -m benchmarks convergence` (commit abc123)",
        "](convergence.png)",
    ):
        assert text in report
    losses = section(report, "Training loss")
    assert "| mlp | GLS | 0.001 | 0.3000 [0.3000, 0.3000] | 0.2050 [0.2000, 0.2100] |" in losses
    ratio = section(report, "GLS against the best Adam")
    # 0.2/0.4 and 0.21/0.41.
    assert "| mlp | 0.001 | 0.001 | **0.506** | 0.500 | 0.512 |" in ratio
    speed = section(report, "Until GLS reaches Adam's best training loss")
    # One epoch of 1.5 s where Adam took two of 1 s.
    assert "| mlp | 0 | 0.4000 | 2 | 1 | **2.00** | 2.0 | 1.5 | **1.33** |" in speed
    same = section(report, "The same step size as SGD")
    assert "| mlp | 0.1 | 0.1 | 0.6050 [0.6000, 0.6100] | 0.3050 [0.3000, 0.3100] |" in same
    validation = section(report, "Validation")
    assert "| mlp | GLS | 0.4100 [0.4000, 0.4200] | 2.05 [2.00, 2.10] |" in validation
    seconds = section(report, "Seconds per epoch")
    assert "| mlp | GLS | 1.50 [1.50, 1.50] | 1.50 [1.50, 1.50] | - |" in seconds
    searched = section(report, "Learning rates searched")
    assert "0.03: 0.9000, **0.1: 0.7000**, 0.3: diverged" in searched


def test_best_epochs_stand_with_the_epoch_they_were(run_of, config_of):
    records = [
        *run_of([0.5, 0.4, 0.45]), *run_of([0.5, 0.45, 0.4], seed=1),
        *run_of([0.3, 0.2, 0.1], optimizer="gls"),
        *run_of([0.2, None], optimizer="gls", seed=1, epochs=3),
    ]  # fmt: skip
    best = section(render_report(config_of(3, (0, 1), ("adam", "gls")), records), "Best epochs")
    assert (
        "| mlp | Adam | 0.001 | - | 0.4000 [0.4000, 0.4000] | 2 to 3 | 0.8000 [0.8000, 0.8000] "
        "| 2 to 3 | 4.00 [4.00, 4.00] | 2 to 3 | 1.000 [1.000, 1.000] |"
    ) in best
    assert "| mlp | GLS | 0.001 | - | 0.1500 [0.1000, 0.2000] | 1 to 3 |" in best
    # .2 / .8 and .4 / .8.
    assert best.rstrip().endswith("| 0.375 [0.250, 0.500] |")


def test_shares_of_adams_way_are_interpolated(run_of, config_of, curve_of):
    # The epochs' validation losses come before those of the evaluations, and are far above.
    records = [*run_of([5.0, 4.0])]
    evaluations = curve_of([0.9, 0.5, 0.6])
    for name, losses in (("gls", [0.8, 0.4, 0.3]), ("muon", [0.9, 0.8, 0.7])):
        records += run_of([5.0, 4.0], optimizer=name)
        evaluations += curve_of(losses, optimizer=name, seconds=2.0)
    # Of runs that are not complete.
    evaluations += curve_of([0.1], optimizer="gls", seed=1) + curve_of([0.9], seed=1)
    config = config_of(2, (0, 1), ("adam", "gls", "muon"))
    shares = section(render_report(config, records, evaluations), "Until Adam's best loss")
    # From .8 at step 100 to .4 at step 200, .5 is three quarters of the way: 175 of 200 steps.
    assert "| mlp | GLS | 0.875 | 1.750 | 0.875 | 1.750 |" in shares
    assert "| mlp | Adam | 1.000 | 1.000 | 1.000 | 1.000 |" in shares
    assert "| mlp | Muon | not reached (1 of 1) | not reached (1 of 1) |" in shares


def test_adamw_stands_for_adam_where_it_is_alone(run_of, config_of):
    records = [*run_of([0.5, 0.4], optimizer="adamw"), *run_of([0.5, 0.3], optimizer="gls")]
    report = render_report(config_of(2, (0,), ("adamw", "gls")), records)
    assert "validation loss over AdamW's" in report
    assert "| mlp | GLS | 1.00 | 1.00 | - |" in section(report, "Seconds per epoch")


def test_every_table_is_well_formed(run_of, config_of):
    tables = make_tables(config_of(2, (0, 1), OPTIMIZERS), histories(run_of))
    assert len(tables) == 8
    for table in tables:
        assert all(len(row) == len(table.header) for row in table.rows)
        widths = {
            len(re.findall(r"(?<!\\)\|", line))
            for line in table.markdown().splitlines()
            if line.startswith("|")
        }
        assert widths == {len(table.header) + 1}
        assert table.terminal().row_count == len(table.rows)


def test_tables_without_runs_are_left_out(run_of, config_of):
    records = run_of([0.5, 0.4])
    titles = [table.title for table in make_tables(config_of(2, (0,), ("adam",)), records)]
    assert titles == ["Training loss", "Best epochs", "Validation", "Seconds per epoch"]


def test_a_diverged_run_is_called_so(run_of, config_of):
    records = [
        *run_of([0.5, 0.4]),
        *run_of([0.5, 0.4], seed=1),
        *run_of([0.3, None], optimizer="gls"),
        *run_of([0.3, 0.2], optimizer="gls", seed=1),
    ]
    report = render_report(config_of(2, (0, 1), ("adam", "gls")), records)
    losses = section(report, "Training loss")
    assert "| mlp | GLS | 0.001 | 0.3000 [0.3000, 0.3000] | diverged (1 of 2) |" in losses
    assert "| **0.500** | 0.500 | 0.500 |" in section(report, "GLS against the best Adam")


def test_long_runs_show_some_of_their_epochs(run_of, config_of):
    records = run_of([1 / (1 + epoch) for epoch in range(30)])
    (table, *_) = make_tables(config_of(30, (0,), ("adam",)), records)
    shown = [int(name.removeprefix("epoch ")) for name in table.header[3:]]
    assert (shown[0], shown[-1]) == (1, 30)
    assert len(shown) == 8


def test_the_figure_is_drawn_whatever_diverged(run_of, config_of, tmp_path):
    path = tmp_path / "figure.png"
    config = config_of(2, (0, 1), OPTIMIZERS)
    for records in (
        histories(run_of),
        run_of([None], epochs=2),
        [*run_of([0.5, 1e30]), *run_of([0.5, 0.4], optimizer="gls")],
        [],
    ):
        plot_convergence(config, list(records), path)
        assert path.read_bytes().startswith(b"\x89PNG")
        path.unlink()
    assert list(tmp_path.iterdir()) == []
