"""Comparing integers with ONNX Runtime's run of the same Q/DQ model, unit by unit."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from lrcompile.dataflow import interpret
from lrcompile.graphs.onnx.formulas.build import build
from lrcompile.graphs.onnx.quantise import integer_model

Arrays = Mapping[str, np.ndarray]


def runtime(model: ir.Model | onnx.ModelProto, inputs: Arrays, *, inside: bool = False) -> dict[str, np.ndarray]:
    """ONNX Runtime's outputs, and with ``inside`` those of every QuantizeLinear; nothing is fused."""
    proto = onnx.ModelProto()
    proto.CopyFrom(ir.to_proto(model) if isinstance(model, ir.Model) else model)
    if inside:
        known = {value.name for value in proto.graph.output}
        names = [n.output[0] for n in proto.graph.node if n.op_type == "QuantizeLinear" and n.output[0] not in known]
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, map(np.asarray, session.run(None, dict(inputs))), strict=True))


def unit_differences(model: ir.Model, inputs: Arrays) -> dict[str, float]:
    """For each rounded value: the largest difference in codes, every unit reading ONNX Runtime's codes.

    A float output is compared relative to its largest magnitude.
    """
    wanted = runtime(model, inputs, inside=True)
    formulas = build(integer_model(model, {name: array.shape for name, array in inputs.items()}), None)
    values: dict[str, np.ndarray] = {**formulas.constants, **inputs}
    found = {}
    for name, stage in formulas.stages.items():
        value = interpret.stage_value(stage, values)
        if name in wanted:
            true = wanted[name]
            shift = 128 if true.dtype == np.uint8 else 0
            true = true.astype(np.int16) - shift if true.dtype.kind in "iu" else true
            scale = 1.0 if true.dtype.kind == "i" else float(np.abs(true).max())
            found[name] = float(np.abs(value.astype(np.float64) - true).max()) / scale
            value = true.astype(value.dtype)
        values[name] = value
    return found


def outputs(model: ir.Model, inputs: Arrays) -> dict[str, np.ndarray]:
    """What the integer model computes from end to end."""
    formulas = build(integer_model(model, {name: array.shape for name, array in inputs.items()}), None)
    return interpret.run(formulas, inputs)


def operators(model: ir.Model, inputs: Arrays) -> list[str]:
    """Operators of the integer model, those of the private domain with a star."""
    lowered = integer_model(model, {name: array.shape for name, array in inputs.items()})
    return [f"*{node.op_type}" if node.domain else node.op_type for node in lowered.graph]
