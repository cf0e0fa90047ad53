"""Two models on the same inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lrcompile import verify
from lrcompile.cli.shell import Answer
from lrcompile.data import Batches
from lrcompile.errors import GateError, InvalidInputError, UnsupportedError
from lrcompile.files import digest
from lrcompile.frontend import open_graph
from lrcompile.graphs.base import Graph
from lrcompile.report import human_bytes, jsonable
from lrcompile.samples import sample_inputs


def compare(a: Path, b: Path, data: str | None, limit: float | None, metric: str | None) -> Answer:
    """Drift of ``b`` against ``a``; made-up inputs where none are given.

    Raises:
        InvalidInputError: unreadable, or the models take different inputs.
        UnsupportedError: no inputs were given, and none can be made up.
        GateError: the outputs differ in name or shape.
    """
    chosen = verify.load_metric(metric) if metric else None
    first, second = open_graph(a), open_graph(b)
    check_inputs(first, second, b)
    drift = verify.measure(first.run, second.run, _batches(first, a, data), limit=limit, metric=chosen)
    fields = {
        "a": _file(a, first),
        "b": _file(b, second),
        "drift": jsonable({**vars(drift), "passed": drift.passed}) | {"inputs": "made up" if data is None else "given"},
    }

    def show() -> None:
        origin = "made-up inputs" if data is None else f"{drift.samples} samples"
        similarity = f"relative L2 {drift.relative_l2:.3g}, cosine {drift.cosine:.6f}"
        print(f"{similarity} on {origin} (output {drift.worst_output})")
        if drift.top1 is not None:
            print(f"top-1 agreement {drift.top1:.2%}, KL {drift.kl:.3g} nats")
        if drift.metric is not None:
            print(f"metric {drift.metric:.6g}")
        print("    ".join(f"{each['path']}: {human_bytes(each['bytes'])}" for each in (fields["a"], fields["b"])))
        if limit is not None:
            print("PASSED" if drift.passed else "FAILED")

    return Answer(fields, show) if drift.passed else Answer(fields, show, "gate_failed", _failed(drift))


def _batches(graph: Graph, path: Path, data: str | None) -> Any:
    if data is not None:
        return Batches(data).check(graph.input_specs)
    made = sample_inputs(graph)
    if made is None:
        raise UnsupportedError("no inputs could be made up for this model", where=str(path), hint="give --eval")
    return [made]


def check_inputs(first: Graph, second: Graph, path: Path) -> None:
    """Both graphs know their inputs by name; a module's optional ones may differ."""
    expected, found = ({spec.name for spec in graph.input_specs} for graph in (first, second))
    if first.kind == second.kind == "onnx" and expected != found:
        names = [", ".join(sorted(each)) for each in (found, expected)]
        raise InvalidInputError(f"takes the inputs {names[0]}, the first model takes {names[1]}", where=str(path))


def _failed(drift: verify.Drift) -> GateError:
    try:
        verify.require(drift)
    except GateError as error:
        return GateError(error.message, where=error.where, hint="raise --max-drift, or keep the first model")
    raise AssertionError("only a failed drift is explained")


def _file(path: Path, graph: Graph) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in graph.files)
    return {"path": str(path), "sha256": digest(path, graph.files), "bytes": size}
