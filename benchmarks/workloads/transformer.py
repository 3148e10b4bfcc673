"""The task `transformer`: a decoder-only model of a text's next character.

b sequences, t characters, w width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS, BLOCKS = 128, 4, 4
# GPT-2's, of the embeddings.
EMBEDDING_STD = 0.02


class Attention(nn.Module):
    """Causal self-attention; one linear layer makes queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        sequences, length, width = x.shape
        # [b, t, 3 w] -> queries, keys and values of [b, heads, t, w / heads]
        split = self.project(x).view(sequences, length, 3, self.heads, width // self.heads)
        queries, keys, values = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return self.merge(mixed.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """Attention and two linear layers with GELU, each on normalised inputs and added to them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.linear_norm = nn.LayerNorm(width)
        self.linear = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.linear(self.linear_norm(x))


class Transformer(nn.Module):
    """Characters [b, t] -> scores [b, t, vocabulary] of the next; positions are learned."""

    def __init__(
        self,
        vocabulary: int,
        context: int,
        *,
        width: int = WIDTH,
        heads: int = HEADS,
        blocks: int = BLOCKS,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        for embedding in (self.embedding, self.positions):
            nn.init.normal_(embedding.weight, std=EMBEDDING_STD)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens) + self.positions(positions)
        return self.head(self.norm(self.blocks(x)))


def build_transformer(shape: tuple[int, ...]) -> nn.Module:
    """Four blocks of width 128 with 4 heads; 0.8 million parameters for 100 characters.

    Args:
        shape: the vocabulary, and the characters of a sequence.
    """
    vocabulary, context = shape
    return Transformer(vocabulary, context)
