"""A Hugging Face Trainer that is given GLS, for a small Llama made from a config.

pip install 'gls_fused[examples]'
python examples/huggingface_trainer.py
"""

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from gls_fused import GLS

LENGTH = 32


def make_model():
    """A language model of bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config)


def make_dataset():
    """Windows of this repository's README."""
    text = torch.tensor(list(Path(__file__).parents[1].joinpath("README.md").read_bytes()))
    windows = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
    return [{"input_ids": window, "labels": window} for window in windows]


def make_trainer(model, folder, **options):
    """A Trainer on the CPU; `options` are those of TrainingArguments."""
    options = {"max_steps": 100, "logging_steps": 20, "save_strategy": "no", **options}
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=8,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return Trainer(
        model,
        arguments,
        train_dataset=make_dataset(),
        optimizers=(GLS(model, lr=1e-3), None),  # or leave it out, for AdamW
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(make_model(), folder).train()
