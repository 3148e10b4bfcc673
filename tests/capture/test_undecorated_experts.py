"""Experts of classes that transformers does not decorate: the steps of a layer for each expert."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from nets import linear_of, snapshot
from tolerances import SAME_STEPS, assert_near, relative_error
from torch import nn

from gls_fused import GLS

STEPS, EXPERTS, WIDTH, INNER = 6, 4, 8, 4
CONFIG = SimpleNamespace(
    hidden_size=WIDTH, num_local_experts=EXPERTS, n_routed_experts=EXPERTS, zero_expert_num=1,
    intermediate_size=INNER, expert_ffn_hidden_size=INNER, moe_intermediate_size=INNER,
    hidden_act="silu",
)  # fmt: skip
CLASSES = {
    "llama4": "Llama4TextExperts",
    "longcat_flash": "LongcatFlashExperts",
    "step3p7": "Step3p7Experts",
    "jetmoe": "JetMoeParallelExperts",
}


class Model(nn.Module):
    """Each row goes to two experts, and none to the third.

    Args:
        alone: whether every expert is two nn.Linear instead.
    """

    def __init__(self, kind, *, alone):
        super().__init__()
        path = f"transformers.models.{kind}.modeling_{kind}"
        pytest.importorskip(path)
        experts = getattr(importlib.import_module(path), CLASSES[kind])
        self.kind, self.alone, self.act = kind, alone, nn.Linear(WIDTH, WIDTH)
        if kind == "jetmoe":
            self.up, self.down = experts(EXPERTS, WIDTH, 2 * INNER), experts(EXPERTS, INNER, WIDTH)
        else:
            self.experts = experts(CONFIG)
        for p in self.parameters():
            nn.init.normal_(p, std=0.4)
        if alone:
            matrices = self.matrices()
            self.up, self.down = (nn.ModuleList(map(linear_of, each)) for each in matrices)
            self.experts = None

    def matrices(self):
        """[m, k] of all experts, of the up and of the down projection."""
        if isinstance(getattr(self, "up", None), nn.ModuleList):
            return [[layer.weight for layer in each] for each in (self.up, self.down)]
        if self.kind == "jetmoe":
            found = self.up.weight, self.down.weight
        else:
            found = self.experts.gate_up_proj, self.experts.down_proj
        # Of LongCat's last, the identity, there is a matrix that nobody uses.
        return [(x.mT if self.kind == "llama4" else x)[:EXPERTS].detach() for x in found]

    def forward(self, inputs):
        x, n = torch.tanh(self.act(inputs)), len(inputs)
        chosen = torch.tensor([0, 1, 3])
        routes = torch.stack([chosen[(torch.arange(n) + i) % 3] for i in range(2)], 1)
        scores = torch.softmax(inputs[:, :2], 1)
        if self.alone or self.kind == "jetmoe":
            return self.by_expert(x, routes, scores)
        if self.kind == "llama4":
            table = torch.zeros(n, EXPERTS).to(x).scatter(1, routes, scores)
            routed = x.repeat(EXPERTS, 1) * table.T.reshape(-1, 1)
            return self.experts(routed).view(EXPERTS, n, -1).sum(0)
        return self.experts(x, routes, scores)

    def by_expert(self, x, routes, scores):
        order = routes.flatten().argsort(stable=True)
        rows, scale = order // 2, scores.flatten()[order, None]
        sizes = torch.bincount(routes.flatten(), minlength=EXPERTS).tolist()
        # Llama 4 scales what goes in.
        before = self.kind == "llama4"
        gate, up = self.call(self.up, x[rows] * scale if before else x[rows], sizes).chunk(2, -1)
        found = self.call(self.down, nn.functional.silu(gate) * up, sizes)
        return torch.zeros_like(x).index_add(0, rows, found if before else found * scale)

    def call(self, projection, rows, sizes):
        if not self.alone:
            return projection(rows, sizes)
        parts = zip(projection, rows.split(sizes), strict=True)
        return torch.cat([layer(part) for layer, part in parts if len(part)])


def matrices_of(model):
    return [each.detach() for matrices in model.matrices() for each in matrices]


def train(model, optimizer):
    for step in range(STEPS):
        for part in range(2):
            generator = torch.Generator().manual_seed(10 * step + part)
            inputs = torch.randn(8, WIDTH, generator=generator, dtype=torch.float64)
            (model(inputs) - inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("site", ["step", "backward"])
@pytest.mark.parametrize("kind", CLASSES)
def test_trains_as_layers(kind, site):
    models = []
    for alone in (False, True):
        torch.manual_seed(0)
        models.append(Model(kind, alone=alone).double())
    ours, theirs = models
    start = [p.clone() for p in matrices_of(ours)]
    options = {"rank": 4, "curvature_every": 2, "lr": 0.02, "site": site, "normalize": "factored"}
    for model in models:
        optimizer = GLS(model, **options)
        train(model, optimizer)
        if model is ours:
            assert "share covered: 100.0%" in optimizer.report()
            assert optimizer.report().count("GLS (Experts") == 2
    for place, (p, q, before) in enumerate(zip(*map(matrices_of, models), start, strict=True)):
        assert_near(p, q, SAME_STEPS)
        routed = place % EXPERTS != 2
        assert (relative_error(p, before) > 1e-3) == routed
    assert_near(snapshot(ours.act)[0], snapshot(theirs.act)[0], SAME_STEPS)
