"""A plain vision transformer for 8x8 digits: patches, learned positions, pre-norm blocks, mean pooling.

Attention is written out (matmul, softmax, matmul) with separate q, k, v and o projections, so that every
weight of the network is an ordinary linear layer and exports to ordinary ONNX operators.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    """Sizes of the network; the default is the shipped model (about 100,000 parameters)."""

    size: int = 8
    patch: int = 2
    width: int = 64
    heads: int = 4
    depth: int = 2
    mlp: int = 256
    classes: int = 10

    @property
    def tokens(self) -> int:
        """Number of patches of one image."""
        return (self.size // self.patch) ** 2


class Attention(nn.Module):
    """Multi-head self-attention without mask: (batch, tokens, width) -> the same shape."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)

    def _split(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) -> (batch, heads, tokens, width / heads)"""
        return x.reshape(-1, x.shape[1], self.heads, x.shape[2] // self.heads).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of each image."""
        q, k, v = self._split(self.q(x)), self._split(self.k(x)), self._split(self.v(x))
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).reshape(-1, x.shape[1], x.shape[2]))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a GELU network of two linears."""

    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, mlp), nn.Linear(mlp, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) -> the same shape"""
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class DigitsViT(nn.Module):
    """images (batch, 1, 8, 8) with values in [0, 1] -> logits (batch, 10)."""

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        self.config = c = config or Config()
        self.patches = nn.Conv2d(1, c.width, c.patch, c.patch)
        self.positions = nn.Parameter(torch.randn(1, c.tokens, c.width) * 0.02)
        self.blocks = nn.ModuleList([Block(c.width, c.heads, c.mlp) for _ in range(c.depth)])
        self.norm, self.head = nn.LayerNorm(c.width), nn.Linear(c.width, c.classes)

    def forward(self, images: Tensor) -> Tensor:
        """Classify; the mean over the tokens replaces a class token."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))
