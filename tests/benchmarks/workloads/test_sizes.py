"""Sizes from which models count: that they are the tasks' own."""

import pytest
import torch

from benchmarks.workloads.shapes import SHAPES
from benchmarks.workloads.sizes import TASK_MODELS, transformer
from benchmarks.workloads.tasks import TASKS


@pytest.mark.parametrize("task", TASKS)
def test_models_are_the_tasks(task):
    with torch.device("meta"):
        model = TASKS[task].build(SHAPES["text" if TASKS[task].text else "cifar10"].shape)
    assert TASK_MODELS[task](1).parameters == sum(p.numel() for p in model.parameters())


def test_transformer_has_124_million_parameters():
    assert round(transformer().parameters / 1e6) == 124
