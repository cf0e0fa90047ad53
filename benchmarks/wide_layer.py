"""A decoder layer of Llama-3-8B's shape at three widths: what statistics, the plan and the factors take."""

from __future__ import annotations

import gc
import math
import resource
import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import table, write
from lrcompile import Budget, Options, optimize
from lrcompile.progress import Progress

WIDTHS = (1024, 2048, 4096)
MLP, HEADS, GROUPS = 3.5, 32, 4
"""Channels of the feed-forward part over the width; attention heads, and of how many queries each key serves."""
SAMPLES, LENGTH = 16, 128
LAYERS = 32
KEEP = 0.8
DECAY = 0.75
"""Singular values fall like ``i ** -DECAY``: between a random matrix (flat) and the steepest of trained layers."""
_HEAD = f"""Weights are generated: float16, singular values about i^-{DECAY}, channels of the input of very different
size as in trained models. {SAMPLES} × {LENGTH} tokens, gradients of the outputs, keep {KEEP} of the seven linears,
default passes. Columns are seconds of wall time. The exponent is that of the growth with the width between the two
widest; a matrix has width squared values, and its decompositions take width cubed operations. The extrapolation
multiplies the widest layer's seconds by {LAYERS}: statistics are taken in groups of layers, so memory does not grow
with their number, but for the factors."""


class Watch(Progress):
    """Seconds of every step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._step, self._start = "", time.monotonic()

    def __call__(self, text: str, total: int | None = None) -> None:
        now = time.monotonic()
        name = self._step.split()[0] if self._step else "reading"
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._start
        self._step, self._start = text, now


class Layer(nn.Module):
    """Attention with grouped keys and a gated feed-forward part, with their norms and residuals."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.size = width // HEADS
        inner = int(MLP * width)
        shapes = {
            "q": (width, width), "k": (width // GROUPS, width), "v": (width // GROUPS, width), "o": (width, width),
            "gate": (inner, width), "up": (inner, width), "down": (width, inner),
        }  # fmt: skip
        self.q, self.k, self.v, self.o, self.gate, self.up, self.down = (
            _linear(out, into, generator) for out, into in shapes.values()
        )
        scales = torch.randn(2, width, generator=generator).exp()  # channels of very different size
        self.norms = nn.Parameter(scales.half(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) float16 -> the same."""
        y = nn.functional.rms_norm(x, x.shape[-1:], self.norms[0])
        q, k, v = (part.unflatten(-1, (-1, self.size)).transpose(1, 2) for part in (self.q(y), self.k(y), self.v(y)))
        k, v = (part.repeat_interleave(GROUPS, 1) for part in (k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.o(mixed)
        y = nn.functional.rms_norm(x, x.shape[-1:], self.norms[1])
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def _linear(out: int, into: int, generator: torch.Generator) -> nn.Linear:
    linear = nn.Linear(into, out, bias=False, dtype=torch.float16, device="meta")
    linear.weight = nn.Parameter(_weight(out, into, generator), requires_grad=False)
    return linear


def _weight(out: int, into: int, generator: torch.Generator) -> Tensor:
    """(out, into) float16; outputs of unit inputs have about unit size."""
    rank = min(out, into)
    values = torch.arange(1, rank + 1).float() ** -DECAY
    left = torch.randn(out, rank, generator=generator) * values
    weight = left @ torch.randn(rank, into, generator=generator)
    return weight.div_(weight.square().mean().sqrt() * math.sqrt(into)).half()


def main() -> None:
    """One layer after the other, the widest last."""
    lines, last = [], {}
    for width in WIDTHS:
        found = _measure(width)
        growth = {name: math.log2(found[name] / last[name]) if name in last else None for name in _STEPS}
        lines.append([width, *(_cell(found[name], growth[name]) for name in _STEPS), f"{found['peak']:.1f}"])
        print(lines[-1], flush=True)
        last = found
    lines.append([f"× {LAYERS} layers", *(f"{last[name] * LAYERS / 60:.0f} min" for name in _STEPS), ""])
    columns = ("width", *_STEPS, "peak resident GB")
    write("wide_layer", "A decoder layer of Llama-3-8B's shape", [_HEAD, table(columns, lines)])


_STEPS = ("statistics", "gradients", "decompositions", "allocation, factors", "everything")


def _cell(seconds: float, exponent: float | None) -> str:
    return f"{seconds:.1f}" + ("" if exponent is None else f" (exponent {exponent:.1f})")


def _measure(width: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    layer = Layer(width, generator).eval()
    data = torch.randn(SAMPLES, LENGTH, width, generator=generator).half()
    watch, start = Watch(), time.monotonic()
    options: Any = Options(max_drift=9.0, latency=False)
    result = optimize(
        layer, Budget(keep=KEEP), calibration=[{"x": row[None]} for row in data[:-2]],
        evaluation=[{"x": row[None]} for row in data[-2:]], options=options, tell=watch,
    )  # fmt: skip
    whole = time.monotonic() - start
    watch("")
    print(width, watch.seconds, result.report.ratio, result.report.drift, flush=True)
    del result, layer
    gc.collect()
    known = {"statistics": "calibrating", "gradients": "differentiating", "decompositions": "decomposing"}
    found = {name: watch.seconds.get(step, 0.0) for name, step in known.items()}
    found["allocation, factors"] = whole - sum(found.values())
    return {**found, "everything": whole, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
