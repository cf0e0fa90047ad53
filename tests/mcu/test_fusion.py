"""What fusion must not do: compute a reduction twice, or hide a product of bytes behind a table."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from lrcompile.dataflow.dot import dot
from lrcompile.dataflow.fuse import fuse
from lrcompile.dataflow.refine import refine
from lrcompile.dataflow.stage import Formulas
from lrcompile.graphs.onnx.formulas import build
from lrcompile.graphs.onnx.load import from_proto
from tests.mcu.test_integer_kernels import formulas

FLOAT = onnx.TensorProto.FLOAT


def products(model: Formulas) -> int:
    """Multiply–accumulates of one run in which nothing is computed again."""
    parts = [part for stage in model.stages.values() for part in stage.parts]
    return sum(part.size * part.reach for part in parts if part.body is not None and part.combine == "add")


def test_a_product_that_is_concatenated_with_what_is_made_of_it_is_computed_once():
    """Low-rank factors in the identity gauge: z, and z times a matrix, side by side."""
    rng = np.random.default_rng(0)
    arrays = {"v": (12, 4), "p": (4, 8), "b": (12,)}
    constants = [onnx.numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in arrays.items()]
    nodes = [
        helper.make_node("MatMul", ["x", "v"], ["z"]),
        helper.make_node("MatMul", ["z", "p"], ["w"]),
        helper.make_node("Concat", ["z", "w"], ["c"], axis=-1),
        helper.make_node("Add", ["c", "b"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, FLOAT, [5, 12]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    assert products(refine(fuse(build(from_proto(model))))) == 5 * 12 * 4 + 5 * 4 * 8


def test_integer_products_read_bytes_not_tables():
    model = refine(formulas("encoder"))
    weights = {name for name, array in model.constants.items() if array.dtype == np.int8 and array.ndim == 2}
    parts = [part for stage in model.stages.values() for part in stage.parts]
    wide = [part for part in parts if part.body is not None and weights & {load.tensor for load in part.loads()}]
    assert len(wide) > 5
    assert all(dot(part) is not None for part in wide)
