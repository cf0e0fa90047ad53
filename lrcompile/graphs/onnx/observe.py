"""Statistics of an ONNX model by running it: moments of values, and probes of single sites.

A probe replaces one site and runs only what lies downstream of it: everything else is computed
once per batch and fed to the rest. It needs no gradients, so every graph that runs has probes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from lrcompile.calibrate import MASK_NAMES, Collector, Moments, groups, token_mask, token_rows
from lrcompile.graphs.base import Inputs, Outputs, Replacement
from lrcompile.graphs.onnx.constants import constant
from lrcompile.graphs.onnx.raising import Match
from lrcompile.graphs.onnx.session import Session, runnable
from lrcompile.graphs.onnx.splice import Splicer, Tape, add_bias
from lrcompile.graphs.onnx.tensors import from_torch
from lrcompile.linop import LinearOperator, apply, densify
from lrcompile.sites import LinearSite

OBSERVED = 16 * 2**20
"""Bytes of values that one run may return; batches are cut to what fits."""
PROBED = 4
"""Samples that a probe runs on at a time."""
TOGETHER = 6
"""Sites that are probed between two runs of what lies before them."""

Pairs = Mapping[str, tuple[LinearSite, tuple[Match, ...]]]


def tensors_of(inputs: Inputs) -> dict[str, Tensor]:
    """Inputs as tensors, by reference where numpy's type has a torch twin."""
    return {name: torch.from_numpy(np.asarray(array)) for name, array in inputs.items() if array.dtype.kind in "fiub"}


def _tensor(array: np.ndarray) -> Tensor:
    """An array as a tensor; bfloat16 (a graph input, as the user feeds it) becomes float32."""
    return torch.from_numpy(runnable(array))


def release() -> None:
    """Hands freed memory back to the system; the C library would keep what is below its threshold."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def observe(
    model: ir.Model,
    batches: Iterable[Inputs],
    sites: Sequence[LinearSite],
    matches: Mapping[str, tuple[Match, ...]],
    *,
    memory: int,
) -> dict[str, Moments]:
    """Moments of what the sites read, in groups whose Gram matrices fit ``memory`` bytes."""
    sizes = {site.input: site.shape[1] for site in sites}
    readers = {site.input: matches[site.name] for site in sites}
    found: dict[str, Moments] = {}
    for group in groups(sizes, memory):
        collector = Collector()
        session = _session_with(model, [match.source for key in group for match in readers[key]])
        own = {key: readers[key] for key in group}
        cutter = _Cutter(model)
        for piece in cutter.pieces(batches):
            cutter.learn(piece, _collect(collector, session, piece, own))
        found.update(collector.moments)
        release()
    return found


def _session_with(model: ir.Model, values: Iterable[ir.Value]) -> Session:
    """A session whose outputs are these values of the model."""
    names = dict.fromkeys(str(value.name) for value in values)
    graph = model.graph.clone()
    by_name = {value.name: value for value in graph.inputs}
    by_name.update((value.name, value) for node in graph for value in node.outputs)
    chosen = [by_name[name] for name in names if not by_name[name].is_graph_input()]  # inputs are known already
    if chosen:
        graph.outputs.clear()
        graph.outputs.extend(chosen)
    _prune(graph)
    return Session(graph, model)


def _prune(graph: ir.Graph) -> None:
    """Removes what the outputs do not need; inputs stay."""
    for node in reversed(graph):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del graph.initializers[name]


def _collect(collector: Collector, session: Session, batch: Inputs, readers: Mapping[str, tuple[Match, ...]]) -> int:
    """Adds a batch; returns the bytes of what was observed."""
    values = {**batch, **session.run(batch)}
    samples = _samples(batch)
    mask = token_mask(tensors_of(batch))
    for key, matches in readers.items():
        for match in matches:
            rows = site_rows(_tensor(values[str(match.source.name)]), match, mask)
            collector.add(key, rows, samples)
    return sum(array.nbytes for array in values.values())


def _samples(batch: Inputs) -> int:
    return max((len(array) for array in batch.values() if array.ndim), default=1)


def site_rows(value: Tensor, match: Match, mask: Tensor | None) -> Tensor:
    """The vectors (tokens, in) that a match multiplies; padding left out."""
    if match.window is not None:
        index = (slice(None), slice(None), *(slice(None, None, step) for step in match.window.strides))
        value = value[index]
    return token_rows(value, mask, channel_axis=match.axis)


# -- probes --------------------------------------------------------------------------------


@dataclass(eq=False)
class _Suffix:
    """What lies downstream of a site, as a session that is fed the site's roots."""

    boundary: list[str]
    outputs: list[str]
    nodes: set[int]
    session: Session | None = None


def probe(
    model: ir.Model, batches: Iterable[Inputs], pairs: Pairs, changes: Mapping[str, Replacement]
) -> dict[str, float]:
    """Squared relative L2 change of the float outputs (summed) when a site alone is replaced.

    Padding is left out of outputs whose leading axes are those of the token mask. Sites are probed a few
    at a time, in the order of execution: only what surrounds those few is held.
    """
    cutter = _Cutter(model)
    whole = _session_with(model, model.graph.outputs)
    pieces: list[tuple[Inputs, Outputs]] = []
    for piece in cutter.pieces(batches):
        pieces.append((piece, whole.run(piece)))
        cutter.size = PROBED
    owners = _owners(model.graph)
    change: dict[str, float] = {}
    names = list(pairs)
    for start in range(0, len(names), TOGETHER):
        group = {name: pairs[name] for name in names[start : start + TOGETHER]}
        change.update(_probe_group(model, pieces, group, changes, owners))
        release()
    return change


def _probe_group(
    model: ir.Model,
    pieces: Sequence[tuple[Inputs, Outputs]],
    pairs: Pairs,
    changes: Mapping[str, Replacement],
    owners: Mapping[int, ir.Node],
) -> dict[str, float]:
    suffixes = {name: _suffix(model.graph, matches, owners) for name, (_, matches) in pairs.items()}
    wanted: dict[str, None] = {}
    for name, suffix in suffixes.items():
        wanted.update(dict.fromkeys(suffix.boundary))
        for match in pairs[name][1]:
            wanted.update({str(match.source.name): None, str(match.root.name): None})
    prefix = _session_with(model, [value for value in _values(model.graph) if value.name in wanted])
    moved = {name: dict.fromkeys(suffixes[name].outputs, 0.0) for name in pairs}
    norm: dict[str, float] = {}
    for piece, outputs in pieces:
        around = {**piece, **prefix.run(piece)}
        mask = token_mask(tensors_of(piece))
        floats = {name: array for name, array in outputs.items() if array.dtype.kind == "f"}
        for name, array in floats.items():
            norm[name] = norm.get(name, 0.0) + _energy(array, mask)
        for site, suffix in suffixes.items():
            changed = _changed_outputs(model, suffix, pairs[site], changes[site], around, piece)
            for name in floats.keys() & changed.keys():
                moved[site][name] += _energy(changed[name] - floats[name], mask)
    return {
        site: sum(value / norm[name] for name, value in parts.items() if norm.get(name, 0.0) > 0)
        for site, parts in moved.items()
    }


class _Cutter:
    """Cuts batches so that what a run returns fits :data:`OBSERVED`, where the model leaves the choice."""

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
                yield self._trimmed({name: array[start:stop] for name, array in batch.items()})
                start = stop

    def _trimmed(self, piece: Inputs) -> Inputs:
        """The piece without trailing columns that are padding in every sample, where lengths are free."""
        mask = next((piece[name] for name in MASK_NAMES if name in piece and piece[name].ndim == 2), None)
        if mask is None or self.lengths or not mask.any():
            return piece
        length = int(np.flatnonzero(mask.any(axis=0))[-1]) + 1
        return {k: a[:, :length] if a.shape[:2] == mask.shape else a for k, a in piece.items()}

    def learn(self, piece: Inputs, nbytes: int) -> None:
        """Sets the size of the next pieces by what this one gave."""
        self.size = max(1, OBSERVED * _samples(piece) // max(nbytes, 1))


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _energy(array: np.ndarray, mask: Tensor | None) -> float:
    tensor = _tensor(array).double()
    if mask is not None and tensor.shape[: mask.ndim] == mask.shape:
        tensor = tensor[mask]
    elif mask is not None and tensor.ndim == 2 and len(tensor) == mask.numel():  # tokens of all samples in a row
        tensor = tensor[mask.flatten()]
    return float(tensor.square().sum())


def _owners(graph: ir.Graph) -> dict[int, ir.Node]:
    """For every node inside a body: the node of ``graph`` that holds the body."""
    owners: dict[int, ir.Node] = {}
    for node in graph:
        for body in _bodies(node):
            owners.update((id(inner), node) for inner in body.all_nodes())
    return owners


def _bodies(node: ir.Node) -> Iterable[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _suffix(graph: ir.Graph, matches: tuple[Match, ...], owners: Mapping[int, ir.Node]) -> _Suffix:
    """The nodes that depend on the matches' roots, and the other values that they read."""
    roots = {id(match.root) for match in matches}
    reached: set[int] = set()
    waiting = [match.root for match in matches]
    while waiting:
        for user, _ in waiting.pop().uses():
            node = owners.get(id(user), user)
            if id(node) not in reached:
                reached.add(id(node))
                waiting.extend(node.outputs)
    nodes = [node for node in graph if id(node) in reached]
    inside = {id(value) for node in nodes for value in node.outputs} | roots
    boundary = {
        str(value.name): None
        for node in nodes
        for value in _reads(node)
        if id(value) not in inside and constant(value) is None
    }
    outputs = [str(value.name) for value in graph.outputs if id(value) in inside]
    return _Suffix(list(boundary), outputs, reached)


def _reads(node: ir.Node) -> Iterable[ir.Value]:
    """Values of the enclosing graph that a node reads, its bodies included."""
    yield from (value for value in node.inputs if value is not None)
    for body in _bodies(node):
        own = {id(value) for inner in body.all_nodes() for value in inner.outputs} | set(map(id, body.inputs))
        for inner in body.all_nodes():
            yield from (value for value in inner.inputs if value is not None and id(value) not in own)


def _changed_outputs(
    model: ir.Model,
    suffix: _Suffix,
    pair: tuple[LinearSite, tuple[Match, ...]],
    change: Replacement,
    dense: Mapping[str, np.ndarray],
    batch: Inputs,
) -> dict[str, np.ndarray]:
    site, matches = pair
    if any(id(node) in suffix.nodes for match in matches for node in match.nodes):
        if suffix.session is None:  # one use feeds another: run it all with the weight replaced
            suffix.session = _replaced_session(model, matches, change)
        return suffix.session.run(batch, suffix.outputs)
    if suffix.session is None:
        suffix.session = _suffix_session(model, suffix, matches, dense)
    feeds = dict(dense)
    for match in matches:
        delta = _delta(_tensor(dense[str(match.source.name)]), match, site.operator, change)
        root = dense[str(match.root.name)]
        feeds[str(match.root.name)] = (root + delta.numpy()).astype(root.dtype)
    return suffix.session.run(feeds)


def _delta(value: Tensor, match: Match, before: LinearOperator, change: Replacement) -> Tensor:
    """What the replacement adds to the root, given what the match reads."""
    value = value.float()
    if match.window is not None:
        value = value[(slice(None), slice(None), *(slice(None, None, step) for step in match.window.strides))]
    moved = value.movedim(match.axis, -1)
    delta = apply(change.operator, moved) - apply(before, moved)
    if change.shift is not None:
        delta = delta + change.shift.to(delta.dtype)
    return delta if match.axis == 0 else delta.movedim(-1, match.axis)


def _suffix_session(
    model: ir.Model, suffix: _Suffix, matches: tuple[Match, ...], dense: Mapping[str, np.ndarray]
) -> Session:
    inputs = [*suffix.boundary, *(str(match.root.name) for match in matches)]
    part = ir.convenience.extract(model.graph, list(dict.fromkeys(inputs)), suffix.outputs)
    for value in part.inputs:
        array = dense[str(value.name)]
        value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        value.shape = ir.Shape([None] * array.ndim)
    return Session(part, model)


def _replaced_session(model: ir.Model, matches: tuple[Match, ...], change: Replacement) -> Session:
    graph = model.graph.clone()
    splicer = Splicer(model.graph, graph)
    for match in matches:
        splicer.replace(match, lambda tape, m, source: _dense_chain(tape, m, source, change, splicer), "probe")
    splicer.drop_unused()
    return Session(graph, model)


def _dense_chain(tape: Tape, match: Match, source: ir.Value, change: Replacement, splicer: Splicer) -> ir.Value:
    """The replaced map as a single MatMul, or Conv where it has a window."""
    matrix = densify(change.operator)
    if match.window is not None:
        shaped = matrix.reshape(*matrix.shape, *match.window.kernel).contiguous()
        weight = tape.constant(from_torch(shaped, "probe.weight"), "probe.weight")
        result = tape.op("Conv", [source, weight], [ir.AttrInt64s("strides", match.window.strides)])
    else:
        weight = tape.constant(from_torch(matrix.T.contiguous(), "probe.weight"), "probe.weight")
        if match.axis == 0:
            source = tape.op("Transpose", [source], [ir.AttrInt64s("perm", [1, 0])])
        result = tape.op("MatMul", [source, weight])
    return add_bias(tape, match, result, change.shift, splicer)
