"""SmolLM2 layer by layer under ``torch.compile(backend="lrcompile")``: the whole model takes minutes to compile."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import torch

from benchmarks.common import WORK, table, write
from benchmarks.compile import COLUMNS, HEAD, planned, row
from lrcompile.graphs.module_sites import share
from lrcompile.zoo import smollm2

KEEP, REQUIRED = 0.6, 0.80
"""What is kept of the decoder's linears, and the ratio that is required of it."""
_HEAD = f"""{HEAD}
The head and the embedding are one tensor and stay dense; keep counts the 210 linears of the decoder."""


def main() -> None:
    """One plan, thirty layers, one thread."""
    torch.set_num_threads(1)
    WORK.mkdir(parents=True, exist_ok=True)
    write("regional", "SmolLM2 compiled layer by layer, ratio to Inductor dense", [_HEAD, table(COLUMNS, [_smollm2()])])


def _smollm2() -> list[object]:
    model: Any = smollm2.module()
    keep, required = KEEP, REQUIRED
    plan = planned(model, keep, smollm2.calibration(24, 128), smollm2.evaluation(6, 128), ("*lm_head*",))
    eager: Any = share(model)
    dense: Any = share(model)
    for layer, plain in zip(model.model.model.layers, dense.model.model.layers, strict=True):
        layer.compile(backend="lrcompile", options={"plan": plan})
        plain.compile()
    feeds = (torch.from_numpy(np.random.default_rng(0).integers(1000, 20000, (1, 64))),)
    sizes = {name: prod(entry.shape) for name, entry in plan.entries.items()}
    head = sum(size for name, size in sizes.items() if "lm_head" in name)
    kept = (plan.keep * sum(sizes.values()) - head) / (sum(sizes.values()) - head)
    return row("SmolLM2-135M, regional", "1×64", f"{kept:.4f}", plan, feeds, (eager, dense, model), required)
