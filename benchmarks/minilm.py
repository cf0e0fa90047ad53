"""MiniLM: quality, bytes, MACs, latency and memory of its low-rank forms, each row read from one file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.common import WORK, Child, run, table, uniform, write
from lrcompile import Budget, LowRank, Options, measure, optimize
from lrcompile.data import Batches
from lrcompile.files import sha256
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.graphs.onnx.session import FileSession
from lrcompile.planning import Settings
from lrcompile.zoo import exported, minilm

KEEPS = (0.8, 0.6)
GATE = "1.0"  # the gate is kept out of the way: the table shows what a smaller limit would refuse
SECONDS = 5.0


@dataclass(frozen=True)
class Row:
    """One artefact."""

    name: str
    path: Path
    keep: float | None = None


def main() -> None:
    """Makes every file, then measures them one by one."""
    WORK.mkdir(parents=True, exist_ok=True)
    dense = exported("minilm")
    calibration, evaluation = minilm.write_npz(WORK)
    made = {keep: _optimized(dense, calibration, evaluation, keep) for keep in KEEPS}
    rows = [Row("dense", dense)]
    for keep in KEEPS:
        rows += _baselines(dense, keep)
        rows.append(Row("lrcompile", made[keep][0], keep))
    reference = minilm.embed(FileSession(str(dense)).run, minilm.lee.evaluation_documents())
    feeds = {tokens: _feeds(*tokens) for tokens in ((1, 128), (16, 128))}
    lines = [_line(row, dense, reference, feeds) for row in rows]
    modules = [[keep, *_through_module(keep, (calibration, evaluation), reference, made[keep][0])] for keep in KEEPS]
    cost = [[keep, *_cost(made[keep][1])] for keep in KEEPS]
    write("minilm", "MiniLM, 36 encoder linears, no training", [_HEAD, table(_COLUMNS, lines), _MODULES,
          table(("keep", "cosine, ONNX file", "cosine, nn.Module", "difference"), modules), _COST,
          table(("keep", "seconds", "peak resident, MB", "with child processes, MB"), cost)])  # fmt: skip


_COLUMNS = ("what", "keep", "cosine", "relative L2", "Lee-50 Pearson", "WordSim Spearman", "MB", "MAC ratio",
            "latency ratio 1×128", "latency ratio 16×128", "peak MB", "SHA-256")  # fmt: skip
_HEAD = """Each row is one ONNX file: all its figures are read from it. Keep counts the stored values of the 36 linears.
Calibration: 300 `lee_background` texts; cosine and relative L2 against the dense embeddings of the 50 Lee texts, which
nothing was chosen by. Latency: ONNX Runtime, all cores, in turns with the dense file, median of the paired ratios
with its 95 % interval; MACs of 1×128 tokens. Peak: a fresh process that loads the file and runs 1×128 tokens."""
_MODULES = """## The same through the module tree

Same data and settings, once from the ONNX file and once from the `nn.Module`."""
_COST = """## Cost of `lrcompile optimize minilm.onnx --keep … --calib … --eval … --no-cache`

Everything included: start-up, statistics, probes, gate, latency and memory of both files. Peak resident memory of the
process, and of it with its children."""


def _optimized(dense: Path, calibration: Path, evaluation: Path, keep: float) -> tuple[Path, Child]:
    out = WORK / f"minilm-{keep}.onnx"
    options = ["--calib", str(calibration), "--eval", str(evaluation), "--max-drift", GATE, "--no-cache", "--force"]
    child = run(["lrcompile", "optimize", str(dense), "-o", str(out), "--keep", str(keep), *options, "--json", "-q"])
    if child.code:
        raise SystemExit(child.stdout)
    print(json.dumps({key: json.loads(child.stdout)[key] for key in ("ratio", "drift", "budget")}))
    return out, child


def _baselines(dense: Path, keep: float) -> list[Row]:
    """Plain and whitened factors of uniform ranks, by the same code."""
    rows = []
    data, settings = Batches(minilm.calibration()), Settings(cache=WORK / "cache")
    for metric in ("plain", "whitened"):
        each = LowRank(metric=metric, center=False, two_sided=False, gauge=False)
        out = uniform(dense, each, keep, data, settings, WORK / f"minilm-{metric}-{keep}.onnx")
        rows.append(Row(f"{metric} SVD, uniform ranks", out, keep))
    return rows


def _feeds(samples: int, tokens: int) -> Path:
    ids = np.random.default_rng(0).integers(1000, 20000, (samples, tokens))
    path = WORK / f"feeds-{samples}x{tokens}.npz"
    np.savez(path, input_ids=ids, attention_mask=np.ones_like(ids))
    return path


def _line(row: Row, dense: Path, reference: np.ndarray, feeds: dict[tuple[int, int], Path]) -> list[object]:
    scores = minilm.scores(FileSession(str(row.path)).run, reference)
    sample = dict(np.load(feeds[1, 128]))
    macs = OnnxGraph.load(row.path).macs(sample) / OnnxGraph.load(dense).macs(sample)
    ratios = [_ratio(measure.time_files([dense, row.path], path, seconds=SECONDS)) for path in feeds.values()]
    peak = measure.peak_memory(row.path, feeds[1, 128]) or 0
    quality = [f"{scores[name]:.4f}" for name in ("cosine", "relative_l2", "lee50_pearson", "wordsim353_spearman")]
    size = f"{row.path.stat().st_size / 2**20:.1f}"
    kept = "1" if row.keep is None else _kept(row.path, dense)
    return [row.name, kept, *quality, size, f"{macs:.3f}", *ratios, f"{peak / 2**20:.0f}", sha256(row.path)[:12]]


def _kept(path: Path, dense: Path) -> str:
    """Share of the linears' values that the file stores: the rest of the model is the same in both."""
    before, after = OnnxGraph.load(dense), OnnxGraph.load(path)
    values = sum(site.shape[0] * site.shape[1] for site in before.linear_sites())
    return f"{1 - (before.parameters - after.parameters) / values:.4f}"


def _ratio(timing: measure.Timing | None) -> str:
    return "—" if timing is None else f"{timing.ratio:.3f} [{timing.low:.3f}, {timing.high:.3f}]"


def _through_module(keep: float, data: tuple[Path, Path], reference: np.ndarray, file: Path) -> list[str]:
    result = optimize(
        minilm.module(),
        Budget(keep=keep),
        calibration=data[0],
        evaluation=data[1],
        options=Options(max_drift=float(GATE), settings=Settings(cache=WORK / "cache")),
    )
    found: Callable = result.built.run
    module = minilm.scores(lambda batch: {minilm.OUTPUT: next(iter(found(batch).values()))}, reference)["cosine"]
    onnx = minilm.scores(FileSession(str(file)).run, reference)["cosine"]
    return [f"{onnx:.4f}", f"{module:.4f}", f"{abs(onnx - module):.4f}"]


def _cost(child: Child) -> list[str]:
    return [f"{child.seconds:.0f}", f"{child.peak / 2**20:.0f}", f"{child.tree / 2**20:.0f}"]
