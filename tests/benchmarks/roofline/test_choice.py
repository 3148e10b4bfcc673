"""Whose kernels an op takes on CUDA devices: the table of the package is what the model gives."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.__main__ import main
from benchmarks.roofline import choice, command
from benchmarks.roofline.choice import BLEND_OPS, OPS, SAMPLE_OPS, Launch, decide, render
from benchmarks.roofline.model import TARGETS
from gls_fused import reference
from gls_fused.capture.rows import take_sample

ROOT = Path(__file__).parents[3]


def test_table_is_what_the_model_gives():
    """`python -m benchmarks roofline --choose` writes it anew."""
    assert command.CHOICES.read_text() == render(decide())


def test_choice_does_not_hang_on_what_a_launch_takes():
    by_launch = [{x.op: x.backend for x in decide(launch=cost)} for cost in (1e-6, 2.5e-6, 5e-6)]
    assert by_launch[0] == by_launch[1] == by_launch[2]
    assert set(by_launch[0].values()) == {"triton", "native"}


def test_few_blocks_reach_their_share_of_a_gpu():
    target = TARGETS[0]
    assert Launch(target.bandwidth, target.flops / 2).seconds(target, 3) == 3 + 1
    assert Launch(0, target.flops, blocks=target.processors / 4).work(target) == 4
    assert Launch(0, wide=target.doubles, products=target.products).work(target) == 2


def test_what_was_measured_of_both_stands_in_the_models_place(tmp_path, monkeypatch, capsys):
    modelled = {x.op: x for x in decide()}
    other = {"triton": "native", "native": "triton"}
    mine, its = modelled["invert_cores"].backend, other[modelled["invert_cores"].backend]

    def row(backend, op, of, taken):
        return {"layers": "MLP", "op": op, "of": of, "backend": backend, "µs": taken}

    rows = [
        row(mine, "invert_cores", "3 layers", 20.0), row(its, "invert_cores", "3 layers", 10.0),
        row(mine, "invert_cores", "of one alone", 1e-9),
        row("torch fused", "Adam.step", "all", 1.0),
    ]  # fmt: skip
    rows += [
        row(other[modelled[op].backend], op, "of one alone", 1e-9)
        for op in OPS.keys() - {"invert_cores"}
    ]
    facts = [{"what": "device", "value": 'NVIDIA "H100"'}]
    results = {
        "dry_run": False,
        "parts": {
            "environment": {"result": {"tables": {"Machine": facts}}},
            "kernels": {"result": {"tables": {"Kernels": rows}}},
            "steps": {"result": None},
        },
    }
    measured = tmp_path / "results.json"
    measured.write_text(json.dumps(results))
    monkeypatch.setattr(command, "CHOICES", tmp_path / "choices.py")
    given = ["roofline", "--out", str(tmp_path / "out"), "--choose", "--measured", str(measured)]
    assert main(given) == 0
    found = {}
    exec((tmp_path / "choices.py").read_text(), found)
    assert found["CHOICES"]["invert_cores"] == (its, 'measured on NVIDIA "H100"')
    for op in OPS.keys() - {"invert_cores"}:
        assert found["CHOICES"][op] == (modelled[op].backend, modelled[op].why)
    for damaged, why in (({}, "KeyError"), ({**results, "dry_run": True}, "a dry run measures")):
        measured.write_text(json.dumps(damaged))
        assert main(given) == 2
        error = capsys.readouterr().err
        assert f"--measured {measured}: expected results.json of device_check.sh: " in error
        assert why in error


class _OpCounter(TorchDispatchMode):
    """Ops that are launches on a device."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += not op.is_view
        return op(*args, **(kwargs or {}))


def test_ops_of_torchs_are_counted():
    sums, one = torch.ones(2 + 9 + 24), torch.ones(())
    basis, core, rows = torch.eye(8)[:, :3], torch.eye(3), torch.ones(9, 8)
    draw = torch.zeros((), dtype=torch.int64)
    # Poison is an op too.
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        with _OpCounter() as blending:
            reference.blend_subspace(basis, core, one, one, sums, 0.9)
        with _OpCounter() as sampling:
            take_sample(rows, 4, draw)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    assert blending.count == BLEND_OPS
    # Less the one that reads the rows.
    assert sampling.count - 1 == SAMPLE_OPS


def test_sizes_are_those_of_the_kernels():
    headers = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.h"))
    for name, value in (
        ("kProjectRows", choice.PROJECT_ROWS),
        ("kMoveColumns", choice.MOVE_COLUMNS),
    ):
        assert re.search(rf"{name} = (\d+);", headers)[1] == str(value), name
    # By bytes of an element.
    assert "tile_rows(int bytes) { return 16 * bytes; }" in headers
    assert "tile_columns(int bytes) { return 512 / bytes; }" in headers
    assert (choice.TILE_ROWS, choice.TILE_COLUMNS) == (16 * 4, 512 // 4)
    pytest.importorskip("triton")
    from gls_fused.backends.triton import configs

    assert configs.row_tile(32).rows == choice.WALK_ROWS
    assert configs.walks_twice(128, 2049)
    assert configs.walks_twice(127, 2048)
    assert not configs.walks_twice(127, 2049)
    assert configs.update_tile(32)[:2] == (choice.UPDATE_ROWS, choice.UPDATE_COLUMNS)
    assert configs.sketch_tile().columns == choice.SKETCH_COLUMNS
    assert configs.basis_tile(32).rows == choice.BASIS_ROWS
