"""MiniLM: quality, bytes, MACs, latency and memory of its low-rank forms, each row read from one file.

``LRCOMPILE_MINILM=models python -m benchmarks minilm`` measures the two digits models of the last table alone and
prints that without writing the result.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.common import WORK, Child, kept_share, ratio_text, run, table, uniform, write
from lrcompile import Budget, LowRank, Options, measure, optimize
from lrcompile.data import Batches
from lrcompile.files import sha256
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.graphs.onnx.session import FileSession
from lrcompile.planning import Settings
from lrcompile.zoo import Run, digits_vit, exported, load, minilm

KEEPS = (0.8, 0.6)
GATE = "1.0"  # the gate is kept out of the way: the table shows what a smaller limit would refuse
SECONDS = float(os.environ.get("LRCOMPILE_MINILM_SECONDS", "5"))
MODELS = ("digits_vit", "digits_conv")
MODEL_KEEPS = (0.8, 0.6, 0.4)
BATCH = 64


@dataclass(frozen=True)
class Row:
    """One artefact."""

    name: str
    path: Path
    keep: float | None = None


def main() -> None:
    """Makes every file, then measures them one by one."""
    WORK.mkdir(parents=True, exist_ok=True)
    if os.environ.get("LRCOMPILE_MINILM") == "models":
        print("\n\n".join(_models()))
        return
    dense = exported("minilm")
    calibration, evaluation = minilm.write_npz(WORK)
    made = {keep: _optimized("minilm", (calibration, evaluation), keep) for keep in KEEPS}
    rows = _rows("minilm", {keep: path for keep, (path, _) in made.items()})
    reference = minilm.embed(FileSession(str(dense)).run, minilm.lee.evaluation_documents())
    feeds = {tokens: _feeds(*tokens) for tokens in ((1, 128), (16, 128))}
    lines = [_line(row, dense, reference, feeds) for row in rows]
    modules = [[keep, *_through_module(keep, (calibration, evaluation), reference, made[keep][0])] for keep in KEEPS]
    cost = [[keep, *_cost(made[keep][1])] for keep in KEEPS]
    write("minilm", "MiniLM, 36 encoder linears, no training", [_HEAD, table(_COLUMNS, lines), _MODULES,
          table(("keep", "cosine, ONNX file", "cosine, nn.Module", "difference"), modules), _COST,
          table(("keep", "seconds", "peak resident, MB", "with child processes, MB"), cost),
          *_models()])  # fmt: skip


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
_MODELS = f"""## Other models

`digits_vit`, a vision transformer, and `digits_conv`, a MobileNet-like network; settings and conventions as above. The
sites, the same for every row, are all that can be rewritten: patches, attention and head; stem, 1×1 convolutions and
head (depthwise convolutions cannot). Uniform ranks also cut the head of 10 classes and the first layer, which causes
most of their error; "ends dense" leaves these two alone, as papers do, and its keep, which counts them, may pass the
target by a little. Calibration: 256 images; gate: 180 others; accuracy, and cosine and relative L2 of the logits to the
dense ones: 359 more, which nothing was chosen by. MACs and latency at a batch of {BATCH}; peak: a fresh process that
loads the file and runs that batch. `--force-growth`, since runs of a millisecond may measure slower."""
_MODEL_COLUMNS = ("model", "what", "keep", "accuracy", "cosine", "relative L2", "KB", "MAC ratio",
                  f"latency ratio at {BATCH}", "peak MB", "SHA-256")  # fmt: skip


def _optimized(name: str, data: tuple[Path, Path], keep: float, *more: str) -> tuple[Path, Child]:
    out = WORK / f"{name}-{keep}.onnx"
    options = ["--calib", str(data[0]), "--eval", str(data[1]), "--max-drift", GATE, "--no-cache", "--force"]
    wanted = [str(exported(name)), "-o", str(out), "--keep", str(keep)]
    child = run(["lrcompile", "optimize", *wanted, *options, *more, "--json", "-q"])
    if child.code:
        raise SystemExit(child.stdout)
    print(json.dumps({key: json.loads(child.stdout)[key] for key in ("ratio", "drift", "budget")}))
    return out, child


def _rows(name: str, made: Mapping[float, Path], ends: Sequence[bool] = (True,)) -> list[Row]:
    """The dense file, and at each share the baselines and what the command line made."""
    rows = [Row("dense", exported(name))]
    for keep, path in made.items():
        for each in ends:
            rows += _baselines(name, keep, ends=each)
        rows.append(Row("lrcompile", path, keep))
    return rows


def _baselines(name: str, keep: float, *, ends: bool) -> list[Row]:
    """Plain and whitened factors of uniform ranks, by the same code; of inner sites only, or of all."""
    rows, note = [], "" if ends else ", ends dense"
    data, settings = Batches(load(name).calibration()), Settings(cache=WORK / "cache")
    for metric in ("plain", "whitened"):
        each = LowRank(metric=metric, center=False, two_sided=False, gauge=False)
        path = WORK / f"{name}-{metric}-{keep}{'' if ends else '-inner'}.onnx"
        uniform(exported(name), each, keep, data, settings, path, ends=ends)
        rows.append(Row(f"{metric} SVD, uniform ranks{note}", path, keep))
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
    ratios = [ratio_text(measure.time_files([dense, row.path], path, seconds=SECONDS)) for path in feeds.values()]
    peak = measure.peak_memory(row.path, feeds[1, 128]) or 0
    quality = [f"{scores[name]:.4f}" for name in ("cosine", "relative_l2", "lee50_pearson", "wordsim353_spearman")]
    size = f"{row.path.stat().st_size / 2**20:.1f}"
    kept = "1" if row.keep is None else kept_share(row.path, dense)
    return [row.name, kept, *quality, size, f"{macs:.3f}", *ratios, f"{peak / 2**20:.0f}", sha256(row.path)[:12]]


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


def _models() -> list[str]:
    """The section on the models of other kinds."""
    data = digits_vit.write_npz(WORK / "digits")
    feeds = WORK / f"feeds-digits-{BATCH}.npz"
    np.savez(feeds, images=np.load(data[0])["images"][:BATCH])
    lines = []
    for name in MODELS:
        made = {keep: _optimized(name, data, keep, "--force-growth")[0] for keep in MODEL_KEEPS}
        lines += [[name, *_model_line(row, name, feeds)] for row in _rows(name, made, (True, False))]
    return [_MODELS, table(_MODEL_COLUMNS, lines)]


def _model_line(row: Row, name: str, feeds: Path) -> list[object]:
    dense, sample = exported(name), dict(np.load(feeds))
    session = FileSession(str(row.path))
    found, wanted = _logits(session.run), _logits(FileSession(str(dense)).run)
    cosine = (found * wanted).sum(1) / (np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1))
    drift = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    quality = [f"{digits_vit.metric(session.run)['accuracy']:.4f}", f"{cosine.mean():.4f}", f"{drift:.4f}"]
    macs = OnnxGraph.load(row.path).macs(sample) / OnnxGraph.load(dense).macs(sample)
    timing = ratio_text(measure.time_files([dense, row.path], feeds, seconds=SECONDS))
    peak = measure.peak_memory(row.path, feeds) or 0
    kept = "1" if row.keep is None else kept_share(row.path, dense)
    size = f"{row.path.stat().st_size / 2**10:.1f}"
    return [row.name, kept, *quality, size, f"{macs:.3f}", timing, f"{peak / 2**20:.0f}", sha256(row.path)[:12]]


def _logits(run: Run) -> np.ndarray:
    return run({"images": digits_vit.digits("test")[0]})[digits_vit.OUTPUT].astype(np.float64)
