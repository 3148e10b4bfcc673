"""The examples train, and stop and resume as their trainers do."""

import copy
import importlib

import pytest
import torch
from torch import nn

from gls_fused import GLS

# Lightning's use of what torch deprecates, and its advice on the number of workers.
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


def assert_same_parameters(model, expected):
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q)


def test_plain_loop():
    pytest.importorskip("sklearn", reason="needs the extra 'examples'")
    from examples import plain_loop

    losses = plain_loop.train(epochs=4)
    assert losses == sorted(losses, reverse=True)
    assert losses[3] < losses[0] / 2


@pytest.mark.parametrize(
    ("name", "covered"), [("graph_net", "first: GLS (obs"), ("custom_layer", "1: GLS (turned obs")]
)
def test_layers_of_ones_own(name, covered):
    losses, report = importlib.import_module(f"examples.{name}").train()
    assert losses[-1] < losses[0] / 2
    assert covered in report
    assert "no rows yet" not in report


def test_physics_informed():
    """A second of a run that goes on; AdamW is at .38 there."""
    from examples import physics_informed

    ours, adamw = (physics_informed.train(name, steps=80) for name in ("gls", "adamw"))
    assert sum(ours[-10:]) < sum(adamw[-10:])
    assert sum(ours[-10:]) / 10 < ours[0] / 2


# ---- Lightning -----------------------------------------------------------------------------------


@pytest.fixture
def fit(tmp_path):
    lightning = pytest.importorskip("lightning", reason="needs the extra 'examples'")
    from examples import lightning_module

    def fit(model, epochs, checkpoint=None, **options):
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            **options,
        )
        trainer.fit(model, lightning_module.make_batches(), ckpt_path=checkpoint)
        return trainer

    fit.make_model = lightning_module.Classifier
    fit.make_batches = lightning_module.make_batches
    return fit


def test_lightning_trains_as_a_plain_loop(fit):
    torch.manual_seed(0)
    model = fit.make_model()
    plain = copy.deepcopy(model.layers)
    optimizer = GLS(plain, lr=1e-3)
    metrics = fit(model, 2).callback_metrics
    for _ in range(2):
        for images, labels in fit.make_batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(plain(images), labels).backward()
            optimizer.step()
    assert_same_parameters(model.layers, plain)
    for name, value in optimizer.diagnostics().items():
        assert metrics[f"layers.{name}"].item() == pytest.approx(value, rel=1e-6)


def test_lightning_resumes_as_if_never_stopped(fit, tmp_path):
    torch.manual_seed(0)
    model = fit.make_model()
    interrupted = copy.deepcopy(model)
    fit(model, 3)
    fit(interrupted, 2).save_checkpoint(tmp_path / "last.ckpt")
    resumed = fit.make_model()
    fit(resumed, 3, tmp_path / "last.ckpt")
    assert_same_parameters(resumed, model)


@pytest.mark.parametrize("options", [{"gradient_clip_val": 1.0}, {"precision": "bf16-mixed"}])
def test_lightning_accumulates_and_clips_or_autocasts(fit, options):
    torch.manual_seed(0)
    model = fit.make_model()
    before = copy.deepcopy(model)
    fit(model, 1, accumulate_grad_batches=4, **options)
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert p.isfinite().all()
        assert not torch.equal(p, q)


# ---- Hugging Face --------------------------------------------------------------------------------


@pytest.fixture
def example():
    pytest.importorskip("transformers", reason="needs the extra 'examples'")
    pytest.importorskip("accelerate", reason="needs the extra 'examples'")
    from examples import huggingface_trainer

    return huggingface_trainer


def lines_of(report):
    return dict(line.split(": ", 1) for line in report.splitlines())


def test_trainer_trains_every_projection(example, tmp_path):
    model = example.make_model()
    trainer = example.make_trainer(model, tmp_path, max_steps=30, logging_steps=10)
    optimizer = trainer.optimizer
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    lines = lines_of(optimizer.report())
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert len(linear) == 15
    for name in linear:
        assert lines[name].startswith("GLS")
        assert "rows, rank" in lines[name]
    assert lines["model.embed_tokens.weight"] == "Adam (Embedding is not covered)"
    assert lines["5 norms, biases and other vectors"] == "Adam"


def test_trainer_resumes_as_if_never_stopped(example, tmp_path):
    options = {"max_steps": 24, "save_strategy": "steps", "save_steps": 13}
    model = example.make_model()
    example.make_trainer(model, tmp_path, **options).train()
    resumed = example.make_model()
    trainer = example.make_trainer(resumed, tmp_path, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-13"))
    assert_same_parameters(resumed, model)


@pytest.mark.parametrize("kind", ["GPT2", "Bert"])
def test_report_on_other_transformers(example, kind):
    """GPT-2's Conv1D is no nn.Linear; both heads share their weight with the embedding."""
    import transformers

    sizes = {"vocab_size": 50, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "GPT2":
        config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.BertConfig(hidden_size=16, intermediate_size=32, **sizes)
        model = transformers.BertForMaskedLM(config)
    optimizer = GLS(model)
    tokens = torch.randint(50, (2, 8))
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    lines = lines_of(repr(optimizer).split("\n)\n")[1])
    if kind == "GPT2":
        assert lines["transformer.h.0.attn.c_attn"].startswith(
            "GLS (turned Linear 17 -> 48, 16 rows"
        )
        head, shared = "lm_head", "transformer.wte"
    else:
        assert lines["bert.encoder.layer.0.attention.self.query"].startswith("GLS (Linear 17 -> 16")
        head, shared = "cls.predictions.decoder", "bert.embeddings.word_embeddings"
    assert lines[head].startswith("GLS (Linear 16 -> 50, 16 rows")
    assert f"tied to {shared}" in lines[head]
