"""Row tiles of graphs that nobody drew: random programs with residuals, transposes, heads and several outputs."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.graphs.onnx.tiling import plan
from lrcompile.graphs.onnx.tiling.choose import Chooser
from lrcompile.graphs.onnx.tiling.emit import Writer
from lrcompile.graphs.onnx.tiling.sizes import measured

ROWS, WIDTH = 12, 8
Shape = tuple[int, ...]


@dataclass
class Program:
    """A graph that grows node by node; values are known with their shapes."""

    draw: st.DrawFn
    values: list[tuple[str, Shape]] = field(default_factory=lambda: [("x", (2, ROWS, WIDTH))])
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)

    def add(self, kind: str, inputs: list[str], shape: Shape, **attributes: object) -> None:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        self.values.append((name, shape))

    def constant(self, array: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(array, f"w{len(self.weights)}"))
        return self.weights[-1].name

    def weight(self, *shape: int) -> str:
        generator = np.random.default_rng(len(self.weights))
        return self.constant((generator.standard_normal(shape) / shape[0] ** 0.5).astype(np.float32))

    def step(self) -> None:
        """One more node on values that were drawn."""
        name, shape = self.draw(st.sampled_from(self.values))
        kinds = [self.unary, self.softmax, self.norm, self.turned, self.mean, self.taken]
        kinds += [self.product] if len(shape) > 1 else []
        kinds += [self.pair, self.scores] if len(shape) > 1 else []
        kinds += [self.heads] if len(shape) == 3 and shape[-1] % 2 == 0 else []
        self.draw(st.sampled_from(kinds))(name, shape)

    def unary(self, name: str, shape: Shape) -> None:
        self.add(self.draw(st.sampled_from(["Relu", "Tanh", "Neg", "Identity"])), [name], shape)

    def softmax(self, name: str, shape: Shape) -> None:
        self.add("Softmax", [name], shape, axis=self.draw(st.integers(0, len(shape) - 1)))

    def norm(self, name: str, shape: Shape) -> None:
        # the norm of equal numbers is that of their rounding: with the bias beside it, and the epsilon, it is small
        inputs = [name, self.weight(shape[-1]), self.weight(shape[-1])]
        self.add("LayerNormalization", inputs, shape, axis=-1, epsilon=0.1)

    def turned(self, name: str, shape: Shape) -> None:
        order = self.draw(st.permutations(range(len(shape))))
        self.add("Transpose", [name], tuple(shape[each] for each in order), perm=list(order))

    def mean(self, name: str, shape: Shape) -> None:
        axis = self.draw(st.integers(0, len(shape) - 1))
        axes = self.constant(np.array([axis], np.int64))
        self.add("ReduceMean", [name, axes], tuple(1 if at == axis else size for at, size in enumerate(shape)))

    def taken(self, name: str, shape: Shape) -> None:
        axis = self.draw(st.integers(0, len(shape) - 1))
        picked = self.constant(np.arange(shape[axis] - 1, -1, -1, dtype=np.int64))
        self.add("Gather", [name, picked], shape, axis=axis)

    def product(self, name: str, shape: Shape) -> None:
        wide = self.draw(st.sampled_from([4, 8, 64]))
        self.add("MatMul", [name, self.weight(shape[-1], wide)], (*shape[:-1], wide))

    def pair(self, name: str, shape: Shape) -> None:
        others = [each for each, other in self.values if other == shape]
        self.add(self.draw(st.sampled_from(["Add", "Mul"])), [name, self.draw(st.sampled_from(others))], shape)

    def scores(self, name: str, shape: Shape) -> None:
        others = [
            (e, o) for e, o in self.values if len(o) == len(shape) and o[:-2] == shape[:-2] and o[-2] == shape[-1]
        ]
        if others:
            other, size = self.draw(st.sampled_from(others))
            self.add("MatMul", [name, other], (*shape[:-1], size[-1]))

    def heads(self, name: str, shape: Shape) -> None:
        split = (shape[0], shape[1], 2, shape[2] // 2)
        self.add("Reshape", [name, self.constant(np.array(split, np.int64))], split)


@st.composite
def models(draw: st.DrawFn) -> onnx.ModelProto:
    """A model of up to 16 nodes; a few of its values are outputs."""
    program = Program(draw)
    for _ in range(draw(st.integers(4, 16))):
        program.step()
    made = program.values[1:] or [program.values[0]]
    chosen = {made[-1][0], *(name for name, _ in draw(st.lists(st.sampled_from(made), max_size=2)))}
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in made if name in chosen]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, program.values[0][1])
    graph = helper.make_graph(program.nodes, "net", [x], ends, program.weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(model=models())
def test_every_plan_computes_the_same(model: onnx.ModelProto):
    """Whatever is chosen, worth it or not: the outputs stay, and so does the order of rows."""
    graph = OnnxGraph.from_proto(model).model
    feeds = {"x": np.random.default_rng(0).standard_normal((2, ROWS, WIDTH)).astype(np.float32)}
    sizes = measured(graph, feeds)
    choice = Chooser(graph.graph, sizes, most=5).run()
    assert choice.plans or choice.reason
    for tiles in choice.plans:
        clone = graph.clone()
        writer = Writer(clone.graph, sizes)
        for each, region in zip(tiles, plan.moved(graph.graph, clone.graph, [t.region for t in tiles]), strict=True):
            writer.tile(region, each.count)
        clone.graph.sort()
        plan.check(graph, clone, sizes)
