"""Small networks of the tests, exported to ONNX."""

from __future__ import annotations

import io

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Encoder(nn.Module):
    """A transformer block over tokens, with a class token, positions and a written-out attention."""

    def __init__(self, d: int = 24, heads: int = 2, tokens: int = 7, inner: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, d)), nn.Parameter(torch.randn(1, tokens + 1, d))
        self.n1, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.n2, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, inner), nn.Linear(inner, d)
        self.head = nn.Linear(d, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls, x], 1) + self.pos
        b, n, d = x.shape
        q, k, v = self.qkv(self.n1(x)).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        a = ((q @ k.transpose(-2, -1)) * (d // self.heads) ** -0.5).softmax(-1)
        x = x + self.out((a @ v).transpose(1, 2).reshape(b, n, d))
        x = x + self.down(F.gelu(self.up(self.n2(x))))
        return self.head(x.mean(1))


class Convolutions(nn.Module):
    """Strides, padding, groups, pooling, three activations, a residual sum and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.c, self.gate, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.a(x)), 2)
        x = x + self.c(F.hardswish(self.b(x)))
        g = x.mean((2, 3))
        return self.head(g * torch.sigmoid(self.gate(g)) - 0.25 * g)


def export(net: nn.Module, *shape: int, seed: int = 0) -> onnx.ModelProto:
    """A network with weights from a seed as ONNX, opset 18."""
    stream = io.BytesIO()
    torch.onnx.export(
        net.eval(), (torch.zeros(shape),), stream, input_names=["x"], output_names=["y"], opset_version=18, dynamo=True,
        external_data=False, verbose=False,
    )  # fmt: skip
    return onnx.load_model_from_string(stream.getvalue())


def made(kind: type[nn.Module], *shape: int, seed: int = 0) -> onnx.ModelProto:
    """A fresh network of a class, exported."""
    torch.manual_seed(seed)
    return export(kind(), *shape)
