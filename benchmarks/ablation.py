"""SmolLM2 with each ingredient left out, over three draws of the calibration data: quality only.

``LRCOMPILE_DRAWS=0,1 python -m benchmarks ablation``: some of the draws. A draw is kept in the cache folder once it is
there, and the table shows all draws that the same code measured on the same machine, so that runs may be short.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import WORK, kept, kept_share, made_by, pieces, table, uniform, write
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
    "without shrinkage of the inputs' moments": LowRank(shrink=0.0),
    "with a fifth of it": LowRank(shrink=0.2),
    "plain SVD": LowRank(metric="plain"),
    "ASVD's metric": LowRank(metric="diagonal"),
}
_HEAD = f"""Keep {KEEP} of the values of 210 decoder linears. A draw is a choice of 96 calibration sequences of 256
tokens; evaluation: 8 sequences of 512 tokens of each of three domains, the same for all. Each figure is the geometric
mean of the three perplexities over that of the dense model, read from one file for each draw, then their mean and
standard deviation. Share: of the log-perplexity gap that SVD-LLM as published leaves at the same draw. Ranks are
chosen by the allocator unless a row says uniform."""


def main() -> None:
    """Draw by draw; the table is written anew after each."""
    WORK.mkdir(parents=True, exist_ok=True)
    dense, made = exported("smollm2"), made_by(__file__)
    base = losses(dense)
    for draw in DRAWS:
        kept("ablation", str(draw), made, list(_measured(dense, base, draw)))
        _write(list(pieces("ablation", map(str, range(100)), made).values()))


def _measured(dense: Path, base: float, draw: int) -> Iterator[tuple[str, str, float, str]]:
    """Name, kept share, log of the perplexity's ratio to dense, and hash of every file."""
    for name, make in _ways(dense, draw):
        path = make()
        yield (found := (name, kept_share(path, dense), losses(path) - base, sha256(path)[:12]))
        print(draw, *found, flush=True)


def _write(draws: Sequence[Sequence[Sequence[Any]]]) -> None:
    columns = ("what", "keep", "perplexity ÷ dense", "share of SVD-LLM's gap removed, each draw", "SHA-256")
    lines = [_line([draw[row] for draw in draws], [draw[0] for draw in draws]) for row in range(len(draws[0]))]
    write("ablation", "SmolLM2: what each ingredient is worth", [_HEAD, table(columns, lines)])


def _line(found: Sequence[Sequence[Any]], published: Sequence[Sequence[Any]]) -> list[object]:
    """One way, over the draws."""
    ratios = np.exp([each[2] for each in found])
    spread = f" ± {float(np.std(ratios, ddof=1)):.3f}" if len(ratios) > 1 else ""
    shares = " ".join(f"{1 - one[2] / other[2]:.1%}" for one, other in zip(found, published, strict=True))
    keeps, hashes = ", ".join(sorted({each[1] for each in found})), ", ".join(each[3] for each in found)
    return [found[0][0], keeps, f"{float(ratios.mean()):.3f}{spread}", shares, hashes]


def _ways(dense: Path, draw: int) -> Iterator[tuple[str, Callable[[], Path]]]:
    data, settings = Batches(smollm2.calibration(draw=draw)), Settings(cache=WORK / "cache")
    out = WORK / f"ablation-{draw}.onnx"
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
