"""Graphs of the microcontroller measurements: transformers of several kinds with random weights, exported by torch."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Written out as matrix product, softmax, matrix product; ``bias`` is added to the scores."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        batch, tokens, width = x.shape
        split = self.qkv(x).reshape(batch, tokens, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)
        scores = query @ key.transpose(-2, -1) * self.size**-0.5
        weights = (scores if bias is None else scores + bias).softmax(-1)
        return self.proj((weights @ value).transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """A transformer block; normalisation before its two halves, or after them as in BERT."""

    def __init__(self, width: int, heads: int, *, after: bool = False) -> None:
        super().__init__()
        self.after = after
        self.norm_1, self.attention, self.norm_2 = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.after:
            x = self.norm_1(x + self.attention(x, bias))
            return self.norm_2(x + self.down(F.gelu(self.up(x))))
        x = x + self.attention(self.norm_1(x), bias)
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class ViT(nn.Module):
    """Patches by a convolution, positions, blocks; reads a class token, or the mean where there is none."""

    def __init__(
        self, image: int, patch: int, channels: int, width: int, heads: int, depth: int, *, token: bool
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, width) / 2) if token else None
        self.position = nn.Parameter(torch.randn(1, (image // patch) ** 2 + int(token), width) / 2)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x if self.token is None else torch.cat([self.token, x], 1)
        x = x + self.position
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x.mean(1) if self.token is None else x[:, 0])


class Bert(nn.Module):
    """BERT-tiny's sizes: 2 blocks of width 128 with 2 heads, a mask over tokens, a pooled classifier."""

    def __init__(self, vocabulary: int = 1000, tokens: int = 64, width: int = 128) -> None:
        super().__init__()
        self.words, self.position = nn.Embedding(vocabulary, width), nn.Parameter(torch.randn(1, tokens, width) / 2)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, 2, after=True) for _ in range(2))
        self.pool, self.head = nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        bias = (1.0 - mask.to(torch.float32))[:, None, None, :] * -10000.0
        x = self.norm(self.words(ids) + self.position)
        for block in self.blocks:
            x = block(x, bias)
        return self.head(torch.tanh(self.pool(x[:, 0])))


class Mixer(nn.Module):
    """MLP-Mixer: one MLP across tokens and one across channels in each block."""

    def __init__(self, image: int = 32, patch: int = 4, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        tokens = (image // patch) ** 2
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.layers = nn.ModuleList()
        for _ in range(depth):
            across, along = [nn.Linear(tokens, 2 * tokens), nn.Linear(2 * tokens, tokens)], []
            along = [nn.Linear(width, 4 * width), nn.Linear(4 * width, width)]
            self.layers.append(nn.ModuleList([nn.LayerNorm(width), *across, nn.LayerNorm(width), *along]))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            norm_1, up_1, down_1, norm_2, up_2, down_2 = layer  # type: ignore[misc]
            x = x + down_1(F.gelu(up_1(norm_1(x).transpose(1, 2)))).transpose(1, 2)
            x = x + down_2(F.gelu(up_2(norm_2(x))))
        return self.head(self.norm(x).mean(1))


class Hybrid(nn.Module):
    """Two strided convolutions with a residual one, then attention over what is left of the image."""

    def __init__(self, width: int = 48, heads: int = 4) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, width, 3, 2, 1)
        self.mix, self.out = nn.Conv2d(width, width, 3, 1, 1, groups=width), nn.Conv2d(width, width, 1)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.down(F.relu(self.stem(x))))
        x = x + self.out(F.relu(self.mix(x)))
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def _image(size: int, channels: int) -> tuple[Tensor, ...]:
    return (torch.zeros(1, channels, size, size),)


def _text() -> tuple[Tensor, ...]:
    return torch.zeros(1, 64, dtype=torch.int64), torch.ones(1, 64, dtype=torch.int64)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "vit8": (lambda: ViT(8, 2, 1, 64, 4, 2, token=True), _image(8, 1)),
    "vit32": (lambda: ViT(32, 4, 3, 64, 4, 4, token=True), _image(32, 3)),
    "bert-tiny": (Bert, _text()),
    "mixer": (Mixer, _image(32, 3)),
    "hybrid": (Hybrid, _image(32, 3)),
    "vit-d72-h3": (lambda: ViT(32, 4, 3, 72, 3, 4, token=True), _image(32, 3)),
    "vit-mean": (lambda: ViT(32, 4, 3, 64, 4, 4, token=False), _image(32, 3)),
    "deit": (lambda: ViT(224, 16, 3, 192, 3, 12, token=True), _image(224, 3)),
}
OTHERS = ("bert-tiny", "mixer", "hybrid", "vit-d72-h3", "vit-mean")
"""Those that are no plain ViT with a class token and a width that is a power of two."""


def graph(name: str, *, seed: int = 0) -> onnx.ModelProto:
    """One of :data:`MODELS` with weights from a seed, opset 18."""
    make, inputs = MODELS[name]
    torch.manual_seed(seed)
    stream: Any = io.BytesIO()
    names = ["ids", "mask"] if name == "bert-tiny" else ["x"]
    torch.onnx.export(
        make().eval(), inputs, stream, input_names=names, output_names=["y"], opset_version=18, dynamo=True,
        external_data=False, verbose=False,
    )  # fmt: skip
    return onnx.load_model_from_string(stream.getvalue())
