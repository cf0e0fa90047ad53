"""What no runtime needs, taken out of a copy of the model."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import passes
from onnx_ir.passes import common


def cleaned(model: ir.Model) -> tuple[ir.Model | None, str]:
    """A model without unused or repeated parts, and what went; None where nothing can go, and why.

    Uses onnx_ir's passes; names and types of inputs and outputs stay.
    """
    clone = model.clone()
    before, signature = _size(clone), _signature(clone)
    passes.Sequential(
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.DeduplicateInitializersPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
    )(clone)
    after = _size(clone)
    if after == before:
        return None, "nothing is unused or repeated"
    if _signature(clone) != signature:
        return None, "cleaning would rename an input or output"
    parts = zip(before, after, ("nodes", "weights"), strict=True)
    return clone, "removed " + ", ".join(f"{old - new} {what}" for old, new, what in parts if old != new)


def _size(model: ir.Model) -> tuple[int, int]:
    return sum(1 for _ in model.graph.all_nodes()), len(model.graph.initializers)


def _signature(model: ir.Model) -> list[tuple[str | None, ir.DataType | None, str]]:
    return [(v.name, v.dtype, str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)]
