"""The model of a step on GPUs: its bytes, and that it never passes for a measurement."""

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.roofline.model import (
    MODELS,
    TARGETS,
    Cost,
    adam,
    forward_and_backward,
    gls_step,
    orthogonal_step,
    total,
    update,
    walks_twice,
)
from benchmarks.roofline.report import MODELLED, make_tables
from benchmarks.workloads.sizes import Layer


def test_report_says_on_every_table_that_it_is_a_model(tmp_path, capsys):
    assert main(["roofline", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    report = (tmp_path / "report.md").read_text()
    tables = len(make_tables())
    assert report.count("## ") == tables
    assert report.count(MODELLED) == tables + 1
    assert output.count(MODELLED) >= tables
    assert output.splitlines()[-1] == str(tmp_path / "report.md")
    content = json.loads((tmp_path / "roofline.json").read_text())
    assert content["modelled"] is True
    assert len(content["steps"]) == len(MODELS)


def test_out_that_is_a_file_is_refused(tmp_path, capsys):
    path = tmp_path / "file"
    path.touch()
    assert main(["roofline", "--out", str(path)]) == 2
    assert str(path) in capsys.readouterr().err


def test_bytes_per_parameter_and_launches():
    """The table of gls_fused/backends/triton/update.py, and Adam's seven words."""
    found = [
        update(1, walks=walks, momentum=momentum)
        for walks in (False, True)
        for momentum in (False, True)
    ]
    assert [cost.bytes for cost in found] == [20.375, 28.375, 16.5, 24.5]
    assert [cost.launches for cost in found] == [4, 4, 3, 3]
    assert adam(1).bytes == 28
    assert adam(1).launches == 2
    assert adam(320 * 65536 + 1).launches == 3


def test_floor_is_the_longer_of_bytes_and_flops():
    target = TARGETS[0]
    assert Cost(target.bandwidth, 0, 1).floor(target) == 1
    assert Cost(target.bandwidth, 3 * target.flops, 1).floor(target) == 3


def test_large_models_move_fewer_bytes_than_adam():
    """Where rows are walked twice, which needs enough of them or short ones."""
    walked = {model.title: walks_twice(model.layers) for model in MODELS}
    assert [title for title, walks in walked.items() if not walks] == [MODELS[0].title]
    transformer = MODELS[-1]
    pieces = gls_step(transformer)
    assert total(list(pieces.values())).bytes < adam(transformer.parameters).bytes
    # Three of the layers, the bounds of their rates, and one of the others.
    assert pieces["update"].launches + pieces["others"].launches == 3 + 2 + 1
    # Two a layer, four of all layers and the one that counts samples.
    assert pieces["statistics"].launches == pytest.approx((2 * 48 + 4 + 1) / 10)


def test_orthogonal_step_of_a_square_weight():
    """By hand: 72 bytes around the factor and 6 in each of five steps; 3 + 1 products of n^3."""
    layer = Layer(64, 64, 4096, bias=False)
    cost = orthogonal_step(layer)
    assert cost.bytes == (72 + 5 * 6) * 64**2
    assert cost.products == 5 * 4 * 64**3
    assert forward_and_backward(layer, 100).products == 6 * 100 * 64**2
    # Products of bfloat16 count by their own peak.
    assert Cost(0, 0, 1, TARGETS[0].products).floor(TARGETS[0]) == 1


def test_orthogonal_steps_are_a_small_share_of_half_a_million_tokens():
    table = make_tables()[-1]
    most = [float(share.rstrip("%")) for share in table.rows[-1][2:]]
    assert max(most) < 3
    fewest = [float(share.rstrip("%")) for share in table.rows[0][2:]]
    assert all(few > many for few, many in zip(fewest, most, strict=True))
