"""The models' seconds: what a round is, what is refused, the table, the command."""

import warnings

import pytest
import torch
from tiny import read_strictly
from torch import nn

from benchmarks.coverage.models import MODELS
from benchmarks.models import cases, command, run
from benchmarks.models.cases import CASES, Case
from benchmarks.models.report import make_table, render_report
from benchmarks.models.run import KINDS, ModelOptions, Stepper, measure_model, ratios, shares
from gls_fused import GLS


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 4),
    )  # fmt: skip


class Uncalled(nn.Module):
    """Half of its parameters are in a layer that GLS covers and nobody calls."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.first(x) + (self.second.weight * 1.0).sum() + self.second.bias.sum()


def vectors(count):
    inputs = torch.randn(count, 3)
    return lambda model: model(inputs).square().mean()


def language():
    return nn.Sequential(nn.Embedding(cases.VOCABULARY, 4), nn.LSTM(4, 4), nn.Linear(4, 8))


TINY = {
    case.name: case
    for case in (
        Case("torch", "images", convolutions, "16 pixels", cases._images(16), 2),
        Case("torch", "tokens", language, "512 tokens", cases._recurrent, 1, fixed=True),
        Case("torch", "uncalled", Uncalled, "3 numbers", vectors, 8),
        Case("torch", "endless", lambda: nn.Linear(3, 3), "3 numbers",
             lambda count: lambda model: model(torch.full((count, 3), torch.inf)).sum(), 2),
        Case("no_such_package", "absent", convolutions, "16 pixels", cases._images(16), 2),
    )
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(run, "CASES", TINY)
    monkeypatch.setattr(command, "CASES", TINY)


def test_a_step_in_two_gathers_and_each_round_has_both():
    model = convolutions()
    stepper = Stepper(model, TINY["images"].loss(2), GLS(model, curvature_every=run.GATHER_EVERY))
    layer = stepper.optimizer._preconditioner.layers[0]
    kinds = []
    for _ in range(4):
        kinds.append(stepper.kind)
        assert layer.gathers == (stepper.kind == "gathering")
        stepper.run()
    assert sorted(kinds[:2]) == sorted(kinds[2:]) == ["gathering", "ordinary"]
    found = measure_model(TINY["images"], ModelOptions(("images",), 3, None))
    for kind in KINDS:
        assert len(found["seconds"][kind]["whole"]) == len(found["seconds"][kind]["update"]) == 3


def test_both_start_from_the_same_weights_and_the_update_is_part_of_the_step(monkeypatch):
    steppers = []

    class Kept(Stepper):
        def __init__(self, model, *others):
            steppers.append((self, [p.detach().clone() for p in model.parameters()]))
            super().__init__(model, *others)

    monkeypatch.setattr(run, "Stepper", Kept)
    found = measure_model(TINY["images"], ModelOptions(("images",), 2, None))
    (_, weights), (_, others) = steppers
    assert all(map(torch.equal, weights, others))
    # With so small a rate, the same loss to the end.
    assert found["losses"]["gls"] == pytest.approx(found["losses"]["adamw"], rel=1e-4)
    for own in found["seconds"].values():
        for whole, update in zip(own["whole"], own["update"], strict=True):
            assert 0 < update < whole


def test_a_layer_without_a_gradient_need_not_have_statistics():
    class Unused(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.pooler = nn.Linear(3, 3)

    case = Case("torch", "unused", Unused, "3 numbers", vectors, 8)
    assert measure_model(case, ModelOptions(("unused",), 1, None))["covered"] == 0.5


def test_shares_are_of_layers_with_statistics():
    model = convolutions()
    stepper = Stepper(model, TINY["images"].loss(2), GLS(model))
    total = sum(p.numel() for p in model.parameters())
    # The convolution sees 392 rows, more than ten times its shorter side; the head is the last.
    assert shares(stepper) == pytest.approx(
        ((total - 32) / total, sum(p.numel() for p in model[0].parameters()) / total)
    )


def test_command_and_table(tmp_path, run_main, tiny):
    options = ("--rounds", 2, "--batch", 3, "--threads", 1, "--out", tmp_path)
    status, printed, errors = run_main("models", *options)
    assert status == 1
    results = read_strictly(tmp_path / "models.json")
    assert [(m["model"], m["batch"]) for m in results["models"]] == [("images", 3), ("tokens", 1)]
    assert results["models"][0]["covered"] == pytest.approx(516 / 548)
    assert results["models"][1]["covered"] == pytest.approx(200 / 40200)
    failed = {
        "torch/uncalled": "UntimedError: GLS covers 100.0%, and has a P for 50.0%",
        "torch/endless": "UntimedError: ",
        "no_such_package/absent": "UntimedError: no_such_package is not installed: pip install",
    }
    assert results["failed"].keys() == failed.keys()
    for label, why in failed.items():
        assert results["failed"][label].startswith(why)
        assert f"{label}  not timed: {why}" in errors
    assert printed.splitlines()[-1] == str(tmp_path / "report.md")
    seconds = {
        "adamw": {"whole": [2.0, 4.0, 2.0], "update": [0.5, 0.5, 0.5]},
        "ordinary": {"whole": [2.0, 5.0, 2.0], "update": [1.0, 1.0, 1.0]},
        "gathering": {"whole": [4.0, 7.0, 3.0], "update": [2.0, 2.0, 2.0]},
    }
    slow = {**results["models"][0], "seconds": seconds, "aim": 1.05}
    assert ratios(slow) == pytest.approx([1.1, 1.3, 1.05])
    seconds = {**seconds, "ordinary": seconds["adamw"], "gathering": seconds["adamw"]}
    fast = {**slow, "model": "fast", "seconds": seconds}
    results["models"] = [fast, slow]
    results["settings"]["models"] = ["fast", "images", "uncalled", "endless", "absent"]
    table = make_table(results)
    assert "cut off" not in table.note
    rows = table.rows
    assert rows[0] == (
        "torch/images", "missed by 4.8%", "3 x 16 pixels", "0.0", "94.2%", "82%", "2 [0.5]",
        "2 [1]", "4 [2]", "1.10 [1.08, 1.20]",
    )  # fmt: skip
    assert rows[1][:2] == ("torch/fast", "met by 4.8%")
    assert [row[0] for row in rows[2:]] == list(failed)
    assert "GLS covers 100.0%" in render_report(results)


def test_a_row_is_written_after_each_model(tmp_path, tiny, monkeypatch):
    def stop(case, options):
        if case.name == "tokens":
            raise KeyboardInterrupt
        return measure_model(case, options)

    monkeypatch.setattr(run, "measure_model", stop)
    with pytest.raises(KeyboardInterrupt):
        run.measure_models(ModelOptions(("images", "tokens"), 1, None), tmp_path)
    results = read_strictly(tmp_path / "models.json")
    assert [m["model"] for m in results["models"]] == ["images"]
    assert make_table(results).note.endswith(" The run was cut off before tokens.")


def test_unet_runs_and_its_skips_fit():
    from benchmarks.coverage.build import build_model

    model = build_model("torch", MODELS["torch"]["U-Net"])
    with torch.device("meta"):
        images = torch.randn(1, 1, cases.UNET_PIXELS, cases.UNET_PIXELS)
    assert cases._run_unet(model, images).shape == (1, 2, 68, 68)


def test_the_small_resnet_keeps_its_32_pixels():
    pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = cases.small_resnet18()
        assert model.maxpool(model.conv1(torch.randn(1, 3, 32, 32))).shape == (1, 64, 32, 32)
    case = CASES["resnet18, CIFAR stem"]
    assert (case.count(1), case.aim) == (128, 1.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_model_takes_its_batch(name):
    from benchmarks.coverage.build import build_model

    case = CASES[name]
    pytest.importorskip(case.package)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # SqueezeBERT reads numbers of its mask.
        device = "cpu" if name == "SqueezeBERT" else "meta"
        model = build_model(case.package, case.build, device)
        with torch.device(device):
            loss = case.loss(case.batch)(model)
    assert loss.shape == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--models", "five"), "--models: 'five' is none of images, tokens, uncalled"),
        (("--models", "images", "images"), "--models: images images names one twice"),
        (("--rounds", "0"), "expected an integer >= 1, got '0'"),
        (("--cpu-time", "--threads", "2"), "--cpu-time: expected --threads 1"),
    ],
)
def test_a_bad_option_gives_one_line(tmp_path, run_main, tiny, arguments, message):
    status, output, errors = run_main("models", "--out", tmp_path, *arguments)
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert message in errors
