"""Every rule about rows against its operator: nodes of ONNX's conformance cases alone, in two tiles along each axis."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks.common import table, write
from benchmarks.conformance_cases import RANDOM, cases
from lrcompile.errors import LrcompileError
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.graphs.onnx.tiling import plan
from lrcompile.graphs.onnx.tiling.emit import Writer
from lrcompile.graphs.onnx.tiling.grow import Grower
from lrcompile.graphs.onnx.tiling.memory import Lives, Readers, execution
from lrcompile.graphs.onnx.tiling.sizes import measured


def cut_in_two(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> Iterable[str]:
    """Operators that were cut and computed the same, one for each way.

    Raises:
        LrcompileError: a cut computes something else, or does not run.
    """
    sizes, readers = measured(model, feeds), Readers(model.graph)
    grower = Grower(Lives(execution(model.graph, readers), sizes, readers), sizes)
    for node in model.graph:
        for value in node.outputs:
            for region in grower.seeds(value):
                clone = model.clone()
                Writer(clone.graph, sizes).tile(next(plan.moved(model.graph, clone.graph, [region])), 2)
                clone.graph.sort()
                plan.check(model, clone, sizes)
                yield node.op_type


def feeds_of(case: Any) -> dict[str, Any] | None:
    """The case's inputs by name; None where they are no arrays."""
    initialised = {each.name for each in case.model.graph.initializer}
    names = [value.name for value in case.model.graph.input if value.name not in initialised]
    feeds = dict(zip(names, case.data_sets[0][0], strict=False))
    return feeds if all(isinstance(each, np.ndarray) for each in feeds.values()) else None


def main() -> None:
    """All cases."""
    operators: Counter[str] = Counter()
    outcome: Counter[str] = Counter()
    start = time.monotonic()
    for case in cases():
        feeds = feeds_of(case)
        if feeds is None or any(word in case.name for word in RANDOM):
            outcome["random, or inputs that are no arrays"] += 1
            continue
        try:
            graph = OnnxGraph.from_proto(case.model)
            measured(graph.model, feeds)
        except LrcompileError:
            outcome["ONNX Runtime does not run it"] += 1
            continue
        if (graph.opset or 0) < plan.OPSET:
            outcome["too old for tiles"] += 1
            continue
        found = Counter(cut_in_two(graph.model, feeds))
        operators += found
        outcome["cut and compared" if found else "nothing that works row by row"] += 1
    told = f"{operators.total():,} ways to cut {len(operators)} operators in two, all with equal results; "
    text = told + f"{time.monotonic() - start:.0f} s. A cut that differs stops the measurement."
    rows = [[name, f"{count:,}"] for name, count in operators.most_common()]
    write("tile_rules", "Rules of row tiles against the operators", [
        text, table(("case", "count"), outcome.most_common()), table(("operator", "ways"), rows)])  # fmt: skip
