"""The graphs of the microcontroller figures, with weights from a seed, exported to ONNX once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import WORK
from tests.mcu.graphs import GRAPHS, Block


class ViT(nn.Module):
    """A plain vision transformer: patches, class token, positions, pre-norm blocks, GELU."""

    def __init__(self, image: int, patch: int, channels: int, d: int, heads: int, depth: int, classes: int) -> None:
        super().__init__()
        self.patch, tokens = nn.Conv2d(channels, d, patch, patch), (image // patch) ** 2
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, d) * 0.5), nn.Parameter(torch.randn(1, tokens + 1, d) * 0.5)
        self.blocks = nn.ModuleList(Block(d, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls, self.patch(x).flatten(2).transpose(1, 2)], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


VITS = {
    "vit8": (8, 2, 1, 64, 4, 2, 10),
    "vit32": (32, 4, 3, 64, 4, 4, 10),
    "deit": (224, 16, 3, 192, 3, 12, 1000),
}
OTHERS = tuple(GRAPHS)


@cache
def path(name: str) -> Path:
    """The ONNX file of a graph, opset 18; made where it is missing."""
    folder = WORK / "mcu"
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"{name}.onnx"
    if not out.exists():
        torch.manual_seed(0)
        net, inputs = _made(name)
        torch.onnx.export(
            net.eval(), tuple(inputs.values()), out, input_names=list(inputs), output_names=["y"], opset_version=18,
            dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip
    return out


def _made(name: str) -> tuple[nn.Module, Mapping[str, Tensor]]:
    if name in VITS:
        image, _, channels, *_ = VITS[name]
        return ViT(*VITS[name]), {"x": torch.zeros(1, channels, image, image)}
    build, inputs = GRAPHS[name]
    return build(), inputs


def samples(name: str, count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Normal images; tokens of all words, half of them padding in every second sample."""
    rng = np.random.default_rng(seed)
    if name != "bert":
        image, channels = (VITS[name][0], VITS[name][2]) if name in VITS else (32, 3)
        return [{"x": rng.standard_normal((1, channels, image, image)).astype(np.float32)} for _ in range(count)]
    masks = [np.arange(64)[None] < (64 if at % 2 else 32) for at in range(count)]
    return [{"ids": rng.integers(0, 500, (1, 64)), "mask": mask.astype(np.int64)} for mask in masks]
