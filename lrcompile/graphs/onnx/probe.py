"""Probes: what replacing a single site does to the outputs of an ONNX model.

Only what lies downstream of the site is run again: everything else is computed once per piece of
data and fed to the rest. It needs no gradients, so every graph that runs has probes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
import onnx_ir as ir
from torch import Tensor

from lrcompile.calibrate import token_mask
from lrcompile.graphs.base import Inputs, Outputs, Replacement
from lrcompile.graphs.onnx.constants import constant
from lrcompile.graphs.onnx.match import Match, bodies
from lrcompile.graphs.onnx.observe import Cutter, session_with, tensor_of, tensors_of
from lrcompile.graphs.onnx.session import Session, ahead, workers
from lrcompile.graphs.onnx.splice import Splicer, Tape, add_bias
from lrcompile.graphs.onnx.tensors import from_torch
from lrcompile.linop import LinearOperator, apply, densify
from lrcompile.memory import release
from lrcompile.sites import LinearSite
from lrcompile.windows import convolve

TOGETHER = 6
"""Sites that are probed between two runs of what lies before them."""

Pairs = Mapping[str, tuple[LinearSite, tuple[Match, ...]]]


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
    cutter = Cutter(model)
    whole = session_with(model, model.graph.outputs)
    pieces = list(ahead(lambda piece: (piece, whole.run(piece)), cutter.pieces(batches)))
    owners = _owners(model.graph)
    change: dict[str, float] = {}
    names = list(pairs)
    for start in range(0, len(names), TOGETHER):
        group = {name: pairs[name] for name in names[start : start + TOGETHER]}
        change.update(_probe_group(model, pieces, group, changes, owners))
        release(now=True)
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
    prefix = session_with(model, [value for value in _values(model.graph) if value.name in wanted])
    moved = {name: dict.fromkeys(suffixes[name].outputs, 0.0) for name in pairs}
    norm: dict[str, float] = {}
    group = _Group(model, prefix, suffixes, pairs, changes)
    for energies, changed in ahead(lambda pair: group.changes(*pair), pieces):
        for name, energy in energies.items():
            norm[name] = norm.get(name, 0.0) + energy
        for site, name, energy in changed:
            moved[site][name] += energy
        release()
    return {
        site: sum(value / norm[name] for name, value in parts.items() if norm.get(name, 0.0) > 0)
        for site, parts in moved.items()
    }


@dataclass(eq=False)
class _Group:
    """A few sites that share what is computed around them."""

    model: ir.Model
    prefix: Session
    suffixes: Mapping[str, _Suffix]
    pairs: Pairs
    changes_by: Mapping[str, Replacement]
    making: Lock = field(default_factory=Lock)

    def changes(self, piece: Inputs, outputs: Outputs) -> tuple[dict[str, float], list[tuple[str, str, float]]]:
        """Energies of the outputs, and of their change for each site: (site, output, energy)."""
        around = {**piece, **self.prefix.run(piece)}
        mask = token_mask(tensors_of(piece))
        floats = {name: array for name, array in outputs.items() if array.dtype.kind == "f"}
        moved = []
        for site, suffix in self.suffixes.items():
            changed = self._changed(site, suffix, around, piece)
            common = [name for name in floats if name in changed]
            moved += [(site, name, _energy(changed[name] - floats[name], mask)) for name in common]
        return {name: _energy(array, mask) for name, array in floats.items()}, moved

    def _changed(self, name: str, suffix: _Suffix, around: Inputs, piece: Inputs) -> Outputs:
        """The outputs downstream of a site with its weight replaced."""
        (site, matches), change = self.pairs[name], self.changes_by[name]
        inside = any(match.owner is not None for match in matches)
        if inside or any(id(node) in suffix.nodes for match in matches for node in match.nodes):
            # in a body, or one use feeds another: run it all with the weight replaced
            session = self._session(suffix, lambda: _replaced_session(self.model, matches, change))
            return session.run(piece, suffix.outputs)
        session = self._session(suffix, lambda: _suffix_session(self.model, suffix, matches, around))
        feeds = dict(around)
        for match in matches:
            delta = _delta(tensor_of(around[str(match.source.name)]), match, site.operator, change)
            root = around[str(match.root.name)]
            feeds[str(match.root.name)] = (root + delta.numpy()).astype(root.dtype)
        return session.run(feeds)

    def _session(self, suffix: _Suffix, make: Callable[[], Session]) -> Session:
        with self.making:
            suffix.session = suffix.session or make()
            return suffix.session


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _energy(array: np.ndarray, mask: Tensor | None) -> float:
    tensor = tensor_of(array).double()
    if mask is not None and tensor.shape[: mask.ndim] == mask.shape:
        tensor = tensor[mask]
    elif mask is not None and tensor.ndim == 2 and len(tensor) == mask.numel():  # tokens of all samples in a row
        tensor = tensor[mask.flatten()]
    return float(tensor.square().sum())


def _owners(graph: ir.Graph) -> dict[int, ir.Node]:
    """For every node inside a body: the node of ``graph`` that holds the body."""
    owners: dict[int, ir.Node] = {}
    for node in graph:
        for body in bodies(node):
            owners.update((id(inner), node) for inner in body.all_nodes())
    return owners


def _suffix(graph: ir.Graph, matches: tuple[Match, ...], owners: Mapping[int, ir.Node]) -> _Suffix:
    """The nodes that depend on the matches' roots, and the other values that they read."""
    roots = {id(match.root) for match in matches}
    reached: set[int] = set()
    waiting = [match.root for match in matches]
    for match in matches:
        owner = owners.get(id(match.nodes[-1]))
        if owner is not None:  # the root may be what a body returns, which nobody reads by this name
            reached.add(id(owner))
            waiting.extend(owner.outputs)
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
    for body in bodies(node):
        own = {id(value) for inner in body.all_nodes() for value in inner.outputs} | set(map(id, body.inputs))
        for inner in body.all_nodes():
            yield from (value for value in inner.inputs if value is not None and id(value) not in own)


def _delta(value: Tensor, match: Match, before: LinearOperator, change: Replacement) -> Tensor:
    """What the replacement adds to the root, given what the match reads."""
    value = value.float()
    if match.window is not None:
        delta = convolve(change.operator, value, match.window) - convolve(before, value, match.window)
        shift = None if change.shift is None else change.shift.to(delta).reshape(-1, *[1] * match.window.rank)
        return delta if shift is None else delta + shift
    moved = value.movedim(match.axis, -1)
    delta = apply(change.operator, moved) - apply(before, moved)
    return delta if change.shift is None else delta + change.shift.to(delta)


def _suffix_session(
    model: ir.Model, suffix: _Suffix, matches: tuple[Match, ...], dense: Mapping[str, np.ndarray]
) -> Session:
    inputs = [*suffix.boundary, *(str(match.root.name) for match in matches)]
    part = ir.convenience.extract(model.graph, list(dict.fromkeys(inputs)), suffix.outputs)
    for value in part.inputs:
        array = dense[str(value.name)]
        value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        value.shape = ir.Shape([None] * array.ndim)
    return Session(part, model, threads=workers().threads)


def _replaced_session(model: ir.Model, matches: tuple[Match, ...], change: Replacement) -> Session:
    graph = model.graph.clone()
    splicer = Splicer(model.graph, graph)
    for match in matches:
        splicer.replace(match, lambda tape, m, source: _dense_chain(tape, m, source, change, splicer), "probe")
    splicer.drop_unused()
    return Session(graph, model, threads=workers().threads)


def _dense_chain(tape: Tape, match: Match, source: ir.Value, change: Replacement, splicer: Splicer) -> ir.Value:
    """The replaced map as a single MatMul, or Conv where it has a window."""
    matrix, window = densify(change.operator), match.window
    if window is not None:
        shaped = matrix.unflatten(-1, (-1, *window.kernel)).contiguous()
        weight = tape.constant(from_torch(shaped, "probe.weight"), "probe.weight")
        geometry = {"strides": window.strides, "pads": window.pads, "dilations": window.dilations}
        result = tape.op("Conv", [source, weight], [ir.AttrInt64s(*pair) for pair in geometry.items()])
    else:
        weight = tape.constant(from_torch(matrix.T.contiguous(), "probe.weight"), "probe.weight")
        if match.axis == 0:
            source = tape.op("Transpose", [source], [ir.AttrInt64s("perm", [1, 0])])
        result = tape.op("MatMul", [source, weight])
    return add_bias(tape, match, result, splicer.shift(match, change.shift), splicer)
