"""Networks of other structures than a plain vision transformer: what memory scheduling must find by itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Joint projection, scores written out; ``mask`` is added to them."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1)) * (d // self.heads) ** -0.5
        scores = scores if mask is None else scores + mask
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, d))


class Separate(nn.Module):
    """Attention of BERT: three projections, a mask, normalisation after the sum."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(d, d) for _ in range(4))
        self.norm, self.up, self.down, self.last = (
            nn.LayerNorm(d),
            nn.Linear(d, 4 * d),
            nn.Linear(4 * d, d),
            nn.LayerNorm(d),
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = (f(x).reshape(b, n, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1) / (d // self.heads) ** 0.5 + mask
        x = self.norm(x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, d)))
        return self.last(x + self.down(F.gelu(self.up(x))))


class Block(nn.Module):
    def __init__(self, d: int, heads: int, inner: int = 4) -> None:
        super().__init__()
        self.n1, self.a, self.n2 = nn.LayerNorm(d), Attention(d, heads), nn.LayerNorm(d)
        self.up, self.down = nn.Linear(d, inner * d), nn.Linear(inner * d, d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(self.n1(x))
        return x + self.down(F.gelu(self.up(self.n2(x))))


class BertTiny(nn.Module):
    """Token ids and a mask of padding; 2 layers, d 128, 2 heads."""

    def __init__(self, words: int = 500, d: int = 128, heads: int = 2, depth: int = 2, tokens: int = 64) -> None:
        super().__init__()
        self.words, self.pos = nn.Embedding(words, d), nn.Parameter(torch.randn(1, tokens, d) * 0.2)
        self.norm, self.blocks = nn.LayerNorm(d), nn.ModuleList(Separate(d, heads) for _ in range(depth))
        self.head = nn.Linear(d, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        bias = (1.0 - mask[:, None, None, :].float()) * -10000.0
        x = self.norm(self.words(ids) + self.pos)
        for block in self.blocks:
            x = block(x, bias)
        return self.head(torch.tanh(x[:, 0]))


class Mixer(nn.Module):
    """MLP-Mixer: one MLP over tokens, one over channels."""

    def __init__(self, d: int = 64, tokens: int = 64, inner: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, d, 4, 4)
        self.n1 = nn.ModuleList(nn.LayerNorm(d) for _ in range(depth))
        self.n2 = nn.ModuleList(nn.LayerNorm(d) for _ in range(depth))
        self.t1 = nn.ModuleList(nn.Linear(tokens, inner) for _ in range(depth))
        self.t2 = nn.ModuleList(nn.Linear(inner, tokens) for _ in range(depth))
        self.c1 = nn.ModuleList(nn.Linear(d, 4 * d) for _ in range(depth))
        self.c2 = nn.ModuleList(nn.Linear(4 * d, d) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for n1, t1, t2, n2, c1, c2 in zip(self.n1, self.t1, self.t2, self.n2, self.c1, self.c2, strict=True):
            x = x + t2(F.gelu(t1(n1(x).transpose(1, 2)))).transpose(1, 2)
            x = x + c2(F.gelu(c1(n2(x))))
        return self.head(self.norm(x).mean(1))


class ConvAttention(nn.Module):
    """Two convolutions with strides, then attention over what is left of the image."""

    def __init__(self, d: int = 48, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, d, 3, 2, 1)
        self.blocks = nn.ModuleList(Block(d, heads, 2) for _ in range(depth))
        self.head = nn.Linear(d, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x)))).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class OddViT(nn.Module):
    """Vision transformer with d 72 and 3 heads."""

    def __init__(self, d: int = 72, heads: int = 3, depth: int = 2, cls: bool = True, patch: int = 4) -> None:
        super().__init__()
        self.patch, tokens = nn.Conv2d(3, d, patch, patch), (32 // patch) ** 2
        self.cls = nn.Parameter(torch.randn(1, 1, d)) if cls else None
        self.pos = nn.Parameter(torch.randn(1, tokens + cls, d) * 0.5)
        self.blocks = nn.ModuleList(Block(d, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = (x if self.cls is None else torch.cat([self.cls, x], 1)) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1) if self.cls is None else self.norm(x)[:, 0])


def no_class_token() -> nn.Module:
    """A vision transformer that averages its tokens."""
    return OddViT(d=64, heads=4, cls=False)


IMAGE = {"x": torch.zeros(1, 3, 32, 32)}
GRAPHS = {
    "bert": (BertTiny, {"ids": torch.zeros(1, 64, dtype=torch.int64), "mask": torch.ones(1, 64, dtype=torch.int64)}),
    "mixer": (Mixer, IMAGE),
    "conv-attention": (ConvAttention, IMAGE),
    "odd-heads": (OddViT, IMAGE),
    "no-class-token": (no_class_token, IMAGE),
}
"""Name → (builder, sample inputs)."""
