"""The files of an experiment: strict, atomic, resumable."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.convergence.records import (
    CONFIG_FILE,
    EPOCHS_FILE,
    EVALUATIONS_FILE,
    Store,
    is_complete,
    read_epochs,
    read_evaluations,
)
from benchmarks.harness.errors import InputError


def make_config(**settings: object) -> dict[str, object]:
    return {"settings": {"epochs": 2, **settings}, "invocations": [{"command": "c"}]}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "out")
    store.create(make_config(), overwrite=False)
    return store


def test_complete_means_all_epochs_or_a_divergence(run_of):
    whole = run_of([0.5, 0.4])
    assert is_complete(whole)
    assert is_complete(run_of([0.5, None], epochs=4))
    assert not is_complete(run_of([0.5, 0.4], epochs=3))
    assert not is_complete(whole[1:])
    assert not is_complete(())


def test_records_survive_the_file(store, run_of):
    records = [*run_of([0.1, 0.2]), *run_of([None], epochs=2, lr=1 / 3)]
    for record in records:
        store.append(record)
    assert read_epochs(store.directory / EPOCHS_FILE) == records


def test_evaluations_survive_the_file_and_go_with_their_run(store, run_of, curve_of):
    whole, partial = run_of([0.5, 0.4]), run_of([0.5], seed=1, epochs=2)
    for record in (*whole, *partial):
        store.append(record)
    curves = curve_of([0.5, None]), curve_of([0.5], seed=1)
    for record in (*curves[0], *curves[1]):
        store.append_evaluation(record)
    path = store.directory / EVALUATIONS_FILE
    assert read_evaluations(path) == [*curves[0], *curves[1]]
    Store(store.directory).reopen(make_config())
    assert read_evaluations(path) == curves[0]
    Store(store.directory).create(make_config(), overwrite=True)
    assert not path.exists()


def test_runs_of_two_weight_decays_are_two(store, run_of):
    (first,), (second,) = run_of([0.5]), run_of([0.25])
    store.append(first)
    store.append(replace(second, weight_decay=0.1))
    assert store.complete_run(first.key) == (first,)
    assert store.complete_run(first.key._replace(weight_decay=0.1))[0].train_loss == 0.25


def test_lines_of_before_weight_decays_are_read(tmp_path, run_of):
    (record,) = run_of([0.5])
    line = {k: v for k, v in asdict(record).items() if k not in ("weight_decay", "failure")}
    path = tmp_path / EPOCHS_FILE
    path.write_text(json.dumps(line) + "\n")
    assert read_epochs(path) == [record]
    path.write_text(json.dumps({**line, "colour": 1}) + "\n")
    with pytest.raises(InputError, match="line 1 is damaged"):
        read_epochs(path)


def test_a_non_finite_figure_is_never_written(store, run_of):
    with pytest.raises(ValueError, match="JSON compliant"):
        store.append(run_of([float("nan")])[0])


def test_reopening_drops_incomplete_runs_and_the_truncated_line(store, run_of):
    whole, partial = run_of([0.5, 0.4]), run_of([0.5], seed=1, epochs=2)
    for record in (*whole, *partial):
        store.append(record)
    path = store.directory / EPOCHS_FILE
    path.write_bytes(path.read_bytes() + b'{"phase": "fin')
    again = Store(store.directory)
    again.reopen(make_config())
    assert read_epochs(path) == list(whole)
    assert again.complete_run(whole[0].key) == whole
    assert again.complete_run(partial[0].key) is None
    config = json.loads((store.directory / CONFIG_FILE).read_text())
    assert len(config["invocations"]) == 2


def test_reopening_refuses_other_settings_but_allows_new_ones(store):
    with pytest.raises(InputError, match="--resume: epochs was 2 and is 3 now"):
        Store(store.directory).reopen(make_config(epochs=3))
    Store(store.directory).reopen(make_config(environment={"torch": "1", "cpu": "x"}))
    with pytest.raises(InputError, match='--resume: environment: torch was "1" and is "2" now'):
        Store(store.directory).reopen(make_config(environment={"torch": "2", "cpu": "x"}))


@pytest.mark.parametrize("content", ["", "[]", "{", '{"settings": 1, "invocations": []}'])
def test_reopening_refuses_a_damaged_configuration(store, content):
    (store.directory / CONFIG_FILE).write_text(content)
    with pytest.raises(InputError, match=r"config\.json is damaged"):
        Store(store.directory).reopen(make_config())


def test_reopening_needs_something_to_reopen(tmp_path):
    with pytest.raises(InputError, match="holds no config"):
        Store(tmp_path / "absent").reopen(make_config())


@pytest.mark.parametrize("line", [b"nonsense", b"[1]", b"{}", b"\xff"])
def test_a_damaged_line_before_the_last_is_an_error(tmp_path, line):
    path = tmp_path / EPOCHS_FILE
    path.write_bytes(line + b"\n")
    with pytest.raises(InputError, match="line 1 is damaged"):
        read_epochs(path)


def test_creating_refuses_a_directory_in_use(store, run_of):
    store.append(run_of([0.5])[0])
    with pytest.raises(InputError, match="is not empty: add --resume"):
        Store(store.directory).create(make_config(), overwrite=False)
    Store(store.directory).create(make_config(), overwrite=True)
    assert read_epochs(store.directory / EPOCHS_FILE) == []


def test_overwriting_spares_what_is_not_ours(tmp_path, store):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds no earlier results"):
        Store(tmp_path).create(make_config(), overwrite=True)
    (store.directory / "notes.txt").write_text("mine")
    Store(store.directory).create(make_config(), overwrite=True)
    assert (store.directory / "notes.txt").read_text() == "mine"


def test_a_file_where_the_directory_should_be_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(InputError, match=r"Not a directory|File exists"):
        Store(path).create(make_config(), overwrite=False)
