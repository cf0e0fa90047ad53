"""SmolLM2: perplexity, bytes, MACs, latency and memory of its low-rank forms, each row read from one file.

``LRCOMPILE_TIMES=0 python -m benchmarks smollm2`` makes the files and judges them, for a machine that does other work
too. What the same code has judged on the same machine is kept, so that a run may be cut off and go on.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import WORK, kept, kept_share, made_by, pieces, ratio_text, table, uniform, write
from benchmarks.saes import saes
from benchmarks.sparse import METHODS, density, pruned
from lrcompile import Budget, LowRank, Options, measure, optimize
from lrcompile.backends.onnxruntime import OnnxRuntime
from lrcompile.data import Batches
from lrcompile.feeds import stored
from lrcompile.files import AtomicSet, sha256
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.graphs.onnx.session import FileSession
from lrcompile.linop import LinearOperator, Quantized, densify
from lrcompile.planning import Settings
from lrcompile.sites import LinearSite
from lrcompile.zoo import exported, smollm2, texts

KEEPS = (0.8, 0.9, 0.6)
PUBLISHED = LowRank(center=False, two_sided=False, gauge=False, shrink=0.0, damp=0.0)
"""SVD-LLM (arXiv 2403.07378): whitened by the bare second moments, uniform ranks."""
OURS = LowRank(center=False, two_sided=False, gauge=False)
"""The same with our shrinkage and damping."""
_PUBLISHED = "SVD-LLM as published"
DRAWS = 2000
SECONDS = 20.0


@dataclass(eq=False)
class Row:
    """One artefact and what it does to every evaluation sequence."""

    name: str
    path: Path
    make: Callable[[], object] = lambda: None
    method: float | None = None  # the budget
    keep: str = ""
    size: int = 0  # bytes, where the file does not show them
    seconds: float = 0.0
    sha256: str = ""
    loss: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (sequences,) nats per token
    divergence: float = 0.0
    agreement: float = 1.0
    costs: tuple[str, ...] = ()

    @property
    def measured(self) -> dict[str, Any]:
        """What was measured of its outputs, for JSON."""
        fields = ("keep", "seconds", "sha256", "divergence", "agreement")
        return {"loss": self.loss.tolist(), **{name: getattr(self, name) for name in fields}}


def main() -> None:
    """Makes and judges the files, then takes their times, which want a machine with nothing else to do."""
    WORK.mkdir(parents=True, exist_ok=True)
    dense = Row("dense", exported("smollm2"), keep="1")
    rows, made = [dense, *_rows(dense.path)], made_by(__file__)
    known = pieces("smollm2", (row.path.stem for row in rows), made)
    reference: _Reference | None = None
    for row in rows:
        found = known.get(row.path.stem)
        if found is None or not row.path.is_file() or sha256(row.path) != found["sha256"]:
            reference = reference or _Reference(dense)
            found = _judged(row, dense, reference)
            kept("smollm2", row.path.stem, made, found)
        for name, value in found.items():
            setattr(row, name, np.array(value) if name == "loss" else value)
        _write(rows)
    for row in rows if os.environ.get("LRCOMPILE_TIMES", "1") == "1" else ():
        row.costs = _costs(row, dense)
        _write(rows)


def _judged(row: Row, dense: Row, reference: _Reference) -> dict[str, Any]:
    start = time.monotonic()
    row.make()
    row.seconds, row.sha256 = time.monotonic() - start, sha256(row.path)
    row.keep = row.keep or kept_share(row.path, dense.path)
    reference.judge(row)
    print(row.name, row.method, f"{row.seconds:.0f} s", row.loss.mean(), flush=True)
    return row.measured


def _write(rows: Sequence[Row]) -> None:
    dense, done = rows[0], [row for row in rows if len(row.loss)]
    published = {row.method: row for row in done if row.name.startswith(_PUBLISHED)}
    lines = [_line(row, dense, published.get(row.method)) for row in done]
    write("smollm2", "SmolLM2-135M, 210 decoder linears, no training", [_HEAD, table(_COLUMNS, lines)])


_COLUMNS = ("what", "keep", *(f"perplexity {name}" for name in texts.EVALUATION), "geometric mean ÷ dense",
            "share of SVD-LLM's gap removed", "KL", "top-1", "MB", "MACs", "latency 1×512, 1 thread",
            "latency 1×512, 2 threads", "peak MB", "made in, s", "SHA-256")  # fmt: skip
_HEAD = """Each row is one ONNX file: all its figures are read from it. Keep counts stored values of the 210 linears.
Calibration: 96 sequences of 256 tokens of a computing dictionary, Wikipedia and docstrings (one draw). Evaluation: 8
sequences of 512 tokens for each domain, none of them calibrated on; of the news domain nothing was. Share: of the
log-perplexity gap that SVD-LLM (as published, at the same keep) leaves to dense, as mean over the three domains
with the 95 % interval of a bootstrap over paired sequences. Latency: ONNX Runtime, in turns with the dense file,
median of the paired ratios of two to four processes with its 95 % interval. Files of pruned models hold zeros, since
no runtime here computes with masks: their bytes are what values and masks would take. Files may have been made beside
other work, which lengthens "made in"; the times of runs were taken when there was none.
The weights had been rounded to four bits before all this."""


def _rows(dense: Path) -> Iterator[Row]:
    data, settings = Batches(smollm2.calibration()), Settings(cache=WORK / "cache")

    def flat(name: str, each: LowRank, keep: float) -> Row:
        path = _path(name, keep)
        return Row(f"{name}, uniform ranks", path, lambda: uniform(dense, each, keep, data, settings, path), keep)

    def chosen(name: str, each: LowRank, keep: float) -> Row:
        path = _path(name, keep)
        return Row(name, path, lambda: ours(dense, each, keep, data, settings, path), keep)

    def anchored(keep: float) -> Row:
        path = _path("SAES-SVD", keep)
        return Row("SAES-SVD, uniform ranks", path, lambda: saes(dense, keep, path), keep)

    def zeros(method: str, keep: float) -> Row:
        path, share = _path(method, keep), density(keep, 32)
        size = dense.stat().st_size - round((1 - keep) * 4 * smollm2.LINEARS)

        def make() -> Path:
            return pruned(dense, method, share, data, settings, path)

        return Row(f"{method}, masks of one bit", path, make, keep=f"{keep:.4f}", size=size)

    for keep in KEEPS:
        yield flat(_PUBLISHED, PUBLISHED, keep)
        yield chosen("lrcompile", LowRank(), keep)
    yield Row("int8 weights, a scale for each row", WORK / "smollm2-int8.onnx", lambda: _int8(dense), keep="—")
    for keep in KEEPS:
        yield from (zeros(method, keep) for method in METHODS)
    for keep in KEEPS:
        yield flat("SVD-LLM shrunk and damped", OURS, keep)
        yield anchored(keep)


def _path(name: str, keep: float) -> Path:
    return WORK / f"smollm2-{name.replace(' ', '-')}-{keep}.onnx"


def ours(dense: Path, each: LowRank, keep: float, data: Batches, settings: Settings, out: Path) -> Path:
    options = Options(max_drift=9.0, force=True, latency=False, settings=settings)
    held = smollm2.evaluation(3, 64)  # only for the gate, which is kept out of the way
    budget = Budget(keep=keep)
    result = optimize(dense, budget, passes=[each], calibration=data, evaluation=held, options=options, out=out)
    print(result.report.ratio, result.report.drift, flush=True)
    return out


def _int8(dense: Path) -> Path:
    graph = OnnxGraph.load(dense)
    for site in graph.linear_sites():
        if not site.frozen:
            graph.replace(site, rounded(site))
    with AtomicSet(WORK / "smollm2-int8.onnx", force=True) as files:
        OnnxRuntime().build(graph, out=files)
    return files.target


def rounded(site: LinearSite) -> LinearOperator:
    """The site's weight as int8, symmetric, with a scale for each row."""
    weight = densify(site.operator).float()
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return Quantized((weight / scale).round().to(torch.int8), scale, None, group=weight.shape[1])


class _Reference:
    """Logits of the dense file for every evaluation sequence, on disk."""

    def __init__(self, dense: Row) -> None:
        share, length = smollm2.EVALUATION[0] // len(texts.EVALUATION), smollm2.EVALUATION[1]
        self.ids = np.concatenate([smollm2.sequences(d, "EVALUATION", share, length) for d in texts.EVALUATION])
        self.path = WORK / "smollm2-reference.npy"
        run = FileSession(str(dense.path)).run
        self.logs: np.ndarray | None = None
        for place, row in enumerate(self.ids):
            found = _log_softmax(run, row)
            if self.logs is None:
                shape = (len(self.ids), *found.shape)
                self.logs = np.lib.format.open_memmap(self.path, "w+", dtype=np.float32, shape=shape)
            self.logs[place] = found.numpy()

    def judge(self, row: Row) -> None:
        """Runs the row's file on every sequence."""
        assert self.logs is not None
        run = FileSession(str(row.path)).run
        losses, divergence, agreement = [], 0.0, 0.0
        for ids, logs in zip(self.ids, self.logs, strict=True):
            before, after = torch.from_numpy(np.array(logs)), _log_softmax(run, ids)
            targets = torch.from_numpy(ids[1:])
            losses.append(-float(after[:-1].gather(1, targets[:, None]).mean()))
            divergence += float((before.exp() * (before - after)).sum(-1).double().mean()) / len(self.ids)
            agreement += float((before.argmax(-1) == after.argmax(-1)).double().mean()) / len(self.ids)
        row.loss, row.divergence, row.agreement = np.array(losses), divergence, agreement


def _log_softmax(run, ids: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(run({"input_ids": ids[None]})[smollm2.OUTPUT])[0]).log_softmax(-1)


def _share(row: Row, dense: Row, published: Row) -> str:
    """``1 − ours ÷ theirs`` of the gaps to dense, mean over the domains, with its interval."""
    ours, theirs = row.loss - dense.loss, published.loss - dense.loss
    domains = np.arange(len(ours)).reshape(len(texts.EVALUATION), -1)
    generator = np.random.default_rng(0)
    drawn = [np.concatenate([generator.choice(places, len(places)) for places in domains]) for _ in range(DRAWS)]
    shares = np.sort([1 - ours[places].mean() / theirs[places].mean() for places in drawn])
    low, high = shares[int(0.025 * DRAWS)], shares[int(0.975 * DRAWS) - 1]
    return f"{1 - ours.mean() / theirs.mean():.1%} [{low:.1%}, {high:.1%}]"


def _line(row: Row, dense: Row, published: Row | None) -> list[object]:
    domains = row.loss.reshape(len(texts.EVALUATION), -1).mean(1)
    size = row.size or row.path.stat().st_size
    share = "—" if published is None or row is published else _share(row, dense, published)
    return [row.name, row.keep, *(f"{math.exp(value):.2f}" for value in domains),
            f"{math.exp(row.loss.mean() - dense.loss.mean()):.3f}", share, f"{row.divergence:.4f}",
            f"{row.agreement:.1%}", f"{size / 2**20:.1f}", *(row.costs or ("",) * 4), f"{row.seconds:.0f}",
            row.sha256[:12]]  # fmt: skip


def _costs(row: Row, dense: Row) -> tuple[str, ...]:
    """Ratio of MACs, of latencies on one and two threads, and peak megabytes of one file."""
    if row.size:
        return ("as dense",) * 4
    sample = {"input_ids": smollm2.evaluation(3, 512)[0]["input_ids"][:1]}
    feeds = stored(sample, WORK / "feeds-1x512.npz")
    macs = OnnxGraph.load(row.path).macs(sample) / OnnxGraph.load(dense.path).macs(sample)
    files, peak = [dense.path, row.path], measure.peak_memory(row.path, feeds) or 0
    timings = [measure.time_files(files, feeds, seconds=SECONDS, threads=threads) for threads in (1, 2)]
    return (f"{macs:.3f}", *map(ratio_text, timings), f"{peak / 2**20:.0f}")
