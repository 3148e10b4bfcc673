"""What a checkpoint holds: a killed run, and one on another number of ranks, go on from it."""

import pytest
import torch
from fsdp_cases import make
from launch import HERE, torchrun
from ranks import OPTIONS, train_on_all
from tolerances import SAME_STEPS, assert_near

from gls_fused import GLS

pytestmark = pytest.mark.slow


def train(world_size, kind, folder, *options, restarts=0):
    folder.mkdir(exist_ok=True)
    finished = torchrun(
        world_size, f"--max-restarts={restarts}", HERE / "train.py", kind, folder, *options
    )
    assert not finished.returncode, finished.stdout
    return torch.load(folder / "weights", weights_only=True)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_killed_rank_loses_nothing(kind, tmp_path):
    whole = train(2, kind, tmp_path / "whole", "--last=20", "--every=5")
    options = ("--last=20", "--every=5", "--killed-at=12")
    killed = train(2, kind, tmp_path / "killed", *options, restarts=1)
    assert (tmp_path / "killed" / "attempt0").read_text() == "from step 0"
    assert (tmp_path / "killed" / "attempt1").read_text() == "from step 10"
    assert all(torch.equal(p, q) for p, q in zip(killed, whole, strict=True))


def test_reshards_to_fewer_ranks(tmp_path):
    train(4, "fsdp", tmp_path, "--last=7", "--every=7")
    resumed = train(2, "fsdp", tmp_path, "--last=20", "--every=20")
    assert (tmp_path / "attempt0").read_text() == "from step 7"
    expected = make("uneven")
    train_on_all(expected, GLS(expected, **OPTIONS), "mlp", 24)
    for p, q in zip(resumed, expected.parameters(), strict=True):
        assert_near(p, q, SAME_STEPS)
