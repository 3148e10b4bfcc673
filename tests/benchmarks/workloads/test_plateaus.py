"""The small tasks on which gradients grow, and the one on which they shrink."""

import pytest
import torch

from benchmarks.workloads import plateaus


@pytest.mark.parametrize("name", plateaus.TASKS)
def test_gradients_grow_but_for_one_task(name):
    torch.manual_seed(0)
    build, steps = plateaus.TASKS[name]
    model, loss_of = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    norms = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of().backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
        optimizer.step()
    # By twentieths of the steps, over the least one before.
    means = torch.stack(norms).view(20, -1).mean(1)
    growth = (means / means.cummin(0).values).max()
    assert (growth > 2) == (name != "regression")


@pytest.mark.parametrize("name", ["parity", "graph"])
def test_growth_makes_up_for_the_short_memory(name):
    """Without it GLS is behind Adam at Adam's rate."""
    adam, gls, without = (
        plateaus.train(name, plateaus.OPTIMIZERS[each], 1e-3, seed=23)
        for each in ("Adam", "GLS", "GLS, no growth")
    )
    assert gls < adam < without


def test_table(monkeypatch, capsys):
    tasks = {name: (build, 20) for name, (build, _) in plateaus.TASKS.items()}
    monkeypatch.setattr(plateaus, "TASKS", tasks)
    monkeypatch.setattr("sys.argv", ["plateaus", "--lr", "1e-3", "--seeds", "20"])
    plateaus.main()
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in tasks]
    assert all(row.count("|") == head.count("|") for row in rows)
