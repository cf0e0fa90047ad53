"""Offsets in one arena: the planner against the greedy one of TensorFlow Lite Micro, onnx2c's unions and the bound.

Every planner gets the same buffers: the values that the nodes of the file make, each with a place of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import onnx

from benchmarks import mcu_graphs
from benchmarks.common import table, write
from benchmarks.mcu_planners import buffers, onnx2c, tflm
from lrcompile.dataflow.planner import bound, exact

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
HEAD = ["graph", "buffers", "bound, B", "ours, B", "TFLM greedy, B", "ours / greedy", "onnx2c unions, B", "seconds"]


def row(name: str, model: onnx.ModelProto) -> list[object]:
    """Plans one graph with each planner; ``=`` marks the bound."""
    values = buffers(model)
    requests = [value.request() for value in values]
    start = time.perf_counter()
    ours = exact(requests)
    seconds = time.perf_counter() - start
    least, greedy, unions = bound(requests), tflm(requests), sum(onnx2c(values))
    if not least <= ours.size <= greedy:
        raise AssertionError(f"{name}: bound {least}, ours {ours.size}, greedy {greedy}")
    mark = " =" if ours.size == least else ""
    ratio = f"{ours.size / greedy:.3f}"
    return [
        name,
        len(values),
        f"{least:,}",
        f"{ours.size:,}{mark}",
        f"{greedy:,}",
        ratio,
        f"{unions:,}",
        f"{seconds:.2f}",
    ]


def light() -> Iterator[tuple[str, onnx.ModelProto]]:
    """The graphs of well-known networks that the onnx package carries, without their weights."""
    for path in sorted(LIGHT.glob("*.onnx")):
        yield path.stem, onnx.load(path)


def main() -> None:
    """Plans the light graphs and the microcontroller ones."""
    one = [row(name, model) for name, model in light()]
    two = [row(name, mcu_graphs.graph(name)) for name in mcu_graphs.MODELS]
    text = (
        "`=`: no plan for these buffers is smaller. Buffers are rounded up to 16 bytes, except for onnx2c. The graph's "
        "inputs and outputs belong to the caller; constants lie in flash. No tiling, no fusion, no operation in place: "
        "this compares planners alone."
    )
    write("mcu_planner", "Arena planners", [text, table(HEAD, one), table(HEAD, two)])
