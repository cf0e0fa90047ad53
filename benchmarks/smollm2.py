"""SmolLM2: perplexity, bytes, MACs, latency and memory of its low-rank forms, each row read from one file."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import WORK, kept_share, ratio_text, table, uniform, write
from benchmarks.saes import saes
from benchmarks.sparse import METHODS, density, pruned
from lrcompile import Budget, LowRank, Options, measure, optimize
from lrcompile.backends.onnxruntime import OnnxRuntime
from lrcompile.data import Batches
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
    method: float | None = None  # the budget
    seconds: float = 0.0
    loss: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (sequences,) nats per token
    divergence: float = 0.0
    agreement: float = 1.0
    keep: float | None = None  # where the file does not show it
    size: int = 0  # bytes, where the file does not show them


def main() -> None:
    """Makes the files and measures them, one by one; the table is written anew after each."""
    WORK.mkdir(parents=True, exist_ok=True)
    dense = Row("dense", exported("smollm2"))
    reference = _Reference(dense)
    published: dict[float | None, Row] = {}
    lines = [_line(dense, dense, None)]
    for row in _made(dense.path):
        print(row.name, row.method, f"{row.seconds:.0f} s", flush=True)
        reference.judge(row)
        if row.name.startswith(_PUBLISHED):
            published[row.method] = row
        lines.append(_line(row, dense, published.get(row.method)))
        write("smollm2", "SmolLM2-135M, 210 decoder linears, no training", [_HEAD, table(_COLUMNS, lines)])


_COLUMNS = ("what", "keep", *(f"perplexity {name}" for name in texts.EVALUATION), "geometric mean ÷ dense",
            "share of SVD-LLM's gap removed", "KL", "top-1", "MB", "MACs", "latency 1×512, 1 thread",
            "latency 1×512, 2 threads", "peak MB", "made in, s", "SHA-256")  # fmt: skip
_HEAD = """Each row is one ONNX file: all its figures are read from it. Keep counts stored values of the 210 linears.
Calibration: 96 sequences of 256 tokens of a computing dictionary, Wikipedia and docstrings (one draw). Evaluation: 8
sequences of 512 tokens for each domain, none of them calibrated on; of the news domain nothing was. Share: of the
log-perplexity gap that SVD-LLM (as published, at the same keep) leaves to dense, as mean over the three domains
with the 95 % interval of a bootstrap over paired sequences. Latency: ONNX Runtime, in turns with the dense file,
median of the paired ratios with its 95 % interval. Files of pruned models hold zeros, since no runtime here
computes with masks: their bytes are what values and masks would take, their other costs are those of the dense file.
The weights had been rounded to four bits before all this."""


def _made(dense: Path) -> Iterator[Row]:
    data, settings = Batches(smollm2.calibration()), Settings(cache=WORK / "cache")

    def flat(name: str, each: LowRank, keep: float) -> Row:
        path = _path(name, keep)
        return _row(f"{name}, uniform ranks", lambda: uniform(dense, each, keep, data, settings, path), keep)

    def chosen(name: str, each: LowRank, keep: float) -> Row:
        return _row(name, lambda: ours(dense, each, keep, data, settings, _path(name, keep)), keep)

    def anchored(keep: float) -> Row:
        return _row("SAES-SVD, uniform ranks", lambda: saes(dense, keep, _path("SAES-SVD", keep)), keep)

    def zeros(method: str, keep: float) -> Row:
        path = _path(method, keep)
        row = _row(
            f"{method}, masks of one bit", lambda: pruned(dense, method, density(keep, 32), data, settings, path)
        )
        row.keep, row.size = keep, dense.stat().st_size - round((1 - keep) * 4 * smollm2.LINEARS)
        return row

    for keep in KEEPS:
        yield flat(_PUBLISHED, PUBLISHED, keep)
        yield chosen("lrcompile", LowRank(), keep)
        yield flat("SVD-LLM shrunk and damped", OURS, keep)
        yield anchored(keep)
    yield _row("int8 weights, a scale for each row", lambda: _int8(dense))
    for keep in KEEPS[1:]:
        for method in METHODS:
            yield zeros(method, keep)


def _path(name: str, keep: float) -> Path:
    return WORK / f"smollm2-{name.replace(' ', '-')}-{keep}.onnx"


def _row(name: str, make, keep: float | None = None) -> Row:
    start = time.monotonic()
    path = make()
    return Row(name, path, keep, time.monotonic() - start)


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
        self.judge(dense)

    def judge(self, row: Row) -> None:
        """Runs the row's file on every sequence."""
        assert self.logs is not None
        run = FileSession(str(row.path)).run
        losses, divergence, agreement = [], 0.0, 0.0
        for ids, stored in zip(self.ids, self.logs, strict=True):
            before, after = torch.from_numpy(np.array(stored)), _log_softmax(run, ids)
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
    feeds = WORK / "feeds-1x512.npz"
    sample = {"input_ids": smollm2.evaluation(3, 512)[0]["input_ids"][:1]}
    np.savez(feeds, **sample)  # pyright: ignore[reportArgumentType]
    domains = row.loss.reshape(len(texts.EVALUATION), -1).mean(1)
    share_kept = "—" if row.method is None else kept_share(row.path, dense.path)
    share_kept = share_kept if row.keep is None else f"{row.keep:.4f}"
    size = row.size or row.path.stat().st_size
    macs = OnnxGraph.load(row.path).macs(sample) / OnnxGraph.load(dense.path).macs(sample)
    share = "—" if published is None or row is published else _share(row, dense, published)
    peak = measure.peak_memory(row.path, feeds) or 0
    timings = [_ratio([dense.path, row.path], feeds, threads) for threads in (1, 2)]
    return [row.name, share_kept, *(f"{math.exp(value):.2f}" for value in domains),
            f"{math.exp(row.loss.mean() - dense.loss.mean()):.3f}", share, f"{row.divergence:.4f}",
            f"{row.agreement:.1%}",
            f"{size / 2**20:.1f}", f"{macs:.3f}", *timings, f"{peak / 2**20:.0f}",
            f"{row.seconds:.0f}", sha256(row.path)[:12]]  # fmt: skip


def _ratio(files: list[Path], feeds: Path, threads: int) -> str:
    timing = measure.time_files(files, feeds, seconds=SECONDS, threads=threads)
    return ratio_text(timing)
