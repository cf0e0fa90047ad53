"""The whole rewrite: measure, choose, write, and check at several sizes that the outputs are the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lrcompile.errors import GateError, LrcompileError
from lrcompile.graphs.base import Inputs
from lrcompile.graphs.onnx.session import Session
from lrcompile.graphs.onnx.tiling.choose import WORTH, Choice, Chooser
from lrcompile.graphs.onnx.tiling.emit import Writer
from lrcompile.graphs.onnx.tiling.memory import peak
from lrcompile.graphs.onnx.tiling.sizes import Sizes, free_dimensions, measured, resized

SMALLEST = (1, 3)
"""Sizes of all free dimensions in the last checks: fewer rows than tiles."""
ROUNDING = {"float16": 1e-2, "bfloat16": 5e-2, "float64": 1e-9}
"""Largest relative L2 difference of an output; 1e-4 for float32."""
STALE = ("pkg.torch.onnx.fx_node", "pkg.torch.onnx.stack_trace")
"""Notes of an exporter about how often a value is used."""


@dataclass(frozen=True, eq=False)
class Tiling:
    """What came of it.

    Args:
        model: the rewritten copy; None where nothing was worth it.
        parts: name of the last value of each region, and what became of it.
        before, after: bytes of computed values that are alive at once, in the order in which ONNX Runtime executes.
        reason: why it is not lower.
    """

    model: ir.Model | None
    parts: Sequence[tuple[str, str]]
    before: int
    after: int
    reason: str


def tiled(model: ir.Model, sample: Inputs, *, limit: float = 0.0, most: int = 8) -> Tiling:
    """A copy of the model whose largest values are never whole.

    Args:
        sample: inputs of the sizes that memory is planned for.
        limit: bytes, or a share of what the model takes, that are low enough; 0 for as low as it goes.
        most: tiles of one region.

    Raises:
        UnsupportedError: the model does not run, or nothing can be known about its free dimensions.
        GateError: the outputs of the copy differ.
    """
    sizes = measured(model, sample)
    before = peak(model.graph, sizes)
    clone = model.clone()
    choice = Chooser(clone.graph, sizes, limit=int(limit if limit > 1 else limit * before), most=most).run()
    if not choice.tiles:
        reason = choice.reason or f"{before:,} B alive at once are within the limit"
        return Tiling(None, (), before, before, reason)
    parts = _written(clone, sizes, choice)
    _check(model, clone, sizes)
    after = peak(clone.graph, measured(clone, sample, vary=False))
    if after > WORTH * before:
        return Tiling(None, (), before, before, f"tiles would leave {after:,} of {before:,} B: {choice.reason}")
    return Tiling(clone, parts, before, after, choice.reason)


def _written(model: ir.Model, sizes: Sizes, choice: Choice) -> list[tuple[str, str]]:
    writer, parts = Writer(model.graph, sizes), []
    for each in choice.tiles:
        region = each.region
        kinds = ", ".join(node.op_type for node in region.nodes if node.op_type in _TELLING)
        parts.append((str(region.outputs[-1].name), f"{each.count} tiles of {len(region.nodes)} nodes ({kinds})"))
        writer.tile(region, each.count)
    RemoveUnusedNodesPass()(model)
    model.graph.sort()
    for node in model.graph:
        for key in STALE:
            node.metadata_props.pop(key, None)
    return parts


_TELLING = ("MatMul", "Gemm", "Softmax", "Gelu", "Erf", "Relu", "Conv", "LayerNormalization", "MatMulNBits", "Einsum")


def _check(model: ir.Model, clone: ir.Model, sizes: Sizes) -> None:
    """Runs both models at all sizes that are known to run, and at tiny ones.

    Raises:
        GateError: an output differs by more than rounding.
    """
    old, new = Session(model.graph.clone(), model), Session(clone.graph.clone(), clone)
    for batch in (*sizes.inputs, *_tiny(model, sizes.inputs[0])):
        try:
            wanted = old.run(batch)
        except LrcompileError:
            continue  # the model itself does not run at this size
        found = new.run(batch)
        for name, array in wanted.items():
            _same(name, array, found[name], batch)


def _tiny(model: ir.Model, sample: Inputs) -> Iterator[Inputs]:
    free = free_dimensions(model)
    for size in SMALLEST if free else ():
        yield resized(sample, free, dict.fromkeys(free.values(), size))


def _same(name: str, wanted: np.ndarray, found: np.ndarray, batch: Inputs) -> None:
    at = ", ".join(f"{each} of {array.shape}" for each, array in batch.items())
    if wanted.shape != found.shape:
        raise GateError(f"{name} has the shape {found.shape} instead of {wanted.shape} for {at}")
    if wanted.dtype.kind != "f" and wanted.dtype.name != "bfloat16":
        if not np.array_equal(wanted, found):
            raise GateError(f"{name} differs for {at}")
        return
    one, two = wanted.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(one)
    if not np.array_equal(finite, np.isfinite(two)):
        raise GateError(f"{name} is not finite at other places for {at}")
    distance = float(np.linalg.norm(one[finite] - two[finite]))
    scale = float(np.linalg.norm(one[finite]))
    if distance > ROUNDING.get(wanted.dtype.name, 1e-4) * max(scale, 1e-6):
        raise GateError(f"{name} differs by {distance / max(scale, 1e-30):.3g} (relative L2) for {at}")
