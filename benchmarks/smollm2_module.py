"""SmolLM2 made smaller from its ONNX file and as an nn.Module, with the same data: is it the same?"""

from __future__ import annotations

from typing import Any

from benchmarks.common import WORK, table, write
from lrcompile import Budget, LowRank, Options, optimize
from lrcompile.data import Batches
from lrcompile.planning import Settings
from lrcompile.zoo import exported, module_run, onnx_run, smollm2

KEEP = 0.8
REQUIRED = 0.02
"""How much the ratios of perplexity to dense may differ."""


def main() -> None:
    """Both ways at one budget; perplexities on all evaluation texts."""
    WORK.mkdir(parents=True, exist_ok=True)
    dense, small = exported("smollm2"), WORK / "smollm2-same.onnx"
    _optimized(dense, small)
    module = module_run(_optimized(smollm2.module()).model, (smollm2.OUTPUT,))
    found = {"dense": onnx_run(dense), "from the ONNX file": onnx_run(small), "as nn.Module": module}
    scores = {name: smollm2.metric(run) for name, run in found.items()}
    names = list(scores["dense"])
    before = scores["dense"]["perplexity"]
    rows = [
        (name, *(f"{score[each]:.3f}" for each in names), f"{score['perplexity'] / before:.4f}")
        for name, score in scores.items()
    ]
    apart = abs(scores["from the ONNX file"]["perplexity"] / scores["as nn.Module"]["perplexity"] - 1)
    text = (
        f"Keep {KEEP} of the 210 linears, default passes, the same calibration data. The two ratios to dense differ by \
{apart:.2%} (required ≤ {REQUIRED:.0%})."
    )
    write("smollm2_module", "SmolLM2: ONNX file and nn.Module", [text, table(("", *names, "÷ dense"), rows)])


def _optimized(model: Any, out: Any = None) -> Any:
    options = Options(max_drift=9.0, force=True, latency=False, settings=Settings(cache=WORK / "cache"))
    data, held = Batches(smollm2.calibration()), smollm2.evaluation(3, 64)
    return optimize(
        model, Budget(keep=KEEP), passes=[LowRank()], calibration=data, evaluation=held, options=options, out=out
    )
