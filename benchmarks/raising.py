"""Raising every site of a large ONNX file to an expression, and putting all of them back unchanged."""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir

from benchmarks.common import table, write
from lrcompile.backends.onnxruntime import OnnxModel, lower
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.linop import same

RUNS = 5
ENTRY = "smollm2"


def main() -> None:
    """Times the steps on the file; then compares the new model with the old one, weight by weight."""
    path = _file()
    start = time.perf_counter()
    graph = OnnxGraph.load(path)
    loaded = time.perf_counter() - start
    raised, replaced, lowered = [], [], []
    for _ in range(RUNS):
        fresh = OnnxGraph(graph.model, path)
        times = [time.perf_counter()]
        sites = fresh.linear_sites()
        times.append(time.perf_counter())
        writable = [site for site in sites if not site.frozen]
        for site in writable:
            fresh.replace(site, site.operator)
        times.append(time.perf_counter())
        model = lower(fresh)
        times.append(time.perf_counter())
        for step, (begin, end) in zip((raised, replaced, lowered), itertools.pairwise(times), strict=True):
            step.append(end - begin)
    totals = [sum(parts) for parts in zip(raised, replaced, lowered, strict=True)]
    steps = {"raise": raised, "replace": replaced, "put back": lowered, "all three": totals}
    rows = [[name, f"{min(t):.3f}", f"{statistics.median(t):.3f}", f"{max(t):.3f}"] for name, t in steps.items()]
    nodes = sum(1 for _ in graph.model.graph)
    facts = [
        f"{path.name}, {path.stat().st_size / 2**20:.0f} MB, {nodes} nodes, {len(sites)} sites; {len(writable)} "
        f"are replaced by themselves; {RUNS} runs, seconds. Reading the file and checking that every weight is finite "
        f"takes {loaded:.2f} s more.",
        table(["step", "least", "median", "most"], rows),
        "What came back: " + "; ".join(_compared(graph, model)) + ".",
    ]
    write("raising", "Raising all sites and putting them back", facts)


def _file() -> Path:
    """The zoo's file, or one that is given as the last argument."""
    if sys.argv[-1].endswith(".onnx"):
        return Path(sys.argv[-1])
    from lrcompile.zoo import exported

    return exported(ENTRY)


def _compared(graph: OnnxGraph, model: ir.Model) -> list[str]:
    """How the rebuilt model differs from the loaded one."""
    again = OnnxGraph(model)
    pairs = list(zip(graph.linear_sites(), again.linear_sites(), strict=True))
    equal = sum(same(one.operator, other.operator) for one, other in pairs)
    kinds = [Counter(node.op_type for node in each.model.graph) for each in (graph, again)]
    ids = np.arange(12, dtype=np.int64).reshape(2, 6)
    feeds = {spec.name: ids if "ids" in spec.name else np.ones_like(ids) for spec in graph.input_specs}
    one, other = graph.run(feeds), OnnxModel(model).run(feeds)
    largest = max(float(np.abs(one[name] - other[name]).max()) for name in one)
    return [
        f"{equal} of {len(pairs)} sites hold the same bits",
        f"{graph.nbytes - again.nbytes:+d} bytes of weights",
        "the same operators" if kinds[0] == kinds[1] else f"operators {dict(kinds[1] - kinds[0])} more",
        f"outputs differ by at most {largest:g}",
    ]
