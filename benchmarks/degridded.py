"""Quality at few bits on SmolLM2 off its four-bit grid, beside the model on it: perplexity only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx

from benchmarks.common import WORK, table, write
from benchmarks.smollm2 import rounded
from lrcompile import Budget, LowRank, Options, optimize
from lrcompile.backends.onnxruntime import OnnxRuntime
from lrcompile.files import AtomicSet, sha256
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.planning import Settings
from lrcompile.zoo import exported, onnx_run, smollm2

MODELS = {"smollm2": "on its grid", "smollm2_rotated": "off its grid"}
HEAD = "*lm_head*"
KEEP = 0.8
_COLUMNS = ("weights", "what", "perplexity foldoc", "perplexity wikipedia", "perplexity news", "geometric mean ÷ dense",
            "MB", "made in, s", "SHA-256")  # fmt: skip
_HEAD = f"""SmolLM2's weights had been rounded to four bits (Q4_1, blocks of 32) before anything here. Off its grid is
the same function: gains of norms folded into the next linears, the residual stream turned by a random orthogonal
matrix. Only the 210 decoder linears are changed, embedding and head stay in float32; off the grid the head is stored
beside the embedding, which makes its files 108 MB larger. int8: symmetric, one scale for each row. int4: ONNX
Runtime's `MatMulNBitsQuantizer`, blocks of 32 with a scale and a zero point, round to nearest, computed in float32.
lrcompile: keep {KEEP}, calibrated as in the SmolLM2 table. Each row is one ONNX file."""


def main() -> None:
    """Makes the files and scores them, one by one; the table is written after each."""
    WORK.mkdir(parents=True, exist_ok=True)
    lines: list[list[object]] = []
    for name, weights in MODELS.items():
        dense = exported(name)
        before: float | None = None
        for what, path, seconds in _made(name, dense):
            scores = smollm2.metric(onnx_run(path))
            before = before or scores["perplexity"]
            domains = [f"{value:.2f}" for key, value in scores.items() if key != "perplexity"]
            size = f"{path.stat().st_size / 2**20:.1f}"
            ratio = f"{scores['perplexity'] / before:.4f}"
            lines.append([weights, what, *domains, ratio, size, f"{seconds:.0f}", sha256(path)[:12]])
            write("degridded", "SmolLM2 on and off its four-bit grid", [_HEAD, table(_COLUMNS, lines)])


def _made(name: str, dense: Path) -> Iterator[tuple[str, Path, float]]:
    ways: dict[str, Callable[[Path, Path], None]] = {"int8": _int8, "int4": _int4, f"lrcompile, keep {KEEP}": _ours}
    yield "float32", dense, 0.0
    for what, make in ways.items():
        out, start = WORK / f"degridded-{name}-{make.__name__.strip('_')}.onnx", time.monotonic()
        make(dense, out)
        yield what, out, time.monotonic() - start


def _int8(dense: Path, out: Path) -> None:
    graph = OnnxGraph.load(dense)
    for site in graph.linear_sites():
        if not site.frozen and "lm_head" not in site.name:
            graph.replace(site, rounded(site))
    with AtomicSet(out, force=True) as files:
        OnnxRuntime().build(graph, out=files)


def _int4(dense: Path, out: Path) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = onnx.load(dense)
    head = [node.name for node in model.graph.node if smollm2.OUTPUT in node.output]
    quantizer = MatMulNBitsQuantizer(model, bits=4, block_size=32, is_symmetric=False, nodes_to_exclude=head)
    quantizer.process()
    done: Any = quantizer.model
    done.save_model_to_file(str(out))


def _ours(dense: Path, out: Path) -> None:
    settings = Settings(cache=WORK / "cache", exclude=(HEAD,))
    options = Options(max_drift=9.0, force=True, latency=False, settings=settings)
    data, held = smollm2.calibration(), smollm2.evaluation(3, 64)  # the gate stays open
    budget = Budget(keep=KEEP)
    optimize(dense, budget, passes=[LowRank()], calibration=data, evaluation=held, options=options, out=out)
