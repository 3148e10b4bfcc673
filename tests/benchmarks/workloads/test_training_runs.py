"""One run: what the seed decides, what an epoch's figures are."""

import math
import time

import pytest
import torch
from torch import nn

from benchmarks.workloads import training
from benchmarks.workloads.data import Dataset
from benchmarks.workloads.optimizers import OPTIMIZERS
from benchmarks.workloads.schedule import Schedule
from benchmarks.workloads.tasks import TASKS
from benchmarks.workloads.text import make_dataset
from benchmarks.workloads.training import Evaluations, train

BATCH = 8
IMAGE_TASKS = [task for task in TASKS.values() if not task.text]


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(27, 1, 8, 8, generator=generator)
    labels = torch.randint(10, (27,), generator=generator)
    return Dataset("random", images, labels, images[:7], labels[:7], 0.0, 1.0)


@pytest.fixture(scope="module")
def text() -> Dataset:
    return make_dataset("text", "the quick brown fox jumps over a lazy dog. " * 47)


class Recorder:
    """Steps nothing, and keeps the weights and the images' order it was shown."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = [parameter.detach().clone() for parameter in model.parameters()]
        self.gradients: list[torch.Tensor] = []
        self.parameter = next(model.parameters())

    def zero_grad(self) -> None:
        self.parameter.grad = None

    def step(self) -> None:
        assert self.parameter.grad is not None
        self.gradients.append(self.parameter.grad.clone())


def record(dataset: Dataset, seed: int, *, warm_up: bool = False) -> Recorder:
    recorders: list[Recorder] = []

    def make(model: nn.Module) -> Recorder:
        recorders.append(Recorder(model))
        return recorders[-1]

    list(train(TASKS["mlp"], dataset, make, seed=seed, epochs=2, batch_size=BATCH, warm_up=warm_up))
    return recorders[-1]


def test_the_seed_alone_decides_weights_and_batches(dataset):
    first = record(dataset, 5)
    torch.rand(11)
    again, warmed, other = record(dataset, 5), record(dataset, 5, warm_up=True), record(dataset, 6)
    # Two epochs of three whole batches; the last three images of each are dropped.
    assert len(first.gradients) == 6
    for same in (again, warmed):
        assert all(map(torch.equal, first.weights, same.weights))
        assert all(map(torch.equal, first.gradients, same.gradients))
    assert not torch.equal(first.weights[0], other.weights[0])
    assert not torch.equal(first.gradients[0], first.gradients[3])


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_an_epoch_reports_the_mean_of_its_batches_and_the_validation_set(dataset, text, task):
    dataset = text if task.text else dataset
    assert len(dataset.images) >= 27
    # A rate of zero leaves the model as the seed made it.
    (result,) = train(
        task,
        dataset,
        lambda model: torch.optim.SGD(model.parameters(), lr=0.0),
        seed=1,
        epochs=1,
        batch_size=len(dataset.images),
    )
    torch.manual_seed(1)
    model = task.build(dataset.shape)
    loss = task.loss(model(dataset.images), dataset.images, dataset.labels).item()
    # Batch norm's averages, which that forward has moved, count here.
    outputs = model.eval()(dataset.validation_images)
    validation = task.loss(outputs, dataset.validation_images, dataset.validation_labels).item()
    assert result.train_loss == pytest.approx(loss, rel=1e-5)
    assert result.validation_loss == pytest.approx(validation, rel=1e-5)
    if task.supervised:
        wrong = (outputs.argmax(-1) != dataset.validation_labels).float().mean().item()
        assert result.validation_error == pytest.approx(wrong)
    else:
        assert result.validation_error is None
    assert result.seconds > 0
    assert result.peak_memory_bytes > 2**20
    assert not result.diverged


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("task", IMAGE_TASKS, ids=lambda task: task.name)
def test_models_fit_every_image_size(task, shape):
    model = task.build(shape)
    outputs = model(torch.zeros(2, *shape))
    assert outputs.shape == (2, 10 if task.supervised else math.prod(shape))
    linear = sum(isinstance(module, nn.Linear) for module in model.modules())
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert (linear, convolutions) == {
        "mlp": (3, 0), "cnn": (2, 2), "autoencoder": (4, 0), "resnet": (1, 15)
    }[task.name]  # fmt: skip


def test_residual_networks_are_sized_for_their_images():
    sizes = {shape: count(TASKS["resnet"].build(shape)) for shape in ((3, 32, 32), (1, 28, 28))}
    assert 0.9e6 < sizes[3, 32, 32] < 1.2e6
    assert 1e5 < sizes[1, 28, 28] < 0.5e6


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_transformer_sees_the_past_alone():
    model = TASKS["transformer"].build((97, 64))
    assert 0.7e6 < count(model) < 1.2e6
    tokens = torch.randint(97, (2, 64), generator=torch.Generator().manual_seed(0))
    scores = model(tokens)
    assert scores.shape == (2, 64, 97)
    changed = tokens.clone()
    changed[:, 40] = (tokens[:, 40] + 1) % 97
    differ = (model(changed) - scores).abs().amax((0, 2))
    assert differ[:40].max() < 1e-5 < 1e-3 < differ[40:].min()
    # Positions count: one character at all of them gives different scores.
    same = model(torch.full((1, 64), 5))
    assert (same[0, 1:] - same[0, :-1]).abs().amax(1).min() > 1e-4


def test_evaluations_lie_between_epochs_and_change_nothing(dataset, monkeypatch):
    def go(evaluations):
        def sgd(model):
            return torch.optim.SGD(model.parameters(), lr=0.1)

        return list(
            train(
                TASKS["resnet"],
                dataset,
                sgd,
                seed=0,
                epochs=4,
                batch_size=BATCH,
                evaluations=evaluations,
            )
        )

    found = []
    plain, evaluated = go(None), go(Evaluations(2, found.append))
    assert [e.train_loss for e in plain] == [e.train_loss for e in evaluated]
    # Three batches an epoch, so evaluations cross its ends.
    assert [e.step for e in found] == [2, 4, 6, 8, 10, 12]
    means = [sum(e.train_loss for e in part) / len(part) for part in (found, plain)]
    assert means[0] == pytest.approx(means[1])
    assert found[-1].validation_loss == evaluated[-1].validation_loss
    assert found[-1].validation_error == evaluated[-1].validation_error
    assert [e.seconds for e in found] == sorted(e.seconds for e in found)
    assert found[-1].seconds == pytest.approx(sum(e.seconds for e in evaluated), rel=0.2)

    # An evaluation takes no time of the training's, and leaves out none of it.
    def slow(*_):
        time.sleep(0.2)
        return 1.0, 0.5

    train_step = training._train_step

    def slow_step(*arguments):
        time.sleep(0.02)
        return train_step(*arguments)

    monkeypatch.setattr(training, "validate", slow)
    monkeypatch.setattr(training, "_train_step", slow_step)
    found.clear()
    slowed = go(Evaluations(1, found.append))
    for seconds in (sum(e.seconds for e in slowed), found[-1].seconds):
        assert 0.02 * 12 < seconds < 0.2 * len(found)


def test_a_schedule_is_followed_over_the_whole_run(dataset):
    rates = []

    class Noting(torch.optim.SGD):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            super().step()

    list(
        train(
            TASKS["mlp"], dataset, lambda model: Noting(model.parameters(), lr=0.1),
            seed=0, epochs=2, batch_size=BATCH, schedule=Schedule("linear", 2), warm_up=True,
        )
    )  # fmt: skip
    # Twelve steps on a copy come first, which a schedule does not know.
    assert rates[:12] == [0.1] * 12
    assert rates[12:] == pytest.approx([0.05, 0.1, 0.1, 0.075, 0.05, 0.025])


def test_a_diverging_run_ends_with_that_epoch(dataset):
    results = list(
        train(
            TASKS["mlp"],
            dataset,
            lambda model: torch.optim.SGD(model.parameters(), lr=1e30),
            seed=0,
            epochs=5,
            batch_size=BATCH,
        )
    )
    assert len(results) < 5
    assert results[-1].diverged
    assert results[-1].train_loss is None
    assert results[-1].validation_error is None


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss(dataset, name):
    spec = OPTIMIZERS[name]
    if spec.missing() is not None:
        pytest.skip(spec.missing())
    results = list(
        train(
            TASKS["cnn"],
            dataset,
            lambda model: spec.build(model, spec.rate, {}),
            seed=0,
            epochs=12,
            batch_size=BATCH,
        )
    )
    assert results[-1].train_loss < 0.99 * results[0].train_loss
