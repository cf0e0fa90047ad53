"""What ``lrcompile deploy`` does to a model before it becomes firmware: compression, and quantisation to int8."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lrcompile.errors import GateError, UsageError
from lrcompile.options import PRESETS
from lrcompile.progress import Progress


def prepared(model: Path, scratch: Path, given: dict[str, Any], tell: Progress) -> tuple[Path, float | None]:
    """The file that is deployed: the model itself, or what ``--keep`` and ``--int8`` make of it, in ``scratch``.

    With it comes the drift (relative L2, on the calibration samples) that quantisation alone caused.

    Raises:
        UsageError: calibration samples are missing.
        GateError: the compressed or the quantised model drifted too far.
    """
    for option, wanted in (("--keep", given["keep"] is not None), ("--int8", given["int8"])):
        if wanted and given["calib"] is None:
            raise UsageError(f"{option} needs calibration samples", where=option, hint="give --calib samples.npz")
    drift = None
    if given["keep"] is not None:
        model = _compressed(model, scratch / "compressed.onnx", given, tell)
    if given["int8"]:
        tell("calibrating")
        rounded = _quantised(model, scratch / "quantised.onnx", given["calib"])
        drift = _drift(model, rounded, given["calib"])
        limit = PRESETS["mcu"] if given["max_drift"] is None else given["max_drift"]
        if not drift <= limit:
            hint = "calibrate with more samples, or raise --max-drift"
            raise GateError(f"int8 changes the outputs by {drift:.2g} (relative L2), {limit:g} is allowed", hint=hint)
        model = rounded
    return model, drift


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


def _drift(model: Path, rounded: Path, calibration: str) -> float:
    """Relative L2 distance of the worst output over all calibration samples."""
    import numpy as np

    from lrcompile.data import Batches
    from lrcompile.graphs.onnx.graph import OnnxGraph
    from lrcompile.graphs.onnx.session import FileSession

    sessions = [FileSession(str(path)) for path in (model, rounded)]
    errors: dict[str, np.ndarray] = {}
    for batch in Batches(calibration, batch=1).check(OnnxGraph.load(model).input_specs):
        exact, coded = (session.run(batch) for session in sessions)
        for name, value in exact.items():
            if value.dtype.kind == "f":
                sums = np.array([np.sum((value - coded[name]) ** 2.0), np.sum(value**2.0)])
                errors[name] = errors.get(name, np.zeros(2)) + sums
    return max((float(np.sqrt(each[0] / max(each[1], 1e-30))) for each in errors.values()), default=0.0)


def _each(batches: Any) -> Iterator[Any]:
    yield from batches
