"""Two models on the same inputs, in turns: how fast each is, and the ratio."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from lrcompile import measure
from lrcompile.cli.comparing import check_inputs
from lrcompile.cli.shell import Answer
from lrcompile.errors import UnsupportedError, UsageError
from lrcompile.feeds import feeds, shapes, stored
from lrcompile.files import digest
from lrcompile.frontend import open_graph
from lrcompile.graphs.base import Graph
from lrcompile.report.text import human_ms


def bench(given: dict[str, Any]) -> Answer:
    """``lrcompile bench``: ``ratio`` is B ÷ A, the median of paired runs with its 95 % interval.

    Raises:
        UsageError: options that are no numbers of theirs, or shapes that do not fit.
        InvalidInputError: unreadable, or the models take different inputs.
        UnsupportedError: no inputs can be made up, or ONNX Runtime does not run a model.
    """
    a, b = Path(given["a"]), Path(given["b"])
    _check(given)
    graphs = open_graph(a), open_graph(b)
    check_inputs(*graphs, b)
    wanted = shapes(given["shape"] or ())
    inputs = feeds(graphs[0], given["calib"], wanted, given["samples"])
    timing = _timed((a, b), graphs, inputs, given)
    fields = _fields((a, b), graphs, inputs, timing)

    def show() -> None:
        for name, ms, low, high in zip((a, b), timing.median_ms, timing.p10_ms, timing.p90_ms, strict=True):
            print(f"{name}: {human_ms(ms)} (10–90 %: {human_ms(low)} – {human_ms(high)})")
        threads = f"{timing.threads} thread{'s' if timing.threads > 1 else ''}"
        print(f"ratio {timing.ratio:.3f} [{timing.low:.3f}, {timing.high:.3f}], {timing.runs} runs each, {threads}")

    return Answer(fields, show)


def _check(given: dict[str, Any]) -> None:
    for name, least in (("threads", 0), ("samples", 1)):
        if given[name] is not None and given[name] < least:
            raise UsageError(f"{given[name]} is too few", where=f"--{name}", hint=f"at least {least}")
    if not 0 < given["seconds"] <= 3600:
        raise UsageError(f"{given['seconds']} is no time to measure", where="--seconds", hint="above 0, at most 3600")


def _timed(
    paths: tuple[Path, Path], graphs: tuple[Graph, Graph], inputs: dict[str, np.ndarray], given: dict[str, Any]
) -> measure.Timing:
    threads, seconds, precision = given["threads"], given["seconds"], given["precision"]
    if all(graph.kind == "onnx" for graph in graphs):
        files = [graph.files[0] if graph.files else path for graph, path in zip(graphs, paths, strict=True)]
        with tempfile.TemporaryDirectory() as folder:
            batch = stored(inputs, Path(folder) / "feeds.npz")
            found = measure.time_files(files, batch, seconds=seconds, threads=threads, precision=precision)
        if found is None:
            for graph in graphs:
                graph.run(inputs)  # says what is wrong with a model or the inputs
            raise UnsupportedError("ONNX Runtime does not run one of the models", where=f"{paths[0]}, {paths[1]}")
        return found
    rows = _in_process(graphs, inputs, threads, seconds, precision)
    return measure.summary([rows], threads)


def _in_process(
    graphs: Sequence[Graph], inputs: dict[str, np.ndarray], threads: int, seconds: float, precision: float
) -> list[list[float]]:
    """Modules, and a module against a file: both in this process."""
    from lrcompile.graphs.module import ModuleGraph
    from lrcompile.graphs.module_time import caller, plain, ready

    models = [plain(graph) for graph in graphs if isinstance(graph, ModuleGraph)]
    for graph in graphs:
        graph.run(inputs)  # says what is wrong with the inputs
    with ready(models, threads) if models else nullcontext():
        calls: list[Callable[[], object]] = []
        for graph in graphs:
            if isinstance(graph, ModuleGraph):
                calls.append(caller(plain(graph), inputs))
            else:
                calls.append(_file_caller(graph, inputs, threads))
        return measure.interleaved(calls, seconds, precision=precision)


def _file_caller(graph: Graph, inputs: dict[str, np.ndarray], threads: int) -> Callable[[], object]:
    from lrcompile.graphs.onnx.session import FileSession

    session = FileSession(str(graph.files[0]), threads=threads)
    session.run(inputs)
    return lambda: session.run(inputs)


def _fields(
    paths: tuple[Path, Path], graphs: tuple[Graph, Graph], inputs: dict[str, np.ndarray], timing: measure.Timing
) -> dict[str, Any]:
    sides = {}
    for index, (name, path, graph) in enumerate(zip("ab", paths, graphs, strict=True)):
        sides[name] = {
            "path": str(path),
            "sha256": digest(path, graph.files),
            "median_ms": timing.median_ms[index],
            "p10": timing.p10_ms[index],
            "p90": timing.p90_ms[index],
        }
    return {
        **sides,
        "ratio": {"median": timing.ratio, "low": timing.low, "high": timing.high},
        "runs": timing.runs,
        "threads": timing.threads,
        "inputs": {name: list(array.shape) for name, array in inputs.items()},
    }
