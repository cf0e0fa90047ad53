"""Inputs made up from a graph's own declarations, for checks that need some input and have none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from lrcompile.calibrate import MASK_NAMES, token_mask
from lrcompile.data import InputSpec
from lrcompile.errors import LrcompileError, UsageError, nearest
from lrcompile.graphs.base import Graph, Inputs

_FREE = 4  # size of a free dimension; the first one counts samples


def sample_inputs(
    graph: Graph, seed: int = 0, given: Mapping[str, Sequence[int]] | None = None
) -> dict[str, np.ndarray] | None:
    """One batch that the graph runs on, or None where its declarations do not say enough.

    Floats are normal, integers are 0 or 1 (small enough for any table), masks are all ones.

    Args:
        given: shapes by the name of an input, sizes by the name of a free dimension.

    Raises:
        UsageError: a name that the graph does not know, or a shape that does not fit.
    """
    generator = np.random.default_rng(seed)
    sizes, shapes = _given(graph, given or {})
    made = {}
    for spec in graph.input_specs:
        if spec.dtype is None or np.dtype(spec.dtype).kind in "OSU":
            return None
        made[spec.name] = _array(replace(spec, shape=shapes.get(spec.name, spec.shape)), sizes, generator)
    try:
        graph.run(made)
    except LrcompileError:
        return None
    return made


def _given(
    graph: Graph, given: Mapping[str, Sequence[int]]
) -> tuple[dict[str, int], dict[str, tuple[int | str | None, ...]]]:
    """Sizes of free dimensions, and shapes of inputs; an input's shape also tells its dimensions' sizes."""
    specs = {spec.name: spec for spec in graph.input_specs}
    free = {size for spec in specs.values() for size in spec.shape if isinstance(size, str) and size}
    sizes: dict[str, int] = {}
    shapes: dict[str, tuple[int | str | None, ...]] = {}
    for name, shape in given.items():
        if name in specs:
            declared = specs[name].shape
            fits = len(declared) in (0, len(shape)) and all(
                not isinstance(size, int) or size == wanted for size, wanted in zip(declared, shape, strict=False)
            )
            if not fits:
                raise UsageError(f"the shape {tuple(shape)} does not fit the declared {declared}", where=name)
            shapes[name] = tuple(shape)
            sizes.update((size, wanted) for size, wanted in zip(declared, shape, strict=False) if isinstance(size, str))
        elif name in free and len(shape) == 1:
            sizes[name] = shape[0]
        else:
            raise UsageError(f"'{name}' is no input or free dimension", hint=nearest(name, {*specs, *free}))
    return sizes, shapes


def _array(spec: InputSpec, sizes: dict[str, int], generator: np.random.Generator) -> np.ndarray:
    shape = [_size(dimension, axis, sizes) for axis, dimension in enumerate(spec.shape)]
    dtype = np.dtype(np.float32 if spec.dtype is None else spec.dtype)
    if dtype.kind in "iub":
        values = np.ones(shape) if spec.name in MASK_NAMES else generator.integers(0, 2, shape)
        return np.asarray(values).astype(dtype)
    return generator.standard_normal(shape).astype(dtype)


def _size(dimension: int | str | None, axis: int, sizes: dict[str, int]) -> int:
    """The size of a dimension; sums, such as ``past + sequence``, follow from their parts."""
    if isinstance(dimension, int):
        return dimension
    if dimension and dimension not in sizes and "+" in dimension:
        return sum(
            int(part) if part.isdigit() else _size(part, axis, sizes) for part in map(str.strip, dimension.split("+"))
        )
    default = 2 if axis == 0 else _FREE
    return sizes.setdefault(dimension, default) if dimension else default


def first_sample(inputs: Inputs, graph: Graph) -> dict[str, np.ndarray]:
    """The first sample of a batch, its leading axis kept; an axis of declared size stays as it is."""
    fixed = {spec.name for spec in graph.input_specs if spec.shape and isinstance(spec.shape[0], int)}
    return {name: array if name in fixed or not array.ndim else array[:1] for name, array in inputs.items()}


def unmasked(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same inputs with every token mask set to ones: padding is computed like any token."""
    return {name: np.ones_like(array) if name in MASK_NAMES else array for name, array in inputs.items()}


class Thinned:
    """Batches spread evenly over the data, with about ``limit`` tokens together; all of them where they are fewer.

    Tokens are counted by the token mask where there is one, else by the first two axes of integer inputs (ids)
    and by the first axis of everything else.
    """

    def __init__(self, data: Iterable[Inputs], limit: int) -> None:
        self.data = data
        counts = [_tokens(batch) for batch in data]
        share = min(1.0, limit / max(sum(counts), 1))
        self.taken = [int((index + 1) * share) > int(index * share) for index in range(len(counts))]

    @property
    def batches(self) -> int:
        """Number of batches that an iteration yields."""
        return sum(self.taken)

    def __iter__(self) -> Iterator[Inputs]:
        for batch, taken in zip(self.data, self.taken, strict=True):
            if taken:
                yield batch


def _tokens(batch: Inputs) -> int:
    mask = token_mask({k: torch.from_numpy(np.asarray(a)) for k, a in batch.items() if a.dtype.kind in "fiub"})
    if mask is not None:
        return int(mask.sum())
    sizes = (array.shape[0] * (array.shape[1] if array.ndim == 2 and array.dtype.kind in "iu" else 1)
             for array in batch.values() if array.ndim)  # fmt: skip
    return max(sizes, default=1)
