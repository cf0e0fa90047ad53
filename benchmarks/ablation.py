"""SmolLM2 with each ingredient left out, over three draws of the calibration data: quality only.

``LRCOMPILE_DRAWS=0,1 python -m benchmarks ablation``: some of the draws.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.common import WORK, kept_share, table, uniform, write
from benchmarks.smollm2 import PUBLISHED, ours
from lrcompile import LowRank
from lrcompile.data import Batches
from lrcompile.files import sha256
from lrcompile.graphs.onnx.session import FileSession
from lrcompile.planning import Settings
from lrcompile.zoo import exported, smollm2, texts

KEEP = 0.8
DRAWS = tuple(map(int, os.environ.get("LRCOMPILE_DRAWS", "0,1,2").split(",")))
WHOLE = "lrcompile"
_PUBLISHED = "SVD-LLM as published, uniform ranks"
CHANGED = {
    "with dense columns": LowRank(columns=True),
    "without the identity gauge": LowRank(gauge=False),
    "without the output side": LowRank(two_sided=False),
    "without shrinkage": LowRank(shrink=0.0),
    "plain SVD": LowRank(metric="plain"),
    "ASVD's metric": LowRank(metric="diagonal"),
}
_HEAD = f"""Keep {KEEP} of the values of 210 decoder linears. A draw is a choice of 96 calibration sequences of 256
tokens; evaluation: 8 sequences of 512 tokens of each of three domains, the same for all. Each figure is the geometric
mean of the three perplexities over that of the dense model, read from one file for each draw, then their mean and
standard deviation. Share: of the log-perplexity gap that SVD-LLM as published leaves at the same draw. Ranks are
chosen by the allocator unless a row says uniform."""


@dataclass
class Line:
    """One way, over the draws."""

    name: str
    ratios: list[float] = field(default_factory=list)  # log of the perplexity's ratio to dense
    shares: list[float] = field(default_factory=list)
    keeps: list[str] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)

    def cells(self) -> list[object]:
        deviation = [float(np.std(np.exp(self.ratios), ddof=1))] if len(self.ratios) > 1 else []
        shares = " ".join(f"{100 * share:.1f}%" for share in self.shares)
        spread = f" ± {deviation[0]:.3f}" if deviation else ""
        mean = f"{float(np.mean(np.exp(self.ratios))):.3f}{spread}"
        return [self.name, ", ".join(sorted(set(self.keeps))), mean, shares, ", ".join(self.hashes)]


def main() -> None:
    """Draw by draw; the table is written anew after each file."""
    WORK.mkdir(parents=True, exist_ok=True)
    dense = exported("smollm2")
    base = losses(dense)
    lines: dict[str, Line] = {}
    for draw in DRAWS:
        published = 1.0
        for name, make in _ways(dense, draw):
            path = make()
            gap = losses(path) - base
            published = gap if name == _PUBLISHED else published
            line = lines.setdefault(name, Line(name))
            line.ratios.append(gap)
            line.shares.append(1 - gap / published)
            line.keeps.append(kept_share(path, dense))
            line.hashes.append(sha256(path)[:12])
            print(draw, *line.cells(), flush=True)
            _write(list(lines.values()))


def _write(lines: list[Line]) -> None:
    columns = ("what", "keep", "perplexity ÷ dense", "share of SVD-LLM's gap removed, each draw", "SHA-256")
    title = "SmolLM2: what each ingredient is worth"
    write("ablation", title, [_HEAD, table(columns, [line.cells() for line in lines])])


def _ways(dense: Path, draw: int) -> Iterator[tuple[str, Callable[[], Path]]]:
    data, settings = Batches(smollm2.calibration(draw=draw)), Settings(cache=WORK / "cache")
    out = WORK / "ablation.onnx"
    yield _PUBLISHED, lambda: uniform(dense, PUBLISHED, KEEP, data, settings, out)
    yield WHOLE, lambda: ours(dense, LowRank(), KEEP, data, settings, out)
    yield "the same, uniform ranks", lambda: uniform(dense, LowRank(), KEEP, data, settings, out)
    for name, each in CHANGED.items():
        yield name, lambda each=each: ours(dense, each, KEEP, data, settings, out)


def losses(path: Path) -> float:
    """Mean of the domains' mean surprisals, in nats."""
    run = FileSession(str(path)).run
    share, length = smollm2.EVALUATION[0] // len(texts.EVALUATION), smollm2.EVALUATION[1]
    parts = [smollm2.sequences(domain, "EVALUATION", share, length) for domain in texts.EVALUATION]
    return float(np.mean([smollm2.surprisals(run, part).mean() for part in parts]))
