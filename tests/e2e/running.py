"""Runs of the digits network that the tests of the pipeline share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from lrcompile import zoo
from lrcompile.budget import Budget
from lrcompile.options import Options
from lrcompile.passes.low_rank import LowRank
from lrcompile.pipeline import Pipeline, Result
from lrcompile.planning import Settings

QUICK = Settings(probes=False)
PROBED = Settings(probe_samples=8)
LOOSE = Options(latency=False, max_drift=10.0, settings=QUICK)


def images(digits: zoo.ZooModel, count: int = 32) -> dict[str, np.ndarray]:
    return {"images": np.concatenate([batch["images"] for batch in digits.calibration()])[:count]}


def held(digits: zoo.ZooModel, count: int = 32) -> dict[str, np.ndarray]:
    return {"images": np.concatenate([batch["images"] for batch in digits.evaluation()])[:count]}


def run(
    digits: zoo.ZooModel,
    graph: Any,
    budget: Budget,
    *,
    passes: Sequence = (LowRank(),),
    options: Options = LOOSE,
    **kw: Any,
) -> Result:
    return Pipeline(list(passes), budget, options).run(graph, images(digits), held(digits), **kw)


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def values_in(path: Path) -> int:
    """Float values that a file stores, counted by onnx alone."""
    tensors = onnx.load(path).graph.initializer
    return sum(array.size for array in map(numpy_helper.to_array, tensors) if array.dtype.kind == "f")


def decided(result: Result) -> dict[str, str]:
    return {decision.site: decision.structure for decision in result.report.decisions}
