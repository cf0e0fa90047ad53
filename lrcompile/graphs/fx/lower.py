"""Replaced sites as plain ``aten`` operations: a new exported program whose factors are parameters of its own."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputSpec, TensorArgument
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from lrcompile.errors import UnsupportedError
from lrcompile.graphs.fx.flat import HELD, held, placeholders
from lrcompile.graphs.fx.sites import FxReader
from lrcompile.graphs.structured import Pool, Structured, StructuredConv, StructuredLinear, place
from lrcompile.linop import Choose, LinearOperator, same, structure
from lrcompile.linop.dense import choose
from lrcompile.linop.tree import map_children


@dataclass(frozen=True, eq=False)
class Placed:
    """A structured layer, and the nodes of the program whose place it takes."""

    site: str
    reader: FxReader
    layer: Structured


def lowered(program: ExportedProgram, layers: Sequence[Placed]) -> ExportedProgram:
    """The program with the layers written as ``aten`` operations; the given program is not changed.

    Stored tensors that nothing reads any more are left out, factors get names below the site's own
    (``up.factors.left.weight``), and every other node, name and constraint stays.

    Raises:
        UnsupportedError: torch cannot trace a layer.
    """
    if not layers:
        return program
    editor = Editor(program)
    for each in layers:
        editor.put(Placed(each.site, each.reader, _decided(each.layer)))
    return editor.finish()


def _decided(layer: Structured) -> Structured:
    """The layer with what its choices pick: a program has no switch that could be turned later."""
    operator = layer.operator
    bound = _bound(operator)
    if same(bound, operator):
        return layer
    pool = Pool(layer.parameters())
    device = next(layer.parameters()).device
    factors = pool.factors(bound, device=device, trainable=layer.factors.trainable)
    if isinstance(layer, StructuredConv):
        return StructuredConv(factors, layer.bias, window=layer.window)
    return StructuredLinear(factors, layer.bias)


def _bound(operator: LinearOperator) -> LinearOperator:
    if isinstance(operator, Choose):
        picked: Any = choose
        return picked(operator, _bound)
    return map_children(operator, _bound)


@dataclass(eq=False)
class Editor:
    """A copy of a program's graph that is changed, and becomes a program of its own."""

    program: ExportedProgram
    graph: fx.Graph = field(init=False)

    def __post_init__(self) -> None:
        program = self.program
        copies: dict[fx.Node, fx.Node] = {}
        self.graph = fx.Graph()
        old = program.graph.output_node()
        results = self.graph.graph_copy(program.graph, copies)
        output = self.graph.output(results)
        output.meta = copy.copy(old.meta)
        for before, after in copies.items():
            after.name = before.name  # a copy renames what is called like a builtin of Python
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.specs = {node.name: spec for node, spec in placeholders(program)}
        self.state, self.constants = dict(program.state_dict), dict(program.constants)
        self.mode = _fake_mode(program)
        self.inputs: dict[Hashable, fx.Node] = {}
        for node, spec in placeholders(program):
            value = held(program, str(spec.target)) if spec.kind in HELD else None
            if isinstance(value, Tensor):
                self.inputs.setdefault(place(value), self.nodes[node.name])
        self.touched: set[int] = set()  # storages that lost a reader
        self.traces: dict[object, fx.GraphModule] = {}
        self.wanted: dict[str, str] = {}  # names that new inputs should have, once others are gone

    # -- one layer -------------------------------------------------------------------------

    def put(self, each: Placed) -> None:
        """Writes one layer in the place of its nodes."""
        end, x = self.nodes[each.reader.nodes[-1]], self.nodes[each.reader.source]
        held = {**dict(each.layer.named_parameters()), **dict(each.layer.named_buffers())}
        leaves = {name: self._input(each.site, name, tensor) for name, tensor in held.items()}
        traced = self._traced(each, x, leaves)
        with self.graph.inserting_before(end):
            new = self._inlined(traced, [x, *leaves.values()], end)
        end.replace_all_uses_with(new)
        name = end.name
        self._drop(end)
        new.name = name  # outputs are called by the names of their nodes
        self.nodes[name] = new

    def _traced(self, each: Placed, x: fx.Node, leaves: Mapping[str, fx.Node]) -> fx.GraphModule:
        key = _form(each.layer, x.meta["val"], list(leaves))
        if key not in self.traces:
            self.traces[key] = self._trace(each, x, leaves)
        return self.traces[key]

    def _trace(self, each: Placed, x: fx.Node, leaves: Mapping[str, fx.Node]) -> fx.GraphModule:
        names = list(leaves)

        def forward(value: Tensor, *tensors: Tensor) -> Tensor:
            return functional_call(each.layer, dict(zip(names, tensors, strict=True)), (value,), tie_weights=False)

        fakes = [x.meta["val"], *(node.meta["val"] for node in leaves.values())]
        try:
            with self.mode, torch.no_grad():
                return make_fx(forward, pre_dispatch=True)(*fakes)
        except Exception as error:  # torch raises anything
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise UnsupportedError(f"{each.layer.operator!r} cannot be exported: {reason}", where=each.site) from error

    def _inlined(self, traced: fx.GraphModule, operands: Sequence[fx.Node], end: fx.Node) -> fx.Node:
        """Copies the traced operations before the insertion point."""
        traced.graph.eliminate_dead_code()
        copies: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), operands, strict=True))
        for node in traced.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if node.op != "call_function":
                raise UnsupportedError(f"holds a constant of its own ({node.target})", where=end.name)
            made = self.graph.node_copy(node, lambda each: copies[each])
            made.meta = {
                **{k: v for k, v in end.meta.items() if k not in ("val", "tensor_meta")},
                "val": node.meta["val"],
            }
            copies[node] = made
        (result,) = (node.args[0] for node in traced.graph.nodes if node.op == "output")
        new = copies[result]  # type: ignore[index]
        if new in operands:  # the identity; the name of the old node must stand for a node of its own
            value = new.meta
            new = self.graph.call_function(torch.ops.aten.alias.default, (new,))
            new.meta = dict(value)
        return new

    # -- stored tensors --------------------------------------------------------------------

    def _input(self, site: str, name: str, tensor: Tensor) -> fx.Node:
        """The graph input that holds a factor; a tensor is stored once."""
        key = place(tensor)
        if key not in self.inputs:
            parameter = isinstance(tensor, nn.Parameter)
            target = self._free(f"{site}.{name}")
            node = self._placeholder(target, InputKind.PARAMETER if parameter else InputKind.BUFFER)
            with self.mode:
                node.meta["val"] = self.mode.from_tensor(tensor, static_shapes=True)
            self.state[target] = tensor
            self.inputs[key] = node
            self.wanted[node.name] = f"{site}.{name.replace('factors.weight', 'weight')}"
        return self.inputs[key]

    def _free(self, target: str) -> str:
        """The name, or one like it that is not taken."""
        count, name = 1, target
        taken = self.state.keys() | self.constants.keys()
        while name in taken:
            count += 1
            name = f"{target}_{count}"
        return name

    def _placeholder(self, target: str, kind: InputKind) -> fx.Node:
        """A new graph input behind those of its kind: parameters come first, then buffers, then all else."""
        before = (InputKind.PARAMETER,) if kind == InputKind.PARAMETER else (InputKind.PARAMETER, InputKind.BUFFER)
        anchor = next(n for n in self.graph.nodes if n.op != "placeholder" or self.specs[n.name].kind not in before)
        with self.graph.inserting_before(anchor):
            node = self.graph.placeholder(("p_" if kind == InputKind.PARAMETER else "b_") + target.replace(".", "_"))
        persistent = True if kind == InputKind.BUFFER else None
        self.specs[node.name] = InputSpec(kind, TensorArgument(node.name), target, persistent)
        return node

    def _drop(self, node: fx.Node) -> None:
        """Erases a node that nothing reads, and what only it has read; stored tensors are noted."""
        pending = [node]
        while pending:
            each = pending.pop()
            if each.users or each._erased:
                continue
            if each.op == "placeholder":
                self._note(each)
                continue
            if each.op == "call_function" and not each.is_impure():
                operands = list(each.all_input_nodes)
                self.graph.erase_node(each)
                pending += operands

    def adopt(self, graph: fx.Graph) -> None:
        """Continues with a graph that a rewrite made of this one; stored tensors that it does not read are left out."""
        before = {node.name for node, _ in placeholders(self.program) if node.users}
        self.graph = graph
        for node in graph.find_nodes(op="placeholder"):
            if node.name in before and not node.users:
                self._note(node)

    def _note(self, node: fx.Node) -> None:
        value = held(self.program, str(self.specs[node.name].target))
        if isinstance(value, Tensor):
            self.touched.add(value.untyped_storage()._cdata)

    def finish(self) -> ExportedProgram:
        """The new program, without the stored tensors that lost their last reader."""
        self._forget()
        self._rename()
        nodes = self.graph.find_nodes(op="placeholder")
        signature = ExportGraphSignature([self.specs[node.name] for node in nodes], self._outputs())
        module = fx.GraphModule(self.program.graph_module, self.graph)
        module.meta.update(self.program.graph_module.meta)
        self.graph.lint()
        made = ExportedProgram(
            root=module,
            graph=module.graph,
            graph_signature=signature,
            state_dict=self.state,
            range_constraints=dict(self.program.range_constraints),
            module_call_graph=self.program.module_call_graph,
            example_inputs=self.program.example_inputs,
            constants=self.constants,
            verifiers=self.program.verifiers,
        )
        made._guards_code = list(self.program._guards_code)
        return made

    def _rename(self) -> None:
        """A whole matrix or a bias takes the name of what it came for, where that is free now."""
        names, taken = dict[str, str](), self.state.keys() | self.constants.keys()
        for node, target in self.wanted.items():
            spec = self.specs[node]
            if target not in taken:
                names[str(spec.target)] = target
                taken.add(target)
                self.specs[node] = replace(spec, target=target)
        self.state = {names.get(name, name): tensor for name, tensor in self.state.items()}

    def _outputs(self) -> list[OutputSpec]:
        """The outputs under the names that their nodes have now."""
        results: Any = self.graph.output_node().args[0]
        found = []
        for spec, value in zip(self.program.graph_signature.output_specs, results, strict=True):
            moved = isinstance(value, fx.Node) and isinstance(spec.arg, TensorArgument)
            found.append(replace(spec, arg=TensorArgument(value.name)) if moved else spec)
        return found

    def _forget(self) -> None:
        """Takes out unread inputs over storages that a rewrite freed, all names of a tied tensor with them."""
        for node in self.graph.find_nodes(op="placeholder"):
            spec = self.specs[node.name]
            value = held(self.program, str(spec.target)) if spec.kind in HELD else None
            if isinstance(value, Tensor) and not node.users and value.untyped_storage()._cdata in self.touched:
                self.graph.erase_node(node)
                self.state.pop(str(spec.target), None)
                self.constants.pop(str(spec.target), None)


def _form(layer: Structured, x: Tensor, names: Sequence[str]) -> object:
    """Equal for layers that are traced into the same operations."""
    leaves = tuple((str(tensor.dtype), tensor.stride(), tensor.requires_grad) for tensor in layer.state_dict().values())
    window = layer.window if isinstance(layer, StructuredConv) else None
    shape = str((tuple(x.shape), x.stride(), x.storage_offset(), x.dtype, x.requires_grad))
    return structure(layer.operator), window, tuple(names), leaves, shape


def _fake_mode(program: ExportedProgram) -> FakeTensorMode:
    """The mode that knows the program's free sizes."""
    for node in program.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode
    return FakeTensorMode()
