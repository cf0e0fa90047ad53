"""SmolLM2 in float16: the identity gauge where its permutation is absorbed, beside none and one with a Gather."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import onnx

from benchmarks.common import WORK, kept_share, ratio_text, table, write
from lrcompile import Budget, LowRank, Options, measure, optimize
from lrcompile.data import Batches
from lrcompile.feeds import feeds, stored
from lrcompile.files import sha256
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.planning import Settings
from lrcompile.zoo import exported, onnx_run, smollm2

KEEP = 0.8
WAYS = {
    "no gauge": LowRank(gauge=False),
    "gauge where the permutation is absorbed": LowRank(),
    "gauge everywhere, else with a Gather": LowRank(permute=True),
}
WIDE = ("Pow", "ReduceMean", "Sqrt", "Reciprocal", "Cos", "Sin")
"""Operators of norms and positions: squares of a language model's largest channels exceed float16."""
SECONDS = 20.0
_COLUMNS = ("what", "keep", "perplexity foldoc", "perplexity wikipedia", "perplexity news", "geometric mean ÷ dense",
            "MB", "Gather nodes beside dense", "latency 1×512, 1 thread", "made in, s", "SHA-256")  # fmt: skip
_HEAD = f"""SmolLM2-135M as `onnxruntime.transformers.float16` converts it, norms and rotary angles kept in float32 (the
squares of its largest channels exceed float16). Keep {KEEP} of the values of 210 decoder linears; calibration and
texts are those of the SmolLM2 table. An identity gauge in half precision needs pivots, hence outputs in an order of
their own: gate and up take it over with down, no other layer can. This CPU has no half-precision kernels, so ONNX
Runtime computes in float32 between casts: latencies say what a Gather costs, not what float16 gains."""


def main() -> None:
    """Makes the files and measures them, one by one; the table is written after each."""
    WORK.mkdir(parents=True, exist_ok=True)
    dense = halved(exported("smollm2"))
    path = stored(feeds(OnnxGraph.load(dense), None, {"input_ids": (1, 512)}), WORK / "feeds-half.npz")
    lines: list[list[object]] = []
    base: float | None = None
    for what, file, seconds in _made(dense):
        scores = smollm2.metric(onnx_run(file))
        base = base or scores["perplexity"]
        domains = [f"{value:.2f}" for key, value in scores.items() if key != "perplexity"]
        timing = measure.time_files([dense, file], path, seconds=SECONDS, threads=1, busy=True)
        lines.append([what, "—" if file == dense else kept_share(file, dense), *domains,
                      f"{scores['perplexity'] / base:.3f}", f"{file.stat().st_size / 2**20:.1f}",
                      _gathers(file) - _gathers(dense), ratio_text(timing), f"{seconds:.0f}",
                      sha256(file)[:12]])  # fmt: skip
        write("half", "SmolLM2 in half precision", [_HEAD, table(_COLUMNS, lines)])


def halved(source: Path) -> Path:
    """The model with float16 weights and products; inputs and outputs as they were."""
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    out = WORK / f"{source.stem}-half.onnx"
    if not out.is_file():
        kept = [*DEFAULT_OP_BLOCK_LIST, *WIDE]
        onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True, op_block_list=kept), out)
    return out


def _made(dense: Path) -> Iterator[tuple[str, Path, float]]:
    yield "dense", dense, 0.0
    data, held = Batches(smollm2.calibration()), smollm2.evaluation(3, 64)
    for what, each in WAYS.items():
        out, start = WORK / f"half-{len(what)}.onnx", time.monotonic()
        options = Options(max_drift=9.0, force=True, latency=False, settings=Settings(cache=WORK / "cache"))
        optimize(dense, Budget(keep=KEEP), passes=[each], calibration=data, evaluation=held, options=options, out=out)
        yield what, out, time.monotonic() - start


def _gathers(file: Path) -> int:
    return sum(node.op_type == "Gather" for node in onnx.load(file, load_external_data=False).graph.node)
