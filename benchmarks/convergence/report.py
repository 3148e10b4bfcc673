"""The tables of a convergence experiment, as Markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.convergence.cells import number, rate, spread_cell, title
from benchmarks.convergence.records import PLOT_FILE, EpochRecord, EvaluationRecord
from benchmarks.convergence.search_report import SELECTED, by_run, make_search_table
from benchmarks.convergence.summary import (
    BASELINE,
    CHALLENGER,
    BySeed,
    SpeedUp,
    Spread,
    baseline_of,
    epoch_steps,
    final_runs,
    last_loss,
    loss_ratios,
    second_ratios,
    seconds_per_epoch,
    speed_up,
    spread,
)
from benchmarks.convergence.target_report import (
    make_best_table,
    make_failure_table,
    make_share_table,
)
from benchmarks.convergence.targets import curves_of
from benchmarks.harness.environment import hardware_of
from benchmarks.harness.tables import NOTHING, Table
from benchmarks.workloads.tasks import TASKS

SAME_STEP, SAME_STEP_BASELINE = "gls-sgd", "sgd"
MOST_EPOCH_COLUMNS = 8

Runs = Mapping[tuple[str, str], BySeed]


def make_tables(
    config: Mapping[str, Any],
    records: Sequence[EpochRecord],
    evaluations: Sequence[EvaluationRecord] = (),
) -> list[Table]:
    """Every table that the recorded runs have something for."""
    settings = config["settings"]
    runs = final_runs(records, config["seeds"], settings["epochs"])
    tasks, optimizers = config["tasks"], config["optimizers"]
    order = [(task, name) for task in tasks for name in optimizers if (task, name) in runs]
    baseline = baseline_of(optimizers)
    steps = {task: epoch_steps(settings, task) for task in tasks}
    tables = [
        _loss_table(runs, order, settings["epochs"]),
        make_best_table(runs, order, baseline),
        make_share_table(curves_of(runs, evaluations, steps), order, baseline),
        _ratio_table(runs, tasks),
        _speed_up_table(runs, tasks),
        _same_step_table(runs, tasks),
        _validation_table(runs, order),
        _seconds_table(runs, order, baseline),
        make_search_table(records, order, config),
        make_failure_table(by_run(records)),
    ]
    return [table for table in tables if table.rows]


def render_report(
    config: Mapping[str, Any],
    records: Sequence[EpochRecord],
    evaluations: Sequence[EvaluationRecord] = (),
) -> str:
    """The whole report.md."""
    sections = [
        "# Convergence",
        _setting(config),
        f"![Training and validation loss over epochs and seconds]({PLOT_FILE})",
        *(table.markdown() for table in make_tables(config, records, evaluations)),
    ]
    return "\n\n".join(sections) + "\n"


def _setting(config: Mapping[str, Any]) -> str:
    settings = config["settings"]
    environment = settings["environment"]
    lines = [
        f"- Hardware: {hardware_of(environment)}; {environment['threads']} threads, "
        f"{environment['cores']} cores, "
        f"OMP_WAIT_POLICY {environment['omp_wait_policy'] or 'unset'}",
        f"- Versions: torch {environment['torch']}, gls_fused {environment['gls_fused']} "
        f"(backends: {', '.join(environment['backends'])}), Python {environment['python']}",
    ]
    for task in config["tasks"]:
        data = settings[f"data of {task}"]
        lines.append(
            f"- {TASKS[task].title}: {data['name']}, {data['train_images']} training "
            f"{'sequences' if TASKS[task].text else 'images'}, "
            f"{data['validation_images']} for validation; {data['parameters']} parameters"
            + (
                f"; batches of {settings[own]}"
                if (own := f"batch size of {task}") in settings
                else ""
            )
        )
    seeds = ", ".join(str(seed) for seed in config["seeds"])
    lines.append(
        f"- {settings['epochs']} epochs, batches of {settings['batch_size']}, seeds {seeds}; "
        "a seed gives every optimizer the same initial weights and the same batches"
    )
    lines += _protocol(config)
    if settings["gls"]:
        options = ", ".join(f"{name}={value}" for name, value in settings["gls"].items())
        lines.append(f"- GLS options other than its defaults: {options}")
    for invocation in config["invocations"]:
        commit = invocation["git_commit"] or "unknown"
        lines.append(f"- `{invocation['command']}` (commit {commit})")
    return "\n".join(lines)


def _protocol(config: Mapping[str, Any]) -> list[str]:
    """What was searched, how rates went, and who is not there."""
    settings, lines = config["settings"], []
    schedule = settings.get("schedule", {"kind": "constant", "warmup": 0})
    if schedule != {"kind": "constant", "warmup": 0}:
        lines.append(
            f"- Learning rates: {schedule['kind']}, after {schedule['warmup']} steps of warm-up"
        )
    search = settings.get("search", {"tries": None})
    if search["tries"] is not None:
        decays = ", ".join(f"{decay:g}" for decay in search["weight_decays"])
        lines.append(
            f"- Search: {search['tries']} runs of {settings['grid_epochs']} epochs for each "
            f"optimizer that is searched, over rates and weight decays {decays}; by the "
            f"{SELECTED[search['select']]}, on seed {search['seed']}, which no other run has"
        )
    for name, why in config.get("left_out", {}).items():
        lines.append(f"- {title(name)} is left out: {why}")
    return lines


def _loss_table(runs: Runs, order: Sequence[tuple[str, str]], epochs: int) -> Table:
    shown = _shown_epochs(epochs)
    rows = []
    for task, name in order:
        by_seed = runs[task, name]
        cells = [_epoch_cell(by_seed, epoch) for epoch in shown]
        rows.append((title(task), title(name), rate(by_seed), *cells))
    return Table(
        "Training loss",
        "Mean of the minibatch losses during the epoch; over the seeds: mean [least, greatest].",
        ("task", "optimizer", "lr", *(f"epoch {epoch}" for epoch in shown)),
        tuple(rows),
    )


def _shown_epochs(epochs: int) -> list[int]:
    if epochs <= MOST_EPOCH_COLUMNS:
        return list(range(1, epochs + 1))
    step = (epochs - 1) / (MOST_EPOCH_COLUMNS - 1)
    return sorted({round(1 + index * step) for index in range(MOST_EPOCH_COLUMNS)})


def _epoch_cell(by_seed: BySeed, epoch: int) -> str:
    losses = []
    for run in by_seed.values():
        loss = run[epoch - 1].train_loss if epoch <= len(run) else None
        if loss is not None:
            losses.append(loss)
    diverged = len(by_seed) - len(losses)
    if diverged:
        return f"diverged ({diverged} of {len(by_seed)})"
    return spread_cell(spread(losses))


def _ratio_table(runs: Runs, tasks: Sequence[str]) -> Table:
    rows = []
    for task in tasks:
        if (task, CHALLENGER) not in runs or (task, BASELINE) not in runs:
            continue
        challenger, baseline = runs[task, CHALLENGER], runs[task, BASELINE]
        ratios = spread(loss_ratios(challenger, baseline))
        rows.append(
            (
                title(task),
                rate(challenger),
                rate(baseline),
                *((NOTHING,) * 3 if ratios is None else _mean_low_high(ratios)),
            )
        )
    return Table(
        "GLS against the best Adam",
        "GLS's training loss of the last epoch divided by Adam's, per seed; Adam at the best "
        "learning rate of its grid. Below 1 GLS is ahead. Runs that diverged are left out.",
        ("task", "GLS lr", "Adam lr", "ratio, mean", "least", "greatest"),
        tuple(rows),
        labels=1,
    )


def _speed_up_table(runs: Runs, tasks: Sequence[str]) -> Table:
    rows = []
    for task in tasks:
        challenger = runs.get((task, CHALLENGER), {})
        baseline = runs.get((task, BASELINE), {})
        for seed in sorted(challenger.keys() & baseline.keys()):
            found = speed_up(challenger[seed], baseline[seed])
            if found is not None:
                rows.append((title(task), str(seed), *_speed_up_cells(found)))
    return Table(
        "Until GLS reaches Adam's best training loss",
        "Epochs, and seconds of training, up to the end of the first epoch at or below Adam's "
        "lowest training loss; nothing is interpolated.",
        (
            "task",
            "seed",
            "target",
            "Adam epochs",
            "GLS epochs",
            "factor",
            "Adam s",
            "GLS s",
            "factor",
        ),
        tuple(rows),
    )


def _speed_up_cells(found: SpeedUp) -> tuple[str, ...]:
    if found.epochs is None or found.epoch_factor is None:
        epochs, epoch_factor = "not reached", NOTHING
    else:
        epochs, epoch_factor = str(found.epochs), f"**{found.epoch_factor:.2f}**"
    if found.seconds is None or found.second_factor is None:
        seconds, second_factor = "not reached", NOTHING
    else:
        seconds, second_factor = f"{found.seconds:.1f}", f"**{found.second_factor:.2f}**"
    return (
        number(found.target),
        str(found.baseline_epochs),
        epochs,
        epoch_factor,
        f"{found.baseline_seconds:.1f}",
        seconds,
        second_factor,
    )


def _same_step_table(runs: Runs, tasks: Sequence[str]) -> Table:
    rows = []
    for task in tasks:
        if (task, SAME_STEP) not in runs or (task, SAME_STEP_BASELINE) not in runs:
            continue
        challenger, baseline = runs[task, SAME_STEP], runs[task, SAME_STEP_BASELINE]
        ratios = spread(loss_ratios(challenger, baseline))
        rows.append(
            (
                title(task),
                rate(baseline),
                rate(challenger),
                _last_cell(baseline),
                _last_cell(challenger),
                NOTHING if ratios is None else f"**{spread_cell(ratios)}**",
            )
        )
    return Table(
        "The same step size as SGD",
        "GLS's direction at the length of SGD's step, at SGD's best learning rate: training loss "
        "of the last epoch, and the ratio per seed.",
        ("task", "SGD lr", "GLS lr", "SGD", "GLS", "ratio"),
        tuple(rows),
        labels=1,
    )


def _validation_table(runs: Runs, order: Sequence[tuple[str, str]]) -> Table:
    rows = []
    for task, name in order:
        finished = [run for run in runs[task, name].values() if not run[-1].diverged]
        losses = [run[-1].validation_loss for run in finished]
        errors = [run[-1].validation_error for run in finished]
        rows.append(
            (
                title(task),
                title(name),
                spread_cell(spread(loss for loss in losses if loss is not None)),
                spread_cell(spread(100 * error for error in errors if error is not None), 2),
            )
        )
    return Table(
        "Validation",
        "After the last epoch; over the seeds that did not diverge.",
        ("task", "optimizer", "loss", "error, %"),
        tuple(rows),
    )


def _seconds_table(runs: Runs, order: Sequence[tuple[str, str]], baseline: str) -> Table:
    rows = []
    for task, name in order:
        by_seed = runs[task, name]
        reference = runs.get((task, baseline))
        ratios = spread(second_ratios(by_seed, reference)) if reference else None
        records = [record for run in by_seed.values() for record in run]
        # The CPU's figure is the whole process's, so it compares no optimizers.
        memory = [
            record.peak_memory_bytes / 2**20
            for record in records
            if record.peak_memory_kind == "max_memory_allocated"
        ]
        rows.append(
            (
                title(task),
                title(name),
                spread_cell(spread(seconds_per_epoch(run) for run in by_seed.values()), 2),
                NOTHING if ratios is None else spread_cell(ratios, 2),
                f"{max(memory):.0f}" if memory else NOTHING,
            )
        )
    return Table(
        "Seconds per epoch",
        f"Training only, mean over the epochs; the ratio to {title(baseline)} is taken seed by "
        "seed, each seed's runs having followed one another. Peak memory is the allocator's on "
        "the GPU.",
        ("task", "optimizer", "seconds", f"over {title(baseline)}'s", "peak MiB"),
        tuple(rows),
    )


def _last_cell(by_seed: BySeed) -> str:
    losses = [last_loss(run) for run in by_seed.values()]
    finite = [loss for loss in losses if loss is not None]
    return spread_cell(spread(finite)) if len(finite) == len(losses) else "diverged"


def _mean_low_high(values: Spread) -> tuple[str, str, str]:
    return f"**{values.mean:.3f}**", f"{values.low:.3f}", f"{values.high:.3f}"
