"""The whole rewrite: measure, choose, write, and check at several sizes that the outputs are the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lrcompile.errors import GateError, LrcompileError, UnsupportedError
from lrcompile.graphs.base import Inputs
from lrcompile.graphs.onnx.session import Session
from lrcompile.graphs.onnx.tiling.choose import SLACK, WORTH, Chooser, Tiled
from lrcompile.graphs.onnx.tiling.emit import Writer
from lrcompile.graphs.onnx.tiling.grow import Region
from lrcompile.graphs.onnx.tiling.memory import peak
from lrcompile.graphs.onnx.tiling.order import reordered
from lrcompile.graphs.onnx.tiling.sizes import Sizes, arena, free_dimensions, measured, resized

OPSET = 10
"""Since then slices can begin and end at computed positions."""
SMALLEST = (1, 3)
"""Sizes of all free dimensions in the last checks: fewer rows than tiles."""
ROUNDING = {"float16": 1e-2, "bfloat16": 5e-2, "float64": 1e-9}
"""Largest relative L2 difference of an output; 1e-4 for float32."""
MOST_TOLD = 8
STALE = ("pkg.torch.onnx.fx_node", "pkg.torch.onnx.stack_trace")
"""Notes of an exporter about how often a value is used."""


@dataclass(frozen=True, eq=False)
class Tiling:
    """What came of it.

    Args:
        model: the rewritten copy; None where nothing was worth it.
        parts: name of the last value of each region, and what became of it.
        before, after: most bytes that ONNX Runtime requested from its arena at once, by its own count.
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
        UnsupportedError: the model does not run, is too old, or nothing can be known about its free dimensions.
        GateError: the outputs of the copy differ.
    """
    if model.opset_imports.get("", 0) < OPSET:
        raise UnsupportedError(
            f"tiles need opset {OPSET}, the model has {model.opset_imports.get('', 0)}",
            hint="convert the model to a later opset",
        )
    sizes, before = measured(model, sample), arena(model, sample)
    share = limit if limit <= 1 else limit / max(before, 1)
    if share >= 1:
        return Tiling(None, (), before, before, f"{before:,} bytes at once are within the limit")
    base, parts = _ordered(model, sizes, sample, before)
    choice = Chooser(base.graph, sizes, limit=int(share * peak(model.graph, sizes)), most=most).run()
    tried = [_Tried(base, sizes, plan, sample) for plan in _distinct(choice.plans)]
    if parts:
        tried.insert(0, _Tried(base, sizes, (), sample))
    if not tried:
        return Tiling(None, (), before, before, choice.reason)
    least = max(min(each.peak for each in tried), share * before)
    best = next(each for each in tried if each.peak <= SLACK * least)
    if best.peak > WORTH * before:
        told = f"tiles would leave {best.peak:,} of {before:,} bytes, since ONNX Runtime keeps memory for later values"
        return Tiling(None, (), before, before, f"{told}; {choice.reason}")
    check(model, best.model, sizes)
    return Tiling(best.model, [*parts, *best.parts], before, best.peak, choice.reason)


def _ordered(model: ir.Model, sizes: Sizes, sample: Inputs, before: int) -> tuple[ir.Model, list[tuple[str, str]]]:
    """The model with its nodes in a better order where ONNX Runtime confirms it, and what to say of it."""
    found = reordered(model, sizes)
    if found is None or found[1] > WORTH or arena(found[0], sample) > WORTH * before:
        return model, []
    return found[0], [("graph", "nodes in an order that keeps less alive")]


class _Tried:
    """A plan, written into a copy of the model, with what ONNX Runtime needs for it."""

    def __init__(self, model: ir.Model, sizes: Sizes, tiles: Sequence[Tiled], sample: Inputs) -> None:
        self.model, self.parts = model.clone(), list(map(_told, tiles))
        regions = moved(model.graph, self.model.graph, [each.region for each in tiles])
        writer = Writer(self.model.graph, sizes)
        for region, each in zip(regions, tiles, strict=True):
            writer.tile(region, each.count)
        RemoveUnusedNodesPass()(self.model)
        self.model.graph.sort()
        for node in self.model.graph:
            for key in STALE:
                node.metadata_props.pop(key, None)
        self.peak = arena(self.model, sample)


def moved(graph: ir.Graph, clone: ir.Graph, regions: Sequence[Region]) -> Iterator[Region]:
    """The same regions in a copy of the graph."""
    nodes = dict(zip(graph, clone, strict=True))
    values = dict(zip(graph.inputs, clone.inputs, strict=True))
    values |= {value: clone.initializers[name] for name, value in graph.initializers.items()}
    for node, copy in nodes.items():
        values |= zip(node.outputs, copy.outputs, strict=True)
    for region in regions:
        ends = {name: tuple(values[value] for value in getattr(region, name)) for name in ("cut", "whole", "outputs")}
        axes = {values[value]: axis for value, axis in region.axes.items()}
        yield replace(region, nodes=tuple(nodes[node] for node in region.nodes), axes=axes, **ends)


def _distinct(plans: Sequence[Sequence[Tiled]]) -> list[Sequence[Tiled]]:
    """Plans that differ, the one with the fewest nodes first."""
    found = {tuple((each.region.nodes, each.count) for each in plan): plan for plan in plans if plan}
    return sorted(found.values(), key=lambda plan: sum(each.work for each in plan))


def _told(each: Tiled) -> tuple[str, str]:
    kinds = [node.op_type for node in each.region.nodes if node.op_type in _TELLING]
    text = ", ".join(kinds[:MOST_TOLD]) + (", …" if len(kinds) > MOST_TOLD else "")
    return str(each.region.outputs[-1].name), f"{each.count} tiles of {len(each.region.nodes)} nodes ({text})"


_TELLING = ("MatMul", "Gemm", "Softmax", "Gelu", "Erf", "Relu", "Conv", "LayerNormalization", "MatMulNBits", "Einsum")


def check(model: ir.Model, clone: ir.Model, sizes: Sizes) -> None:
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
        try:
            found = new.run(batch)
        except LrcompileError as error:
            at = ", ".join(f"{name} of {array.shape}" for name, array in batch.items())
            raise GateError(f"ONNX Runtime fails on the tiles for {at}: {error.message}") from error
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
