"""Row tiles of ordinary ONNX graphs: what ONNX Runtime's own allocator counts before and after, and the time of a run.

``python -m benchmarks schedule``; ``LRCOMPILE_SCHEDULE=minilm,deit`` measures some cases only.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import torch
from torch import Tensor, nn

from benchmarks import mcu_graphs
from benchmarks.common import WORK, table, write
from lrcompile import Budget, LowRank, Options, Pipeline, measure, zoo
from lrcompile.feeds import feeds, shapes, stored
from lrcompile.files import sha256
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.passes.schedule_memory import ScheduleMemory
from lrcompile.planning import Settings
from lrcompile.report import record

SECONDS = float(os.environ.get("LRCOMPILE_SCHEDULE_SECONDS", "8"))
_HEAD = """Every row is one file that `schedule-memory` wrote, measured against the file that it was made from: the same
inputs, one thread, ONNX Runtime's default options. **Activations**: most bytes requested from ONNX Runtime's CPU arena
and not given back at once during a first run, by the allocator's own statistics in its profile; weights and what the
session holds before the run do not count. **Arena held**: what the arena took from the system in that run, likewise.
**Process**: peak resident memory of a fresh process that loads the file and runs once, weights and runtime included.
**Time**: processor time, in turns with the original in one process, median of the paired ratios with its 95 % interval.
The largest difference of an output is relative L2. Sizes are those that the pass was told; the dimensions of MiniLM,
the decoder and the digits ViT stay free."""
_OTHER = "## The same files at sizes that they were not planned for"
_GRAPHS = """## What ONNX Runtime makes of them

Nodes of the graph as ONNX Runtime executes it after its own optimisations, and how many of them it has fused."""

_FORMS = """## Unrolled tiles or a loop

One attention (512 queries, 12 heads) by hand. A loop gathers its results along a new axis, so they are copied once
more, and all its tiles must have equal sizes, which free dimensions do not promise."""


@dataclass(frozen=True)
class Case:
    """A model, the sizes that memory is planned for, and others that it is measured at."""

    name: str
    path: Callable[[], Path]
    shape: str = ""
    others: tuple[str, ...] = ()
    tiles: int = 8
    keep: float | None = None

    @property
    def label(self) -> str:
        sizes = f" {self.shape.replace(';', ', ')}" if self.shape else ""
        lower = "" if self.keep is None else f", low rank at keep {self.keep}"
        return f"{self.name}{lower},{sizes} tiles ≤ {self.tiles}".replace(",  ", ", ")


class Decoder(nn.Module):
    """A causal language model without its head: 4 blocks of width 256 with 8 heads; batch and tokens are free."""

    def __init__(self, vocabulary: int = 1000, width: int = 256) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(mcu_graphs.Block(width, 8) for _ in range(4))
        self.norm = nn.LayerNorm(width)

    def forward(self, input_ids: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1])
        bias = torch.where(places[None, :] <= places[:, None], 0.0, -10000.0)
        x = self.words(input_ids)
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x)


def decoder() -> Path:
    """:class:`Decoder` with random weights as a file."""
    torch.manual_seed(0)
    stream: Any = io.BytesIO()
    axes = {"input_ids": {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("tokens", max=1024)}}
    torch.onnx.export(
        Decoder().eval(), (torch.zeros(2, 8, dtype=torch.int64),), stream, input_names=["input_ids"],
        output_names=["y"], opset_version=20, dynamo=True, external_data=False, verbose=False, dynamic_shapes=axes,
    )  # fmt: skip
    return _saved("decoder", onnx.load_model_from_string(stream.getvalue()))


def made(name: str) -> Callable[[], Path]:
    """One of the microcontroller graphs as a file."""
    return lambda: _saved(name, mcu_graphs.graph(name))


def _saved(name: str, model: onnx.ModelProto) -> Path:
    path = WORK / f"schedule-{name}.onnx"
    onnx.save(model, path)
    return path


def minilm() -> Path:
    return zoo.exported("minilm")


LONG, SHORT = "batch=1;sequence=512", ("batch=1;sequence=128", "batch=1;sequence=32", "batch=8;sequence=128")
CASES = (
    Case("minilm", minilm, LONG, SHORT),
    Case("minilm", minilm, LONG, SHORT, tiles=4),
    Case("minilm", minilm, LONG, SHORT, tiles=16),
    Case("minilm", minilm, "batch=8;sequence=128", ("batch=1;sequence=128",)),
    Case("minilm", minilm, LONG, keep=0.8),
    Case("decoder", decoder, "batch=1;tokens=512", ("batch=1;tokens=64",)),
    Case("deit", made("deit")),
    Case("vit32", made("vit32")),
    Case("mixer", made("mixer")),
    Case("bert-tiny", made("bert-tiny")),
    Case("hybrid", made("hybrid")),
    Case("digits_vit", lambda: zoo.exported("digits_vit"), "batch=64"),
)


FORMS = {
    "whole": "s = MatMul (q, k) p = Softmax <axis = -1> (s) y = MatMul (p, v)",
    "8 tiles, unrolled": "rows = Constant <value = int64[1] {{2}}> () {} y = Concat <axis = 2> ({})".format(
        " ".join(
            f"a{at} = Constant <value = int64[1] {{{64 * at}}}> () "
            f"b{at} = Constant <value = int64[1] {{{64 * at + 64}}}> ()"
            f" q{at} = Slice (q, a{at}, b{at}, rows) s{at} = MatMul (q{at}, k) p{at} = Softmax <axis = -1> (s{at})"
            f" y{at} = MatMul (p{at}, v)"
            for at in range(8)
        ),
        ", ".join(f"y{at}" for at in range(8)),
    ),
    "8 tiles in a Loop": """
        count = Constant <value = int64 {8}> () go = Constant <value = bool {1}> ()
        shape = Constant <value = int64[4] {1, 12, 512, 32}> ()
        all = Loop (count, go) <body = tile (int64 at, bool c) => (bool d, float[1, 12, 64, 32] o) {
            d = Identity (c) step = Constant <value = int64 {64}> () axis = Constant <value = int64[1] {2}> ()
            zero = Constant <value = int64[1] {0}> () a0 = Mul (at, step) b0 = Add (a0, step)
            a = Unsqueeze (a0, zero) b = Unsqueeze (b0, zero) t = Slice (q, a, b, axis)
            s = MatMul (t, k) p = Softmax <axis = -1> (s) o = MatMul (p, v) }>
        turned = Transpose <perm = [1, 2, 0, 3, 4]> (all) y = Reshape (turned, shape)""",
}
"""The same attention over 512 queries, 12 heads of width 32."""


def forms() -> list[list[str]]:
    """Memory and time of each form, against the first."""
    rows, path = [], WORK / "schedule-feeds.npz"
    shapes_of = {"q": (1, 12, 512, 32), "k": (1, 12, 32, 512), "v": (1, 12, 512, 32)}
    ends = ", ".join(f"float[{', '.join(map(str, shape))}] {name}" for name, shape in shapes_of.items())
    files = []
    for at, (name, body) in enumerate(FORMS.items()):
        text = f'<ir_version: 9, opset_import: ["" : 20]> m ({ends}) => (float[1, 12, 512, 32] y) {{ {body} }}'
        files.append(_saved(f"form-{at}", onnx.parser.parse_model(text)))
        generator = np.random.default_rng(0)
        batch = {key: generator.standard_normal(shape).astype(np.float32) for key, shape in shapes_of.items()}
        found = measure.arena(files[-1], stored(batch, path))
        size = "—" if found is None else f"{found.requested / 2**20:.2f}"
        rows.append([name, size, _time(files[0], files[-1], path), f"{_difference(files[0], files[-1], batch):.0e}"])
    return rows


def main() -> None:
    """Rewrites and measures every chosen case."""
    WORK.mkdir(parents=True, exist_ok=True)
    chosen = os.environ.get("LRCOMPILE_SCHEDULE", "").split(",")
    rows, others, graphs = [], [], []
    for at, case in enumerate(CASES):
        if chosen == [""] or case.name in chosen:
            source, result, report = rewritten(case, at)
            batch = _batch(case, source, case.shape)
            rows.append([case.label, *_row(case, source, result, batch), sha256(result)[:12]])
            others += [
                [case.label, each.replace(";", ", "), *_other(case, source, result, each)] for each in case.others
            ]
            graphs.append([case.label, *_graph(source), *_graph(result), *_told(report)])
    write("schedule", "Memory of ordinary ONNX graphs, rewritten", [
        _HEAD,
        table(("case", "activations, MB", "after", "ratio", "arena held, MB", "after", "ratio", "process, MB", "after",
               "time ratio", "difference", "bytes ratio", "SHA-256"), rows),
        _OTHER, table(("case", "measured at", "activations ratio", "time ratio"), others),
        _GRAPHS, table(("case", "nodes", "fused", "nodes after", "fused after", "plan", "seconds"), graphs),
        _FORMS, table(("form", "activations, MB", "time ratio", "difference"), forms()),
    ])  # fmt: skip


def rewritten(case: Case, at: int) -> tuple[Path, Path, record.Report]:
    """The file that is compared with, the result, and its report."""
    source, out = case.path(), WORK / f"schedule-{at}-{case.name}.after.onnx"
    options = Options(
        latency=False, force=True, force_growth=True, max_drift=10.0, settings=Settings(cache=WORK / "cache")
    )
    tile = ScheduleMemory(tiles=case.tiles, shape=case.shape)
    if case.keep is None:
        result = Pipeline([tile], options=options).run(source, out=out)
    else:
        data, budget = zoo.load(case.name).calibration()[::5], Budget(keep=case.keep)
        dense, source = source, WORK / f"schedule-{at}-{case.name}.before.onnx"
        Pipeline([LowRank()], budget, options).run(dense, data, out=source)
        result = Pipeline([LowRank(), tile], budget, options).run(dense, data, out=out)
    if result.path is None:
        raise SystemExit(f"{case.label}: {result.report.notes}")
    return source, out, result.report


def _batch(case: Case, source: Path, shape: str) -> dict[str, np.ndarray]:
    return feeds(OnnxGraph.load(source), given=shapes(shape.split(";")) if shape else None)


def _row(case: Case, source: Path, result: Path, batch: dict[str, np.ndarray]) -> list[str]:
    path = stored(batch, WORK / "schedule-feeds.npz")
    one, two = measure.arena(source, path), measure.arena(result, path)
    resident = [measure.peak_memory(file, path) or 0 for file in (source, result)]
    if one is None or two is None:
        raise SystemExit(f"{case.label} does not run")
    return [
        *_pair(one.requested, two.requested),
        *_pair(one.held, two.held),
        *(f"{size / 2**20:.0f}" for size in resident),
        _time(source, result, path),
        f"{_difference(source, result, batch):.1e}",
        f"{result.stat().st_size / source.stat().st_size:.4f}",
    ]


def _other(case: Case, source: Path, result: Path, shape: str) -> list[str]:
    path = stored(_batch(case, source, shape), WORK / "schedule-feeds.npz")
    one, two = measure.arena(source, path), measure.arena(result, path)
    ratio = "—" if one is None or two is None else f"{two.requested / one.requested:.3f}"
    return [ratio, _time(source, result, path)]


def _pair(one: int, two: int) -> list[str]:
    return [f"{one / 2**20:.2f}", f"{two / 2**20:.2f}", f"{two / one:.3f}"]


def _time(source: Path, result: Path, path: Path) -> str:
    found = measure.time_files([source, result], path, seconds=SECONDS, threads=1, precision=0.01, busy=True)
    return "—" if found is None else f"{found.ratio:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _difference(source: Path, result: Path, batch: dict[str, np.ndarray]) -> float:
    """Largest relative L2 difference of an output; more tokens than those of the plan are hidden in every other run."""
    outputs = [ort.InferenceSession(str(file), _quiet()).run(None, batch) for file in (source, result)]
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(*outputs, strict=True)]
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in pairs)


def _graph(path: Path) -> list[int]:
    """Nodes as they are executed, and those that belong to no standard."""
    options, out = _quiet(), WORK / "schedule-optimised.onnx"
    options.optimized_model_filepath = str(out)
    ort.InferenceSession(str(path), options)
    kinds = Counter(node.domain for node in onnx.load(out).graph.node)
    return [sum(kinds.values()), kinds["com.microsoft"]]


def _quiet() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return options


def _told(report: record.Report) -> Sequence[str]:
    """What the pass says of its plan, and how long it took."""
    note = next((note for note in report.notes if "activations at once" in note), "")
    seconds = next((each.seconds for each in report.passes if each.name.startswith("schedule-memory")), 0.0)
    return note.removeprefix("schedule-memory: ").removeprefix("activations at once "), f"{seconds:.1f}"
