"""The inputs of timed runs: the user's own samples, or made up in the shapes that the user gives."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lrcompile.data import Batches
from lrcompile.errors import UnsupportedError, UsageError
from lrcompile.graphs.base import Graph
from lrcompile.samples import sample_inputs


def shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """``["input_ids=1x128", "sequence=64"]`` as sizes by name.

    Raises:
        UsageError: of another form, or a size below 1.
    """
    found: dict[str, tuple[int, ...]] = {}
    for text in texts:
        match = re.fullmatch(r"(.+?)=(\d+(?:[x×]\d+)*)", text.strip())
        sizes = tuple(map(int, re.split("[x×]", match[2]))) if match else ()
        if match is None or (0 in sizes and len(sizes) == 1):
            raise UsageError(f"'{text}' is no shape", where="--shape", hint="write input_ids=1x128, or batch=16")
        if match[1] in found:
            raise UsageError(f"'{match[1]}' is given twice", where="--shape")
        found[match[1]] = sizes
    return found


def feeds(
    graph: Graph, source: Any = None, given: Mapping[str, Sequence[int]] | None = None, samples: int | None = None
) -> dict[str, np.ndarray]:
    """One batch for timing.

    Args:
        source: samples in any form that calibration takes; the first ones are used.
        given: shapes by input or free dimension, for inputs that are made up.
        samples: of the source; by default 8.

    Raises:
        UsageError: both a source and shapes, or a shape that does not fit.
        UnsupportedError: no inputs can be made up.
        InvalidInputError: samples that do not fit the model.
    """
    if source is None:
        made = sample_inputs(graph, 0, given)
        if made is None:
            hint = "give --calib with real samples, or the --shape of every input"
            raise UnsupportedError("no inputs could be made up for this model", hint=hint)
        return made
    if given:
        raise UsageError("samples have their own shapes", where="--shape", hint="give either --calib or --shape")
    batches = source if isinstance(source, Batches) else Batches(source)
    specs_for = getattr(graph, "specs_for", None)
    batches = batches.check(graph.input_specs if specs_for is None else specs_for(batches.names))
    return first(graph, batches, samples)


def first(graph: Graph, batches: Batches, samples: int | None) -> dict[str, np.ndarray]:
    """The first samples of checked batches; a fixed batch stays whole."""
    fixed = any(isinstance(spec.shape[0], int) for spec in graph.input_specs if spec.shape)
    view = batches.cut(samples or 8)
    if not fixed:
        view.batch = samples or 8
    batch = next(iter(view))
    return {name: array if fixed or not array.ndim else array[: samples or 8] for name, array in batch.items()}


def stored(inputs: Mapping[str, np.ndarray], path: Path) -> Path:
    """The inputs in an ``.npz`` file for a process of its own."""
    np.savez(path, allow_pickle=False, **inputs)
    return path
