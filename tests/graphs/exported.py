"""Small exported programs for tests; every builder is deterministic."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional

from lrcompile.graphs.fx.graph import FxGraph
from lrcompile.sites import LinearSite


def exported(model: nn.Module, *args: Tensor, **kwargs: Tensor) -> ExportedProgram:
    """A program whose leading axes are free."""
    free = {0: Dim("batch", min=1, max=64)}
    shapes = [free for _ in (*args, *kwargs)]
    return torch.export.export(model.eval(), args, kwargs or None, dynamic_shapes=shapes)


class Disguises(nn.Module):
    """Every way to write a linear map with a constant weight that the graph should see through."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.linear, self.plain = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        for name in ("mm", "matmul", "addmm", "einsum", "functional", "turned", "batched", "added"):
            self.register_parameter(name, nn.Parameter(torch.randn(width, width) / width**0.5))
        self.bias = nn.Parameter(torch.randn(width))
        self.packed = nn.Parameter(torch.randn(3 * width, width) / width**0.5)
        self.conv1, self.conv2 = nn.Conv1d(width, width, 3, padding=1), nn.Conv2d(1, 4, (3, 1), stride=(2, 1))
        self.grouped = nn.Conv1d(width, width, 1, groups=2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        rows = x.flatten(0, 1)
        y = torch.tanh(self.linear(x)) + torch.tanh(self.plain(x))
        y = y + torch.tanh(torch.mm(rows, self.mm)).view_as(x) + torch.tanh(x @ self.matmul)
        y = y + torch.tanh(torch.addmm(self.bias, rows, self.addmm)).view_as(x)
        y = y + torch.tanh(torch.einsum("btk,nk->btn", x, self.einsum))
        y = y + torch.tanh(functional.linear(x, self.functional)) + torch.tanh(functional.linear(x, self.turned.T))
        y = (
            y
            + torch.tanh(torch.bmm(x, self.batched.expand(x.shape[0], -1, -1)))
            + torch.tanh(x @ self.added + self.bias)
        )
        first, second, third = self.packed.chunk(3)
        y = (
            y
            + functional.linear(x, first) * functional.linear(x, second).sigmoid()
            + functional.linear(y, third).tanh()
        )
        y = y + torch.tanh(self.conv1(x.mT)).mT + torch.tanh(self.grouped(x.mT)).mT
        return {"hidden": y, "image": self.conv2(y.unsqueeze(1))}


DISGUISED = {
    "linear": "linear", "plain": "linear", "mm": "mm", "matmul": "matmul", "addmm": "addmm", "einsum": "einsum",
    "functional": "linear", "turned": "linear", "batched": "bmm", "added": "matmul", "conv1": "conv1d",
    "conv2": "conv2d",
}  # fmt: skip


def disguises(width: int = 12) -> tuple[Disguises, ExportedProgram, dict[str, np.ndarray]]:
    torch.manual_seed(0)
    model = Disguises(width)
    x = torch.randn(3, 7, width)
    return model, exported(model, x), {"x": x.numpy()}


class Attending(nn.Module):
    """Self- and cross-attention with packed projections, a head tied to the embedding, an un-merged adapter."""

    def __init__(self, width: int = 16, words: int = 11) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.itself = nn.MultiheadAttention(width, 4, batch_first=True)
        self.across = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.left, self.right = nn.Linear(4, 2 * width, bias=False), nn.Linear(width, 4, bias=False)
        self.again = nn.Linear(width, 2 * width)
        self.again.weight = self.up.weight
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        x = self.words(ids)
        x = x + self.itself(x, x, x, need_weights=False)[0]
        x = x + self.across(x, memory, memory, need_weights=False)[0]
        x = x + self.down(functional.gelu(self.up(x)))
        x = x + self.down(functional.gelu(self.again(x) + 0.5 * self.left(self.right(x))))
        return self.head(x), x


def attending() -> tuple[Attending, ExportedProgram, dict[str, np.ndarray]]:
    torch.manual_seed(0)
    model = Attending()
    ids, memory = torch.randint(0, 11, (3, 7)), torch.randn(3, 5, 16)
    program = exported(model, ids, memory=memory)
    return model, program, {"ids": ids.numpy(), "memory": memory.numpy()}


def sites(graph: FxGraph) -> dict[str, LinearSite]:
    return {site.name: site for site in graph.linear_sites()}
