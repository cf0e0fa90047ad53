"""Linear maps inside regions of their own (autocast, no gradients, branches): listed, and left alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx

from lrcompile.graphs.fx.constants import Constants
from lrcompile.graphs.fx.match import call_of
from lrcompile.linop import Dense, LinearOperator


def nested(constants: Constants) -> Iterator[tuple[fx.Node, fx.Node, LinearOperator, str]]:
    """The node in the region, the constant node outside of it, the matrix, and why it stays."""
    module = constants.module
    for node in module.graph.nodes:
        bodies = [each for each in node.all_input_nodes if each.op == "get_attr" and _body(module, each) is not None]
        if node.op != "call_function" or not bodies:
            continue
        operands = _operands(node, bodies)
        for body in bodies:
            for call_node, outer, weight in _calls(_body(module, body), operands, constants):
                reason = (
                    f"inside a region of its own ({node.target}); program.run_decompositions({{}}) takes most apart"
                )
                yield call_node, outer, Dense(weight), reason


def _body(module: fx.GraphModule, node: fx.Node) -> Any:
    found: Any = module
    for name in str(node.target).split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, fx.GraphModule) else None


def _operands(node: fx.Node, bodies: list[fx.Node]) -> list[Any]:
    """What the placeholders of the bodies stand for: all that follows the last body."""
    flat: list[Any] = []
    for argument in node.args:
        flat += argument if isinstance(argument, tuple | list) else [argument]
    last = max(index for index, each in enumerate(flat) if each in bodies)
    return flat[last + 1 :]


def _calls(
    body: fx.GraphModule, operands: list[Any], constants: Constants
) -> Iterator[tuple[fx.Node, fx.Node, Tensor]]:
    inputs = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=False))
    for node in body.graph.nodes:
        call = call_of(node)
        outer = inputs.get(call.weight) if call is not None else None
        weight = constants.tensor(outer)
        if call is None or weight is None or not weight.is_floating_point() or weight.ndim < 2:
            continue
        assert isinstance(outer, fx.Node)
        yield node, outer, weight.detach().flatten(1) if call.kind in ("Linear", "Conv") else weight.detach().mT
