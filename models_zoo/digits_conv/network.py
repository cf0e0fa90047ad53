"""An inverted-residual network for 8x8 digits: a 3x3 stem, blocks of 1x1, depthwise 3x3 and 1x1, mean pooling.

The form is MobileNetV2's (arXiv:1801.04381), every convolution with batch normalisation; the 1x1 convolutions are
linear maps over the channels, and hold nearly all of the weights.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Sizes of the network; the default is the shipped model (about 127,000 parameters)."""

    width: int = 64
    expansion: int = 4
    strides: Sequence[int] = (2, 1, 1)
    last: int = 256
    classes: int = 10


def convolution(into: int, out: int, size: int, *, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    """A convolution that keeps the image's size but for its stride, normalised; ReLU6 unless ``act`` is off."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv"] = nn.Conv2d(into, out, size, stride, size // 2, groups=groups, bias=False)
    layers["norm"] = nn.BatchNorm2d(out)
    if act:
        layers["act"] = nn.ReLU6()
    return nn.Sequential(layers)


class Block(nn.Module):
    """1x1 expand, depthwise 3x3, 1x1 project; the input is added where the stride is 1."""

    def __init__(self, width: int, hidden: int, stride: int) -> None:
        super().__init__()
        self.expand = convolution(width, hidden, 1)
        self.depthwise = convolution(hidden, hidden, 3, stride=stride, groups=hidden)
        self.project = convolution(hidden, width, 1, act=False)
        self.residual = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width, height, width) -> the same, rows and columns over the stride"""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class DigitsConv(nn.Module):
    """images (batch, 1, 8, 8) with values in [0, 1] -> logits (batch, 10)."""

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        self.config = c = config or Config()
        self.stem = convolution(1, c.width, 3)
        self.blocks = nn.Sequential(*(Block(c.width, c.width * c.expansion, stride) for stride in c.strides))
        self.last = convolution(c.width, c.last, 1)
        self.head = nn.Linear(c.last, c.classes)

    def forward(self, images: Tensor) -> Tensor:
        """Classify the mean over all places."""
        return self.head(self.last(self.blocks(self.stem(images))).mean((2, 3)))
