"""Cases of the onnx package's backend test as C on this machine: one case, one verdict."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from lrcompile.backends.c import host
from lrcompile.backends.c.emit import emit
from lrcompile.dataflow.fuse import fuse
from lrcompile.dataflow.refine import refine
from lrcompile.dataflow.schedule import plain
from lrcompile.errors import LrcompileError, UnsupportedError
from lrcompile.graphs.onnx.formulas import build
from lrcompile.graphs.onnx.load import from_proto

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Verdict:
    """What became of a case.

    Args:
        kind: ``passed``; ``fixed``: passed once its integer parameters (axes, shapes, …) were made constant;
            ``refused``; ``wrong``.
        reason: of a refusal or a difference.
    """

    name: str
    operator: str
    kind: str
    reason: str = ""


@cache
def cases() -> list[Any]:
    """All node cases, made by the installed onnx package."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sorted(collect_testcases(None), key=lambda case: case.name)


def judge(case: Any) -> Verdict:
    """Compiles and runs a case as it stands, then with its parameters made constant."""
    name, operator = case.name, _operator(case)
    try:
        return Verdict(name, operator, *_attempt(case, case.model, None))
    except UnsupportedError as error:
        refusal = f"{error}"
    model = _with_parameters(case)
    if model is not None:
        try:
            return Verdict(name, operator, *_attempt(case, *model))
        except UnsupportedError as error:
            refusal = f"{error}"
    return Verdict(name, operator, "refused", refusal)


def _operator(case: Any) -> str:
    """The operator that the case is about: an expanded case has many nodes and is named after one."""
    nodes = case.model.graph.node
    return nodes[0].op_type if len(nodes) == 1 else re.sub(r"_expanded.*", "", case.name).split("_")[1]


def _attempt(case: Any, model: onnx.ModelProto, frozen: set[str] | None) -> tuple[str, str]:
    """(kind, reason).

    Raises:
        UnsupportedError: refused.
    """
    formulas = build(from_proto(model))
    if frozen and not any(stage.reads() & formulas.inputs.keys() for stage in formulas.stages.values()):
        raise UnsupportedError("nothing is left to compute once the parameters are constant")
    program = emit(plain(refine(fuse(formulas))))
    for given, wanted in case.data_sets:
        inputs, outputs = _named(case.model.graph.input, given), _named(case.model.graph.output, wanted)
        found = _run(program, {name: each for name, each in inputs.items() if name not in (frozen or ())})
        for port, value in zip(program.outputs, outputs.values(), strict=True):
            reason = _difference(found[port.name], value, case.rtol, case.atol)
            if reason:
                return "wrong", reason
    return ("fixed" if frozen else "passed"), ""


def _run(program: Any, inputs: Mapping[str, np.ndarray]) -> Arrays:
    with tempfile.TemporaryDirectory() as folder:
        return host.call(host.build(program, Path(folder)), program, inputs)


def _named(values: Sequence[onnx.ValueInfoProto], data: Sequence[Any]) -> Arrays:
    made = {}
    for info, each in zip(values, data, strict=True):
        if isinstance(each, onnx.TensorProto):
            each = numpy_helper.to_array(each)
        if not isinstance(each, (np.ndarray, np.generic)):
            raise UnsupportedError("sequences, maps and optional values have no equivalent in C")
        made[info.name] = np.asarray(each)
    return made


def _difference(found: np.ndarray, wanted: np.ndarray, rtol: float, atol: float) -> str:
    """Empty where both agree in type and shape, and in value as onnx's own runner asks."""
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return f"{found.dtype} {found.shape} instead of {wanted.dtype} {wanted.shape}"
    try:
        np.testing.assert_allclose(found, wanted, rtol=rtol, atol=atol)
    except AssertionError as error:
        return " ".join(str(error).split())[:300]
    return ""


def _with_parameters(case: Any) -> tuple[onnx.ModelProto, set[str]] | None:
    """The model with all integer inputs of rank 0 or 1 but the first as initializers, and their names."""
    given = case.data_sets[0][0]
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    names = set()
    for at, (info, each) in enumerate(zip(case.model.graph.input, given, strict=True)):
        array = numpy_helper.to_array(each) if isinstance(each, onnx.TensorProto) else each
        if at and isinstance(array, np.ndarray) and array.ndim < 2 and array.dtype in (np.int64, np.int32):
            model.graph.initializer.append(numpy_helper.from_array(array, info.name))
            names.add(info.name)
    kept = [info for info in model.graph.input if info.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    return (model, names) if names else None


def verdicts(chosen: Sequence[Any]) -> Iterator[Verdict]:
    """One verdict for each case; an error that is no refusal is a wrong result."""
    for case in chosen:
        try:
            yield judge(case)
        except Exception as error:
            kind = "refused" if isinstance(error, LrcompileError) and error.code in (3, 4) else "wrong"
            yield Verdict(case.name, _operator(case), kind, f"{type(error).__name__}: {error}"[:400])
