"""The coverage experiment: what is counted, what is left out, its tables."""

from dataclasses import asdict

import pytest
import torch
from tiny import read_strictly
from torch import nn

from benchmarks.coverage import command, run
from benchmarks.coverage.build import build_model
from benchmarks.coverage.models import MODELS
from benchmarks.coverage.report import kind_of, make_tables, render_report
from benchmarks.coverage.run import Coverage, count_uncovered
from gls_fused import GLS
from gls_fused.capture.find import find_layers


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.norm = nn.LayerNorm(4)
        self.hidden = nn.Linear(4, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        raise ValueError("of\ntwo lines")


def adapted():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model


TINY = {
    "torch": {"tied": Tied, "adapted": adapted, "plain": lambda: nn.Linear(3, 2)},
    "no_such_package": {"one": Broken, "two": Broken},
}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(run, "MODELS", TINY)
    monkeypatch.setattr(command, "MODELS", TINY)


def test_the_command_counts_what_is_installed(tmp_path, run_main, tiny):
    status, output, errors = run_main("coverage", "--out", tmp_path)
    assert status == 0, errors
    assert output.splitlines()[-1] == str(tmp_path / "report.md")
    left_out = (
        "no_such_package is not installed, its 2 models are left out: pip install 'gls_fused["
    )
    assert left_out in errors
    results = read_strictly(tmp_path / "coverage.json")
    assert results["packages"] == {
        "torch": torch.__version__.split("+")[0], "no_such_package": None
    }  # fmt: skip
    found = {model["model"]: Coverage(**model) for model in results["models"]}
    # Norm 8, hidden 20, embedding and head 40.
    assert found["tied"].parameters == 68
    assert sum(found["tied"].adam.values()) in (8, 48)
    assert found["tied"].share == pytest.approx(1 - sum(found["tied"].adam.values()) / 68)
    assert (found["adapted"].parameters, found["adapted"].adam) == (10, {})
    assert found["plain"].share == 1
    report = (tmp_path / "report.md").read_text()
    assert "- Not installed, and left out: no_such_package; `pip install 'gls_fused[" in report
    assert "| torch | plain | - | 0.0 | 100.0% |" in report

    status, _, errors = run_main("coverage", "--out", tmp_path, "--models", "adapted")
    assert status == 0, errors
    assert [m["model"] for m in read_strictly(tmp_path / "coverage.json")["models"]] == ["adapted"]


def test_a_model_that_is_not_built_is_named_and_the_others_counted(
    tmp_path, run_main, monkeypatch, tiny
):
    monkeypatch.setattr(run, "version_of", lambda package: "1.0")
    status, _, errors = run_main("coverage", "--out", tmp_path)
    assert status == 1
    assert "no_such_package/two  not built: ValueError: of two lines\n" in errors
    results = read_strictly(tmp_path / "coverage.json")
    assert results["failed"].keys() == {"no_such_package/one", "no_such_package/two"}
    assert len(results["models"]) == 3
    assert "- Not built: no_such_package/one: ValueError: of two lines" in render_report(results)


def test_what_is_counted_is_what_the_optimizer_says():
    for build in (Tied, adapted):
        model = build_model("torch", build)
        assert all(param.is_meta for param in model.parameters())
        _, adam = count_uncovered(model)
        optimizer = GLS(model)
        uncovered = [u.param for u in optimizer._membership.uncovered if u.param.requires_grad]
        assert sum(param.numel() for param in uncovered) == sum(adam.values())


@pytest.mark.parametrize(
    ("package", "name"),
    [("torch", "U-Net"), ("torchvision", "resnet18"), ("timm", "mixer_b16_224")],
)
def test_a_published_model_has_no_memory_and_its_published_size(package, name):
    pytest.importorskip(package)
    model = build_model(package, MODELS[package][name])
    assert all(param.is_meta for param in model.parameters())
    total, adam = count_uncovered(model)
    published = {"U-Net": 31.0, "resnet18": 11.7, "mixer_b16_224": 59.9}
    assert total / 1e6 == pytest.approx(published[name], abs=0.05)
    assert sum(adam.values()) < 0.1 * total


def test_every_parameter_is_in_a_layer_or_has_a_reason():
    for build in (Tied, adapted, MODELS["torch"]["Transformer"], MODELS["torch"]["U-Net"]):
        model = build_model("torch", build)
        total, adam = count_uncovered(model)
        trained = {param for param in model.parameters() if param.requires_grad}
        layers, _ = find_layers([("", model)], trained)
        covered = sum(param.numel() for layer in layers for param in layer.params)
        assert covered + sum(adam.values()) == total


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "name"), [(package, name) for package, names in MODELS.items() for name in names]
)
def test_every_published_model_can_be_built(package, name):
    pytest.importorskip(package)
    total, adam = count_uncovered(build_model(package, MODELS[package][name]))
    assert 0 <= sum(adam.values()) <= total


def fabricated(config_of):
    models = [
        Coverage("torch", "one", 1000, {"shared: Embedding is not covered": 400}),
        Coverage("torch", "two", 1000, {"a.b.FooNorm is not covered": 20, "LayerNorm is not": 4}),
        Coverage("torch", "three", 1000, {"it has 32 groups": 900, "it has 8 groups": 60}),
        Coverage("torch", "four", 1000, {"GRU is not covered": 5}),
    ]
    return {
        "environment": config_of(1, [0], ["gls"])["settings"]["environment"],
        "packages": {"torch": "2.99", "timm": None},
        "models": [asdict(model) for model in models],
        "failed": {},
    }


def test_tables(config_of):
    packages, reasons, models = make_tables(fabricated(config_of))
    # Shares .6, .976, .04, .995.
    expected = ("4", "78.8%", "65.3%", "2", "2", "1")
    assert packages.rows == (
        ("torch 2.99", *expected), ("timm (not installed)", "0", *["-"] * 5), ("**all**", *expected)
    )  # fmt: skip
    assert reasons.rows == (
        ("it has groups", "three 96%", "1", "96"),
        ("embedding tied to the head", "one 40%", "1", "40"),
        ("normalisation", "two 2%", "0", "2"),
        ("anything else", "four 0%", "0", "0"),
    )
    assert models.rows[2] == ("torch", "three", "it has groups 96.0%", "0.0", "4.0%")
    assert models.rows[3] == ("torch", "four", "-", "0.0", "99.5%")
    for table in (packages, reasons, models):
        assert all(len(row) == len(table.header) for row in table.rows)


def test_reasons_of_many_classes_are_one():
    assert kind_of("transformers.models.a.modeling_a.AExperts is not covered") == (
        kind_of("transformers.models.b.modeling_b.BExperts is not covered")
    )
    assert kind_of("shared: a.b.ScaledWordEmbedding is not covered") == "embedding tied to the head"
    assert kind_of("EmbeddingBag is not covered") == "embedding, not tied"
    assert kind_of("BatchNorm2d is not covered") == "normalisation"
    assert kind_of("timm.layers.linear.Linear overrides forward") == (
        "Linear of timm overrides forward"
    )
    assert kind_of("LSTM is not covered") == "LSTM is not covered"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--packages", "jax"), "invalid choice: 'jax'"),
        (("--packages", "torch", "torch"), "--packages: torch torch names one twice"),
        (("--models", "five"), "--models: 'five' is none of adapted, one, plain, tied, two"),
        (("--models", "tied", "tied"), "--models: tied tied names one twice"),
    ],
)
def test_a_bad_option_gives_one_line(tmp_path, run_main, tiny, arguments, message):
    status, output, errors = run_main("coverage", "--out", tmp_path, *arguments)
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert message in errors
