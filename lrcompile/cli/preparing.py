"""What ``lrcompile deploy`` does to a model before it becomes firmware: compression, and quantisation to int8."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lrcompile.errors import UsageError
from lrcompile.progress import Progress


def prepared(model: Path, scratch: Path, given: dict[str, Any], tell: Progress) -> Path:
    """The file that is deployed: the model itself, or what ``--keep`` and ``--int8`` make of it, in ``scratch``.

    Raises:
        UsageError: calibration samples are missing.
        GateError: the compressed model drifted too far.
    """
    for option, wanted in (("--keep", given["keep"] is not None), ("--int8", given["int8"])):
        if wanted and given["calib"] is None:
            raise UsageError(f"{option} needs calibration samples", where=option, hint="give --calib samples.npz")
    if given["keep"] is not None:
        model = _compressed(model, scratch / "compressed.onnx", given, tell)
    if given["int8"]:
        tell("calibrating")
        model = _quantised(model, scratch / "quantised.onnx", given["calib"])
    return model


def _compressed(model: Path, out: Path, given: dict[str, Any], tell: Progress) -> Path:
    """Low-rank weights under the gate that ``optimize`` has."""
    from lrcompile.api import optimize
    from lrcompile.budget import Budget
    from lrcompile.options import Options

    options = Options(max_drift=given["max_drift"], latency=False)
    optimize(model, Budget(keep=given["keep"]), calibration=given["calib"], options=options, out=out, tell=tell)
    return out if out.exists() else model  # unchanged: nothing was written


def _quantised(model: Path, out: Path, calibration: str) -> Path:
    import onnx_ir as ir

    from lrcompile.data import Batches
    from lrcompile.graphs.onnx.graph import OnnxGraph
    from lrcompile.graphs.onnx.quantise import quantise

    graph = OnnxGraph.load(model)
    ir.save(quantise(graph.model, _each(Batches(calibration, batch=1).check(graph.input_specs))), out)
    return out


def _each(batches: Any) -> Iterator[Any]:
    yield from batches
