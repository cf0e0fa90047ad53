"""What is known about the sizes of a model's values: measured in runs, not assumed.

A model is run at the sizes that memory is planned for and, where dimensions are free, at two more with other sizes
for each of them. Two dimensions count as equal where all runs say so. What depends on the data, like the number of
non-zeros, is found by following the data, and nothing is said about it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from lrcompile.calibrate import MASK_NAMES
from lrcompile.errors import LrcompileError, UnsupportedError
from lrcompile.graphs.base import Inputs
from lrcompile.graphs.onnx.constants import constant
from lrcompile.graphs.onnx.hygiene import RANDOM
from lrcompile.graphs.onnx.session import Session

Size = tuple[int, ...]
"""A dimension: its size in every run."""

PRIMES = ((2, 5, 7, 11, 13), (3, 11, 13, 17, 19))
"""Sizes of free dimensions in the further runs; the first one counts samples."""
SHAPED_BY = {
    "Reshape": (1,), "Expand": (1,), "ConstantOfShape": (0,), "Tile": (1,), "Slice": (1, 2, 3, 4), "Pad": (1, 3),
    "Resize": (1, 2, 3), "Range": (0, 1, 2), "TopK": (1,), "OneHot": (1,), "Unsqueeze": (1,), "Squeeze": (1,),
    "Split": (1,), "CenterCropPad": (1,), "Upsample": (1,), "AffineGrid": (1,), "MaxUnpool": (2,),
}  # fmt: skip
"""Inputs whose values decide the shape of the output; the axes of reductions are taken with them."""
WHOLE = 2**29
"""Models of fewer bytes are counted as they are; the weights of larger ones are handed over, which fuses less."""
BY_DATA = frozenset(["NonZero", "Unique", "Compress", "NonMaxSuppression", "Loop", "If", "Scan", "StringSplit"])


@dataclass(eq=False)
class Sizes:
    """Shapes of values in every run; the first run is the one that memory is planned for.

    Args:
        shapes: name of a value → its shape in each run. What depends on the data is missing.
        inputs: what was fed in each run.
        fixed: values that are computed from constants alone; runtimes compute them once, when they load the model.
    """

    shapes: Mapping[str, tuple[tuple[int, ...], ...]]
    inputs: Sequence[Inputs]
    itemsize: Mapping[str, int] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()
    _bytes: dict[str, int] = field(default_factory=dict)

    def of(self, value: ir.Value | None) -> tuple[Size, ...] | None:
        """Every dimension of a value, None where nothing is known."""
        if value is None:
            return None
        tensor = constant(value)
        if tensor is not None:
            runs = len(self.inputs)
            return tuple((int(size),) * runs for size in tensor.shape.numpy())
        found = self.shapes.get(str(value.name))
        if found is None or len({len(shape) for shape in found}) != 1:
            return None
        return tuple(zip(*found, strict=True)) if found[0] else ()

    def constant(self, value: ir.Value) -> bool:
        """Whether a value is the same in every run."""
        return str(value.name) in self.fixed or constant(value) is not None

    def rank(self, value: ir.Value | None) -> int | None:
        """Number of dimensions."""
        found = self.of(value)
        return None if found is None else len(found)

    def nbytes(self, value: ir.Value) -> int:
        """Bytes of a computed value in the first run; 0 where nothing is known, or it is fixed."""
        name = str(value.name)
        if name not in self._bytes:
            found = None if name in self.fixed else self.shapes.get(name)
            self._bytes[name] = 0 if found is None else prod(found[0]) * self.itemsize.get(name, 4)
        return self._bytes[name]


def static(size: Size) -> bool:
    """Whether a dimension has one size in all runs."""
    return len(set(size)) == 1


def one(size: Size) -> bool:
    """Whether a dimension is 1 in all runs."""
    return set(size) == {1}


def measured(model: ir.Model, sample: Inputs, *, vary: bool = True) -> Sizes:
    """Runs the model at the sizes of ``sample``, and with ``vary`` at others where dimensions are free.

    Raises:
        UnsupportedError: it does not run, or not at other sizes.
    """
    runs: list[Inputs] = [sample]
    free = free_dimensions(model)
    if free and vary:
        runs += _varied(model, sample, free)
    traces = [_trace(model, inputs) for inputs in runs]
    loose = _loose(model.graph)
    names = set(traces[0][0]).intersection(*(shapes for shapes, _ in traces)) - loose
    fed = {name: tuple(tuple(run[name].shape) for run in runs) for name in sample}
    shapes = {name: tuple(shapes[name] for shapes, _ in traces) for name in names}
    sizes = {name: array.dtype.itemsize for name, array in sample.items()}
    return Sizes({**shapes, **fed}, runs, {**traces[0][1], **sizes}, _fixed(model.graph))


def free_dimensions(model: ir.Model) -> dict[tuple[str, int], str]:
    """(Input, axis) → name of the free dimension; one without a name has its own."""
    found = {}
    for value in model.graph.inputs:
        if value.name in model.graph.initializers:
            continue
        for axis, size in enumerate(value.shape or ()):
            if not isinstance(size, int):
                found[str(value.name), axis] = size.value or f"{value.name}.{axis}"
    return found


def _varied(model: ir.Model, sample: Inputs, free: Mapping[tuple[str, int], str]) -> list[Inputs]:
    """Two batches with other sizes of all free dimensions; sizes of small primes, else near those of the sample."""
    session = Session(model.graph.clone(), model)
    for sizes in _proposed(sample, free):
        batches = [resized(sample, free, each) for each in sizes]
        try:
            for batch in batches:
                session.run(batch)
        except LrcompileError:
            continue
        return batches
    raise UnsupportedError(
        "the model runs at the sizes of the sample only, so nothing is known about its free dimensions",
        hint="fix them: give static shapes, for instance by exporting without dynamic axes",
    )


def _proposed(sample: Inputs, free: Mapping[tuple[str, int], str]) -> Iterator[list[dict[str, int]]]:
    names = list(dict.fromkeys(free.values()))
    now = {name: sample[key[0]].shape[key[1]] for key, name in reversed(list(free.items()))}
    yield [dict(zip(names, (*primes, *range(23, 23 + len(names))), strict=False)) for primes in PRIMES]
    yield [{name: now[name] + step + at for at, name in enumerate(names)} for step in (1, 3)]
    yield [{name: size * times for name, size in now.items()} for times in (2, 3)]
    first = names[0]
    yield [{**now, first: now[first] + step} for step in (1, 2)] if len(names) == 1 else []


def resized(sample: Inputs, free: Mapping[tuple[str, int], str], sizes: Mapping[str, int]) -> Inputs:
    """The sample repeated or cut to other sizes; every second position of a mask is hidden."""
    batch = {}
    for name, array in sample.items():
        shape = [sizes.get(free.get((name, axis), ""), size) for axis, size in enumerate(array.shape)]
        batch[name] = np.resize(array, shape)
        if name in MASK_NAMES and batch[name].ndim:
            batch[name][..., 1::2] = 0
    return batch


def _trace(model: ir.Model, inputs: Inputs) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Shape and size of an element of every value of the main graph, from a profile of an unoptimised run."""
    graph = model.graph.clone()
    outputs = {}
    for at, node in enumerate(graph):
        node.name = f"{at}:"
        outputs[node.name] = [str(value.name) for value in node.outputs if value.name]
    shapes: dict[str, tuple[int, ...]] = {}
    items: dict[str, int] = {}
    for event in _profiled(graph, model, inputs, plain=True):
        name = event["name"].removesuffix("_kernel_time")
        given = event.get("args", {}).get("output_type_shape")
        if name in outputs and given is not None and len(given) == len(outputs[name]):
            for value, typed in zip(outputs[name], given, strict=True):
                ((kind, shape),) = typed.items()
                shapes[value] = tuple(shape)
                items[value] = _ITEMS.get(kind, 4)
    return shapes, items


_ITEMS = {"float": 4, "double": 8, "float16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
          "uint16": 2, "uint32": 4, "uint64": 8, "bfloat16": 2}  # fmt: skip


def _profiled(graph: ir.Graph, like: ir.Model, inputs: Inputs, *, plain: bool) -> list[dict[str, Any]]:
    """What ONNX Runtime writes down about every node of one run."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "run")
        small = not plain and sum(tensor.nbytes for tensor in _stored(graph)) < WHOLE
        session = Session(graph, like, threads=1, profile=path, plain=plain, arena=not plain, whole=small)
        session.run(inputs)
        events = json.loads(Path(session.session.end_profiling()).read_text(encoding="utf-8"))
    return [event for event in events if event.get("cat") == "Node"]


def _stored(graph: ir.Graph) -> list[ir.TensorProtocol]:
    tensors = (value.const_value for value in graph.initializers.values())
    return [tensor for tensor in tensors if tensor is not None]


def arena(model: ir.Model, inputs: Inputs) -> int:
    """Most bytes requested from ONNX Runtime's arena and not given back, at once, in a run of the optimised model.

    Raises:
        UnsupportedError: it does not run, or this version has no statistics.
    """
    steps = [event["args"] for event in _profiled(model.graph.clone(), model, inputs, plain=False)]
    if not steps:
        return 0
    if _IN_USE not in steps[0]:
        raise UnsupportedError("this version of ONNX Runtime counts no memory", hint="upgrade onnxruntime")
    before = int(steps[0][_IN_USE]) - int(steps[0][_CHANGE])
    return max(int(step[_IN_USE]) for step in steps) - before


_IN_USE, _CHANGE = "mem_bytes_requested_in_use", "mem_requested_in_use_delta"


def _fixed(graph: ir.Graph) -> frozenset[str]:
    """Names of the values that are computed from constants alone."""
    fixed: set[str] = set()
    for node in graph:
        given = [value for value in node.inputs if value is not None]
        plain = not node.domain and node.op_type not in RANDOM and node.op_type not in BY_DATA
        if plain and given and all(str(value.name) in fixed or constant(value) is not None for value in given):
            fixed.update(str(value.name) for value in node.outputs)
    return frozenset(fixed)


def _loose(graph: ir.Graph) -> set[str]:
    """Names of the values whose shapes depend on data."""
    loose: set[str] = set()
    content = {str(value.name) for value in graph.inputs}
    for node in graph:
        names = [str(value.name) if value is not None else "" for value in node.inputs]
        outputs = [str(value.name) for value in node.outputs]
        steering = SHAPED_BY.get(node.op_type, ()) if not node.domain else ()
        if node.op_type.startswith("Reduce"):
            steering = (1,)
        if (
            node.op_type in BY_DATA
            or "Sequence" in node.op_type
            or any(name in loose for name in names)
            or any(names[at] in content for at in steering if at < len(names))
        ):
            loose.update(outputs)
        if node.op_type not in ("Shape", "Size") and any(name in content for name in names if name):
            content.update(outputs)
        kinds = {attribute.type for attribute in node.attributes.values()}
        if kinds & {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}:
            content.update(outputs)
    return loose
