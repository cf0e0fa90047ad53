"""Sizes that a model leaves open, and a sample at other sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lrcompile.graphs.base import Inputs


@dataclass(frozen=True)
class Sized:
    """The axes of a model's inputs.

    Attributes:
        axes: by input, in order: the name of each open size (which may be a sum of others), None for a fixed one.
    """

    axes: Mapping[str, tuple[str | None, ...]]

    @property
    def names(self) -> frozenset[str]:
        """All open sizes."""
        return frozenset().union(*(self.parts(key) for keys in self.axes.values() for key in keys if key))

    @property
    def batch(self) -> frozenset[str]:
        """Those of the first axes."""
        return frozenset().union(*(self.parts(keys[0]) for keys in self.axes.values() if keys and keys[0]))

    def parts(self, key: str) -> frozenset[str]:
        """The sizes that one is the sum of."""
        return frozenset(part.strip() for part in key.split("+") if not part.strip().isdigit())

    def under(self, key: str, free: frozenset[str]) -> bool:
        """Whether all that a size depends on may be free."""
        return self.parts(key) <= free


def symbols(graph: ir.Graph, sample: Inputs) -> tuple[Sized, dict[str, int]]:
    """The open sizes of a graph, and what they are in a sample."""
    axes: dict[str, tuple[str | None, ...]] = {}
    sizes: dict[str, int] = {}
    for value in graph.inputs:
        if value.name in graph.initializers:
            continue
        name = str(value.name)
        dims = list(value.shape) if value.shape is not None else [None] * sample[name].ndim
        keys = [_key(name, axis, dim) for axis, dim in enumerate(dims)]
        axes[name] = tuple(keys)
        sizes.update((key, size) for key, size in zip(keys, sample[name].shape, strict=True) if key and "+" not in key)
    sized = Sized(axes)
    return sized, {**dict.fromkeys(sized.names, 0), **sizes}


def _key(name: str, axis: int, dim: object) -> str | None:
    if isinstance(dim, int):
        return None
    text = getattr(dim, "value", None)
    return str(text) if text else f"{name}.{axis}"


def trial(sizes: Mapping[str, int], free: frozenset[str]) -> dict[str, int]:
    """Sizes for a trace: free ones are at least 2 and all different, which torch would take for one otherwise."""
    chosen = {key: size for key, size in sizes.items() if key not in free}
    for key in sorted(free):
        size = max(sizes[key], 2)
        while size in chosen.values():
            size += 1
        chosen[key] = size
    return chosen


def resized(sample: Inputs, sized: Sized, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The sample with its rows repeated or left out."""
    found: dict[str, np.ndarray] = {}
    for name, keys in sized.axes.items():
        array = np.asarray(sample[name])
        for axis, key in enumerate(keys):
            size = array.shape[axis] if key is None else _size(key, sizes)
            if size != array.shape[axis]:
                array = np.take(array, np.arange(size) % max(array.shape[axis], 1), axis=axis)
        found[name] = array
    return found


def _size(key: str, sizes: Mapping[str, int]) -> int:
    return sum(int(part) if part.strip().isdigit() else sizes[part.strip()] for part in key.split("+"))
