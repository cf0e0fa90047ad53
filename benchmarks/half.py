"""SmolLM2 in bfloat16: the identity gauge where its permutation is absorbed, beside none and one with a Gather."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import lrcompile
from benchmarks.common import WORK, table, write
from lrcompile import Budget, LowRank, Options, optimize
from lrcompile.artifact import save
from lrcompile.artifact_read import WEIGHTS
from lrcompile.data import Batches
from lrcompile.files import sha256
from lrcompile.graphs.structured import structured_modules
from lrcompile.linop import Identity, LinearOperator, Select, children
from lrcompile.planning import Settings
from lrcompile.zoo import smollm2

KEEP = 0.8
WAYS = {
    "no gauge": LowRank(gauge=False),
    "gauge where the permutation is absorbed": LowRank(),
    "gauge everywhere, else with a Gather": LowRank(permute=True),
}
_COLUMNS = ("what", "keep", "perplexity foldoc", "perplexity wikipedia", "perplexity news", "geometric mean ÷ dense",
            "MB", "linears in the gauge", "with a Gather", "made in, s", "SHA-256")  # fmt: skip
_HEAD = f"""SmolLM2-135M as an `nn.Module` in bfloat16. Keep {KEEP} of the values of 210 decoder linears; calibration
and texts are those of the SmolLM2 table. Each row is one folder that was saved and loaded again: MB and hash are those
of its safetensors file. An identity gauge in half precision needs pivots, hence outputs in an order of their own: gate
and up take it over with down, no other layer can. Where the order is not absorbed, every run gathers the outputs."""


def main() -> None:
    """Makes the modules and scores them, one by one; the table is written after each."""
    WORK.mkdir(parents=True, exist_ok=True)
    lines: list[list[object]] = []
    base: float | None = None
    for what, kept, module, file, seconds in _made():
        scores = smollm2.metric(_run(module))
        base = base or scores["perplexity"]
        domains = [f"{value:.2f}" for key, value in scores.items() if key != "perplexity"]
        layers = [layer.operator for _, layer in structured_modules(module)]
        lines.append([what, kept, *domains, f"{scores['perplexity'] / base:.3f}", f"{file.stat().st_size / 2**20:.1f}",
                      *(sum(_has(each, kind) for each in layers) for kind in (Identity, Select)),
                      f"{seconds:.0f}", sha256(file)[:12]])  # fmt: skip
        write("half", "SmolLM2 in half precision", [_HEAD, table(_COLUMNS, lines)])


def _made() -> Iterator[tuple[str, str, nn.Module, Path, float]]:
    data, held = Batches(smollm2.calibration()), smollm2.evaluation(3, 64)  # the gate stays open
    options = Options(max_drift=9.0, force=True, latency=False, settings=Settings(cache=WORK / "cache"))
    dense = _dense()
    before = _values(dense)
    yield "dense", "1", dense, _saved(dense, "dense"), 0.0
    for what, each in WAYS.items():
        start, budget = time.monotonic(), Budget(keep=KEEP)
        made = optimize(dense, budget, passes=[each], calibration=data, evaluation=held, options=options).model
        seconds, file = time.monotonic() - start, _saved(made, str(len(what)))
        module = _dense()
        lrcompile.load(file.parent, into=module)
        yield what, f"{1 - (before - _values(module)) / smollm2.LINEARS:.4f}", module, file, seconds


def _dense() -> nn.Module:
    return smollm2.LanguageModel(smollm2.causal_lm()).bfloat16().eval()


def _saved(module: nn.Module, name: str) -> Path:
    folder = WORK / f"half-{name}"
    save(module, folder, force=True)
    return folder / WEIGHTS


def _has(operator: LinearOperator, kind: type[LinearOperator]) -> bool:
    return isinstance(operator, kind) or any(_has(each, kind) for each in children(operator))


def _values(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


def _run(module: nn.Module) -> Any:
    """Logits in float32, since numpy has no bfloat16."""

    @torch.no_grad()
    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        logits = module(**{name: torch.from_numpy(value) for name, value in feeds.items()})
        return {smollm2.OUTPUT: logits.float().numpy()}

    return run
