"""Moments of an ONNX model's values, by running it with those values as its outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from lrcompile.calibrate import MASK_NAMES, Collector, Moments, groups, token_mask, token_rows
from lrcompile.graphs.base import Inputs
from lrcompile.graphs.onnx.match import Match
from lrcompile.graphs.onnx.session import Session, ahead, runnable, workers
from lrcompile.memory import release
from lrcompile.sites import LinearSite
from lrcompile.windows import patches, positions, sizes

OBSERVED = 16 * 2**20
"""Bytes of values that one run may return; batches are cut to what fits."""


def tensors_of(inputs: Inputs) -> dict[str, Tensor]:
    """Inputs as tensors, by reference where numpy's type has a torch twin."""
    return {name: torch.from_numpy(np.asarray(array)) for name, array in inputs.items() if array.dtype.kind in "fiub"}


def tensor_of(array: np.ndarray) -> Tensor:
    """An array as a tensor; bfloat16 (a graph input, as the user feeds it) becomes float32."""
    return torch.from_numpy(runnable(array))


def observe(
    model: ir.Model,
    batches: Iterable[Inputs],
    sites: Sequence[LinearSite],
    matches: Mapping[str, tuple[Match, ...]],
    *,
    memory: int,
) -> dict[str, Moments]:
    """Moments of what the sites read, in groups whose Gram matrices fit ``memory`` bytes.

    What is read inside a body no session can return; a site that is only used there has no moments.
    """
    outside = {site.name: tuple(m for m in matches[site.name] if m.owner is None) for site in sites}
    readers = {site.input: outside[site.name] for site in sites if outside[site.name]}
    sizes = {site.input: site.shape[1] for site in sites if site.input in readers}
    found: dict[str, Moments] = {}
    for group in groups(sizes, memory):
        collector = Collector(counting=not memory)
        session = session_with(model, [match.source for key in group for match in readers[key]])
        own = {key: readers[key] for key in group}
        cutter = Cutter(model)
        for piece, values in ahead(lambda piece: (piece, session.run(piece)), cutter.pieces(batches)):  # noqa: B023
            cutter.learn(piece, _collect(collector, {**piece, **values}, piece, own))
            release()
        found.update(collector.moments)
    release(now=True)
    return found


def session_with(model: ir.Model, values: Iterable[ir.Value]) -> Session:
    """A session whose outputs are these values of the model; several such are meant to run side by side."""
    names = dict.fromkeys(str(value.name) for value in values)
    graph = model.graph.clone()
    by_name = {value.name: value for value in graph.inputs}
    by_name.update((value.name, value) for node in graph for value in node.outputs)
    chosen = [by_name[name] for name in names if not by_name[name].is_graph_input()]  # inputs are known already
    if chosen:
        graph.outputs.clear()
        graph.outputs.extend(chosen)
    _prune(graph)
    return Session(graph, model, threads=workers().threads)


def _prune(graph: ir.Graph) -> None:
    """Removes what the outputs do not need; inputs stay."""
    for node in reversed(graph):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del graph.initializers[name]


def _collect(collector: Collector, values: Inputs, batch: Inputs, readers: Mapping[str, tuple[Match, ...]]) -> int:
    """Adds the values of a batch; returns their bytes."""
    count = samples_in(batch)
    mask = token_mask(tensors_of(batch))
    for key, matches in readers.items():
        for match in matches:
            rows, seen = site_rows(tensor_of(values[str(match.source.name)]), match, mask)
            collector.add(key, rows, count, seen)
    return sum(array.nbytes for array in values.values())


def samples_in(batch: Inputs) -> int:
    return max((len(array) for array in batch.values() if array.ndim), default=1)


def site_rows(value: Tensor, match: Match, mask: Tensor | None) -> tuple[Tensor, int]:
    """The vectors (tokens, in) that a match multiplies, padding left out, and how many there are in all.

    Of the patches of a window only some are taken.
    """
    window = match.window
    if window is None or window.pointwise:
        value = value if window is None else positions(value, window)
        rows = token_rows(value, mask, channel_axis=match.axis)
        return rows, len(rows)
    return patches(value, window), len(value) * prod(sizes(value, window))


class Cutter:
    """Cuts batches so that what a run returns fits :data:`OBSERVED`, where the model leaves the choice.

    It begins with single samples: small runs side by side are faster than large ones that share the cores.
    """

    def __init__(self, model: ir.Model) -> None:
        shapes = [value.shape for value in model.graph.inputs if value.shape is not None and len(value.shape)]
        self.fixed = any(isinstance(shape[0], int) for shape in shapes)
        self.lengths = any(len(shape) > 1 and isinstance(shape[1], int) for shape in shapes)
        self.size = 1

    def pieces(self, batches: Iterable[Inputs]) -> Iterable[Inputs]:
        """Pieces of at most :attr:`size` samples, which may change on the way."""
        for batch in batches:
            samples = {len(array) for array in batch.values() if array.ndim}
            if self.fixed or len(samples) != 1:
                yield batch
                continue
            start, total = 0, samples.pop()
            while start < total:
                stop = start + self.size
                yield self._trimmed({k: a[start:stop] if a.ndim else a for k, a in batch.items()})
                start = stop

    def _trimmed(self, piece: Inputs) -> Inputs:
        """The piece without trailing columns that are padding in every sample, where lengths are free."""
        mask = next((piece[name] for name in MASK_NAMES if name in piece and piece[name].ndim == 2), None)
        if mask is None or self.lengths or not mask.any():
            return piece
        tokens = token_mask(tensors_of(piece))
        if tokens is None or tokens.shape != mask.shape:  # columns before these are of a cache
            return piece
        length = int(np.flatnonzero(mask.any(axis=0))[-1]) + 1
        return {k: a[:, :length] if a.ndim < 4 and a.shape[:2] == mask.shape else a for k, a in piece.items()}

    def learn(self, piece: Inputs, nbytes: int) -> None:
        """Sets the size of the next pieces by what this one gave."""
        self.size = max(1, OBSERVED * samples_in(piece) // max(nbytes, 1))
