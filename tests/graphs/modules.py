"""Small modules for tests; every builder is deterministic in its seed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lrcompile.graphs.module import ModuleGraph
from lrcompile.linop import (
    BlockSparse,
    Dense,
    LinearOperator,
    Product,
    Quantized,
    Scaled,
    SemiSparse,
    Stack,
    Sum,
    low_rank,
)
from lrcompile.sites import LinearSite

MEMORY = 2**30
X = {"x": np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)}


class Attention(nn.Module):
    """Three projections of one tensor, one of the result; a padding mask as Hugging Face has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        allowed = None if mask is None else mask[:, None, :].bool()
        return self.norm(x + self.drop(self.out(functional.scaled_dot_product_attention(q, k, v, allowed))))


class Encoder(nn.Module):
    """Embedding, two attention blocks that share one feed-forward layer, a head; returns a dict."""

    def __init__(self, width: int = 16, words: int = 11) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.first, self.second = Attention(width), Attention(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
        x = self.words(input_ids)
        for block in (self.first, self.second):
            x = block(x, attention_mask)
            x = x + self.down(functional.gelu(self.up(x)))
        return {"logits": self.head(x), "hidden": x, "cache": None}


def tree(graph: ModuleGraph) -> Any:
    """The graph's module, whose attributes are the layers' own types."""
    return graph.model


def encoder(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Encoder()


def tokens(samples: int = 4, length: int = 7, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch whose samples are padded to one length."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, length + 1, samples)
    mask = (np.arange(length) < lengths[:, None]).astype(np.int64)
    return {"input_ids": random.integers(0, 11, (samples, length)), "attention_mask": mask}


def factors(out: int, into: int, rank: int, seed: int = 0) -> LinearOperator:
    """Random factors of a rank, scaled like a layer's weight."""
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(out, rank, generator=generator), torch.randn(rank, into, generator=generator)
    return low_rank(left / rank**0.5, right / into**0.5)


def llama(tied: bool = False) -> Any:
    """A two-layer Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, max_position_embeddings=64, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2() -> Any:
    """A two-layer GPT-2 (whose linear layers are Conv1D) with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=64, bos_token_id=0, eos_token_id=1)
    return GPT2LMHeadModel(config).eval()


def sites(graph: ModuleGraph) -> dict[str, LinearSite]:
    return {site.name: site for site in graph.linear_sites()}


def outputs(model: nn.Module, inputs: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The model's own outputs, without the code under test."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        result = model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    return {name: value for name, value in result.items() if isinstance(value, Tensor)}


class Wrapped(nn.Module):
    """A layer under the name ``layer``, called once."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def rewritten() -> ModuleGraph:
    """An encoder with all kinds of expressions, one leaf shared by two layers, one weight by two modules."""
    model = encoder()
    model.second.out.weight = model.first.out.weight
    graph = ModuleGraph(model)
    found = {site.name: site for site in graph.linear_sites()}
    torch.manual_seed(1)
    shared = Dense(torch.randn(4, 16) / 4)
    sparse = SemiSparse(torch.randn(32, 3), torch.randint(0, 16, (32, 3), dtype=torch.uint8), 16)
    blocks = BlockSparse(torch.randn(2, 8, 8) / 4, torch.tensor([0, 1]), torch.tensor([1, 0]), (2, 2))
    codes = Quantized(torch.randint(-8, 8, (16, 32), dtype=torch.int8), torch.rand(16, 4) / 40, None, 8, 4)
    graph.replace(found["first.query"], Product(Dense(torch.randn(16, 4) / 2), shared))
    graph.replace(found["second.key"], Product(Dense(torch.randn(16, 4) / 2), shared), torch.ones(16))
    graph.replace(found["up"], Sum((factors(32, 16, 2), Scaled(torch.tensor(0.5), sparse))))
    graph.replace(found["down"], codes)
    graph.replace(found["first.out"], blocks)
    graph.replace(found["head"], Stack((factors(2, 16, 1), Dense(torch.randn(3, 16)))))
    return graph


def same_outputs(a: Any, b: Any, **inputs: np.ndarray) -> None:
    fed = {name: torch.from_numpy(array) for name, array in inputs.items()}
    with torch.no_grad():
        left, right = a.eval()(**fed), b.eval()(**fed)
    assert left.keys() == right.keys()
    for name, value in left.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, right[name], rtol=1e-5, atol=1e-6)


def edit(path: Path, **changes: Any) -> None:
    """Changes entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
