"""An ONNX model as a graph of linear sites.

The loaded model is never changed by a replacement: what a site holds now stands in an
overlay, and a backend writes a new model from both. Roll-back therefore costs nothing, and
weights are shared by everything that is derived from the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_ir as ir
import torch
from torch import Tensor

from lrcompile.calibrate import Moments
from lrcompile.data import InputSpec
from lrcompile.errors import GateError, UnsupportedError, UsageError
from lrcompile.graphs.base import Inputs, Journal, Outputs, Replacement
from lrcompile.graphs.onnx import counting, load
from lrcompile.graphs.onnx.channels import OnnxRegion, regions, reordered
from lrcompile.graphs.onnx.constants import settle
from lrcompile.graphs.onnx.grouping import group_key, site_of
from lrcompile.graphs.onnx.hygiene import cleaned
from lrcompile.graphs.onnx.naming import site_name, unique
from lrcompile.graphs.onnx.node_rules import apply_rules
from lrcompile.graphs.onnx.observe import observe
from lrcompile.graphs.onnx.probe import probe
from lrcompile.graphs.onnx.raising import Match, all_matches
from lrcompile.graphs.onnx.scales import folded_scales
from lrcompile.graphs.onnx.session import Session
from lrcompile.graphs.onnx.tensors import to_torch
from lrcompile.linop import Dense, LinearOperator
from lrcompile.memory import release
from lrcompile.sites import LinearSite
from lrcompile.sketch import Importance
from lrcompile.windows import unfit

if TYPE_CHECKING:
    import onnx

    from lrcompile.graphs.onnx.tiling import Tiling

_MODEL = "(model)"


class OnnxGraph:
    """A model with its linear sites and what replaces them.

    Args:
        model: in topological order; not modified.
        path: where it was read from, if it was.
    """

    kind: ClassVar[str] = "onnx"

    def __init__(self, model: ir.Model, path: Path | None = None) -> None:
        self.model = model
        self._loaded = model
        self.path = path
        self.journal = Journal()
        self.replacements: dict[str, Replacement] = {}

    @classmethod
    def load(cls, path: str | Path) -> OnnxGraph:
        """Reads a file; weights stay where they are on disk until they are needed.

        Raises:
            InvalidInputError: unreadable, unsafe or corrupt.
            UnsupportedError: beyond the pre-flight limits.
        """
        model = load.read(Path(path))
        settle(model)
        load.check_finite(model)
        release(now=True)  # the message that the weights were copied from
        return cls(model, Path(path))

    @classmethod
    def from_proto(cls, proto: onnx.ModelProto) -> OnnxGraph:
        """A model in memory, checked like a file.

        Raises:
            InvalidInputError: corrupt, or with external data (whose folder is not known).
            UnsupportedError: beyond the pre-flight limits.
        """
        model = load.from_proto(proto)
        settle(model)
        load.check_finite(model)
        return cls(model)

    # -- sites -----------------------------------------------------------------------------

    @cached_property
    def _matched(self) -> dict[str, tuple[LinearSite, tuple[Match, ...]]]:
        taken: set[str] = set()
        groups: list[list[Match]] = []
        index: dict[tuple, list[Match]] = {}
        for match in all_matches(self.model.graph):
            key = group_key(match)
            if key not in index:
                index[key] = []
                groups.append(index[key])
            index[key].append(match)
        sites: dict[str, tuple[LinearSite, tuple[Match, ...]]] = {}
        for matches in groups:
            first = matches[0]
            compound = not isinstance(first.operator, Dense)
            name = unique(site_name(first.weight, first.nodes[0], compound=compound), taken)
            sites[name] = (site_of(name, matches, self.opset or 0), tuple(matches))
        return sites

    def linear_sites(self) -> Sequence[LinearSite]:
        """Every constant linear map, in order of execution, with what it holds now."""
        return [self._current(site) for site, _ in self._matched.values()]

    def _current(self, site: LinearSite) -> LinearSite:
        current = self.replacements.get(site.name)
        if current is None:
            return site
        return LinearSite(site.name, current.operator, site.uses, site.window, site.kind, site.frozen)

    def matches(self, name: str) -> tuple[Match, ...]:
        """The node groups that compute the site."""
        return self._matched[name][1]

    def original(self, name: str) -> LinearSite:
        """The site as it stood in the loaded model."""
        return self._matched[name][0]

    # -- replacing -------------------------------------------------------------------------

    def replace(self, site: LinearSite, by: LinearOperator, shift: Tensor | None = None) -> None:
        """Installs an expression at every use of the site.

        Raises:
            UsageError: the site cannot be written, or the shapes differ.
        """
        original = self.original(site.name)
        if original.frozen:
            raise UsageError(f"cannot be replaced: {original.frozen}", where=site.name)
        if by.shape != original.shape:
            raise UsageError(f"shape {by.shape} cannot replace {original.shape}", where=site.name)
        reason = unfit(by, original.window)
        if reason:
            raise UsageError(f"cannot be written: {reason}", where=site.name)
        if shift is not None and tuple(shift.shape) != by.shape[:1]:
            raise UsageError(f"a shift of {tuple(shift.shape)} does not fit {by.shape[0]} outputs", where=site.name)
        self.journal.entries.append((site.name, self.replacements.get(site.name)))
        self.replacements[site.name] = Replacement(by, shift)

    def rollback(self, mark: int) -> None:
        """Undoes every replacement since ``mark``."""
        while len(self.journal.entries) > mark:
            name, before = self.journal.entries.pop()
            if isinstance(before, ir.Model):
                self._continue_with(before)
            elif before is None:
                self.replacements.pop(name, None)
            else:
                self.replacements[name] = before

    def adopt(self, model: ir.Model) -> None:
        """Continues with a model that an exact graph pass derived from this one.

        Raises:
            UsageError: sites were replaced already; graph passes come first.
        """
        if self.replacements:
            raise UsageError("graph rewrites must come before weight rewrites in a pipeline")
        self.journal.entries.append((_MODEL, self.model))
        self._continue_with(model)

    def clean(self) -> tuple[bool, str]:
        """Takes out what is unused or repeated; says whether anything was, and what."""
        model, detail = cleaned(self.model)
        if model is not None:
            self.adopt(model)
        return model is not None, detail

    def rewrite_nodes(self, rules: Any) -> list[str]:
        """Applies onnxscript rewrite rules; returns the name of a node for each match.

        Raises:
            UsageError: no rules, or sites were replaced already.
            UnsupportedError: a rule changes inputs, outputs or the opset.
        """
        model, places = apply_rules(self.model, rules)
        if places:
            self.adopt(model)
        return places

    def fold_scales(self) -> tuple[list[str], str]:
        """Multiplies scales into the weights that read them; returns the names of their nodes, or why there are none.

        Raises:
            UsageError: sites were replaced already.
        """
        model, done, reason = folded_scales(self.model)
        if model is not None:
            self.adopt(model)
        return done, reason

    def regions(self) -> Sequence[OnnxRegion]:
        """Values between sites whose channels may come in any order."""
        return regions(self.model.graph, self._matched)

    def reorder(self, orders: Sequence[tuple[OnnxRegion, Tensor]], operators: Mapping[str, LinearOperator]) -> None:
        """Puts the channels of regions in other orders; one entry of the journal for each change.

        Args:
            orders: regions of this graph as it stands, and for each place (size,) the channel that comes there.
            operators: what the writers and readers hold then.
        """
        self.journal.entries.append((_MODEL, self.model))
        self._continue_with(reordered(self.model, orders))
        moved = {writer: order for region, order in orders for writer in region.writers}
        for site in [site for site in self.linear_sites() if site.name in operators]:
            held = self.replacements.get(site.name)
            shift = None if held is None else held.shift
            moves = shift is not None and site.name in moved
            self.replace(site, operators[site.name], shift[moved[site.name]] if moves and shift is not None else shift)

    def tile_rows(self, sample: Inputs, *, limit: float = 0.0, most: int = 8) -> Tiling:
        """Computes what is large in row tiles; what came of it, see :class:`lrcompile.graphs.onnx.tiling.Tiling`.

        Raises:
            UsageError: sites were replaced already.
            UnsupportedError: the model does not run at other sizes than those of ``sample``.
            GateError: the tiles compute something else.
        """
        from lrcompile.graphs.onnx.tiling import tiled

        found = tiled(self.model, sample, limit=limit, most=most)
        if found.model is not None:
            self.adopt(found.model)
        return found

    def _continue_with(self, model: ir.Model) -> None:
        self.model = model
        self.__dict__.pop("_matched", None)

    # -- running ---------------------------------------------------------------------------

    @cached_property
    def _session(self) -> Session:
        return Session(self._loaded.graph.clone(), self._loaded)

    def run(self, inputs: Inputs) -> Outputs:
        """Outputs of the loaded model; bfloat16 is computed in float32."""
        return self._session.run(inputs)

    def release(self) -> None:
        """Gives the session's memory back."""
        self.__dict__.pop("_session", None)

    def observe(self, batches: Iterable[Inputs], sites: Sequence[LinearSite], *, memory: int) -> Mapping[str, Moments]:
        """Moments of what the sites read, keyed by :attr:`LinearSite.input`."""
        matches = {site.name: self.matches(site.name) for site in sites}
        return observe(self.model, batches, sites, matches, memory=memory)

    def probe(self, batches: Iterable[Inputs], changes: Mapping[str, Replacement]) -> Mapping[str, float]:
        """Squared relative change of the outputs when each site alone is replaced."""
        pairs = {name: (self.original(name), self.matches(name)) for name in changes}
        return probe(self.model, batches, pairs, changes)

    def gradients(
        self, batches: Iterable[Inputs], sites: Sequence[LinearSite], *, memory: int, seed: int
    ) -> Importance:
        """Moments of the outputs' gradients at what the sites give, by site name; see :mod:`lrcompile.sketch`."""
        from lrcompile.graphs.onnx.differentiate import gradients

        matches = {site.name: self.matches(site.name) for site in sites}
        return gradients(self.model, batches, sites, matches, memory=memory, seed=seed)

    # -- facts -----------------------------------------------------------------------------

    @property
    def input_specs(self) -> list[InputSpec]:
        """Name, dtype and shape of every input that must be fed."""
        specs = []
        for value in self.model.graph.inputs:
            if value.name in self.model.graph.initializers:
                continue
            dtype = value.dtype.numpy() if value.dtype is not None else None
            specs.append(InputSpec(str(value.name), dtype, _shape(value)))
        return specs

    @property
    def opset(self) -> int | None:
        """Version of the standard operator set."""
        return self.model.opset_imports.get("")

    @property
    def outputs(self) -> list[dict[str, Any]]:
        """Name, dtype and shape of every output."""
        found = []
        for value in self.model.graph.outputs:
            dtype = None if value.dtype is None else str(value.dtype.numpy())
            found.append({"name": value.name, "dtype": dtype, "shape": _shape(value)})
        return found

    @property
    def nodes(self) -> int:
        """Number of nodes, those of bodies included."""
        return sum(1 for _ in self.model.graph.all_nodes())

    @property
    def files(self) -> list[Path]:
        """The model's file and its data files."""
        if self.path is None:
            return []
        data = {Path(tensor.path) for tensor in self._tensors() if isinstance(tensor, ir.ExternalTensor)}
        return [self.path, *sorted(data)]

    @property
    def is_external(self) -> bool:
        """Whether any tensor of the loaded model lies in a data file."""
        return any(isinstance(tensor, ir.ExternalTensor) for tensor in self._tensors())

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(tensor.nbytes for tensor in self._tensors())

    @property
    def parameters(self) -> int:
        """Number of values in all floating-point tensors."""
        return sum(tensor.size for tensor in self._tensors() if tensor.dtype.is_floating_point())

    def _tensors(self) -> Iterable[ir.TensorProtocol]:
        for graph in self.model.graphs():
            for value in graph.initializers.values():
                if value.const_value is not None:
                    yield value.const_value
            for node in graph:
                for attribute in node.attributes.values():
                    if attribute.type == ir.AttributeType.TENSOR:
                        yield attribute.as_tensor()

    def macs(self, sample: Inputs) -> int:
        """Multiply–accumulates of the loaded model on ``sample``."""
        return counting.macs(self.model, sample)

    def fingerprint(self) -> str:
        """SHA-256 over the structure and every stored tensor."""
        digest = hashlib.sha256(repr(sorted(self.model.opset_imports.items())).encode())
        bodies = [*self.model.graphs(), *self.model.functions.values()]
        for body in bodies:
            digest.update(repr([[value.name for value in ends] for ends in (body.inputs, body.outputs)]).encode())
            for node in body:
                digest.update(repr(_description(node)).encode())
        for tensor in self._tensors():
            digest.update(repr((tensor.name, str(tensor.dtype), tuple(tensor.shape))).encode())
            if tensor.dtype == ir.DataType.STRING:
                digest.update(repr(tensor.numpy().tolist()).encode())
            else:
                digest.update(to_torch(tensor).contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def verify(self) -> None:
        """Checks that the model is well-formed.

        Raises:
            GateError: it is not; the text is the checker's.
        """
        names = [value.name for value in self.model.graph.inputs]
        if len(set(names)) != len(names):
            raise GateError("two graph inputs share a name")
        if not self.model.graph.outputs:
            raise UnsupportedError("the graph has no outputs")


def _shape(value: ir.Value) -> tuple[int | str | None, ...]:
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape or ())


def _description(node: ir.Node) -> tuple:
    """A node without its tensors and bodies, which are described apart."""
    apart = (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS, ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    attributes = [(name, "" if attr.type in apart else str(attr)) for name, attr in node.attributes.items()]
    names = [[value.name if value is not None else "" for value in ends] for ends in (node.inputs, node.outputs)]
    return node.domain, node.op_type, names, attributes
