"""An exported program as a plain module: inputs by name, outputs by name, nothing in containers."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from lrcompile.data import InputSpec
from lrcompile.errors import UnsupportedError
from lrcompile.graphs.base import Inputs
from lrcompile.graphs.fx.constants import written
from lrcompile.graphs.module_run import named_outputs
from lrcompile.graphs.structured import place

HELD = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
"""Inputs of the lifted graph that the program stores itself."""


def held(program: ExportedProgram, target: str) -> Any:
    """The stored tensor (or object) of a name."""
    found = program.state_dict.get(target)
    return program.constants.get(target) if found is None else found


def stored(program: ExportedProgram) -> dict[str, Tensor]:
    """Every stored tensor under its first name, each once."""
    known: set[Hashable] = set()
    found: dict[str, Tensor] = {}
    for name, tensor in (*program.state_dict.items(), *program.constants.items()):
        if isinstance(tensor, Tensor):
            key = place(tensor) if tensor.numel() else name
            if key not in known:
                known.add(key)
                found[name] = tensor
    return found


def placeholders(program: ExportedProgram) -> Iterator[tuple[fx.Node, Any]]:
    """The lifted graph's inputs, each with its entry in the signature."""
    nodes = program.graph.find_nodes(op="placeholder")
    return zip(nodes, program.graph_signature.input_specs, strict=True)


def input_specs(program: ExportedProgram) -> list[InputSpec]:
    """Name, dtype and shape of every tensor that must be fed; free sizes bear the name of their symbol.

    Raises:
        UnsupportedError: an input is neither a tensor nor a constant.
    """
    found = []
    for node, spec in placeholders(program):
        if spec.kind in HELD or isinstance(spec.arg, ConstantArgument):
            continue
        value = node.meta.get("val")
        if spec.kind != InputKind.USER_INPUT or not isinstance(spec.arg, TensorArgument) or value is None:
            raise UnsupportedError("only tensors can be fed to an exported program", where=node.name)
        found.append(InputSpec(node.name, _dtype(value.dtype), tuple(_size(size) for size in value.shape)))
    return found


def _dtype(dtype: torch.dtype) -> np.dtype:
    if dtype == torch.bfloat16:
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return torch.empty(0, dtype=dtype).numpy().dtype


def _size(size: int | torch.SymInt) -> int | str:
    return size if isinstance(size, int) else str(size)


def typed(inputs: Inputs, program: ExportedProgram) -> dict[str, Any]:
    """Arrays as tensors of the very types that the program was exported for."""
    dtypes = {node.name: node.meta["val"].dtype for node, spec in placeholders(program)
              if spec.kind not in HELD and isinstance(spec.arg, TensorArgument)}  # fmt: skip
    return {name: _tensor(value, dtypes.get(name)) for name, value in inputs.items()}


def _tensor(value: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(value, Tensor):
        return value if dtype is None else value.to(dtype)
    array = np.ascontiguousarray(value)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(dtype)
    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(dtype)


class Typed:
    """Batches whose arrays are turned into tensors one batch at a time, see :func:`typed`."""

    def __init__(self, batches: Iterable[Inputs], program: ExportedProgram) -> None:
        self.batches, self.program = batches, program

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (typed(batch, self.program) for batch in self.batches)


def output_names(program: ExportedProgram) -> dict[str, int]:
    """Which of the flat outputs bears which name; caches and constants are left out."""
    specs = [spec for spec in program.graph_signature.output_specs if spec.kind == OutputKind.USER_OUTPUT]
    marks = [torch.tensor(i) if isinstance(s.arg, TensorArgument) else None for i, s in enumerate(specs)]
    return {name: int(mark) for name, mark in named_outputs(_unflattened(marks, program)).items()}


def _unflattened(values: list[Any], program: ExportedProgram) -> Any:
    tree = program.call_spec.out_spec
    if tree is None:
        return tuple(values)
    try:
        return pytree.tree_unflatten(values, tree)
    except Exception:  # a container that makes demands on what it holds
        return tuple(values)


def outputs(program: ExportedProgram) -> list[dict[str, Any]]:
    """Name, dtype and shape of every named output."""
    specs = [spec for spec in program.graph_signature.output_specs if spec.kind == OutputKind.USER_OUTPUT]
    nodes = {node.name: node for node in program.graph.nodes}
    found = []
    for name, index in output_names(program).items():
        value = nodes[specs[index].arg.name].meta["val"]
        dtype = str(value.dtype).removeprefix("torch.")
        found.append({"name": name, "dtype": dtype, "shape": [_size(size) for size in value.shape]})
    return found


def flat(program: ExportedProgram) -> fx.GraphModule:
    """A module over the program's own tensors: ``forward(**inputs)`` returns a mapping of named outputs.

    :func:`name_of` tells the names of its nodes in the program. torch's generated checks of the inputs are left out.

    Raises:
        UnsupportedError: torch cannot turn the program into a module.
    """
    try:
        module: Any = program.module(check_guards=False)
    except Exception as error:  # torch raises anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UnsupportedError(f"the exported program cannot be run: {reason}") from error
    graph = module.graph
    graph.set_codegen(CodeGen())
    fed = [(node, spec) for node, spec in placeholders(program) if spec.kind not in HELD]
    constants: dict[fx.Node, Any] = {}
    for node, (before, spec) in zip(graph.find_nodes(op="placeholder"), fed, strict=True):
        node.meta[_NAME] = before.name
        if isinstance(spec.arg, ConstantArgument):
            constants[node] = spec.arg.value
    _name(graph, program.graph)
    _with_defaults(graph, constants)
    (output,) = graph.find_nodes(op="output")
    results = output.args[0]
    results = list(results) if isinstance(results, tuple | list) else [results]
    output.args = ({name: results[index] for name, index in output_names(program).items()},)
    made = fx.GraphModule(module, graph)
    _keep(made)
    return made


def _keep(module: fx.GraphModule) -> None:
    """Buffers that the program writes to are copies, which start anew with every run: the program stays as it is."""
    copies: list[tuple[Tensor, Tensor]] = []
    for node in written(module.graph):
        holder, name = _holder(module, node)
        tensor = getattr(holder, name, None) if node.op == "get_attr" else None
        if isinstance(tensor, Tensor):
            copies.append((tensor, tensor.detach().clone()))
            holder._parameters.pop(name, None)
            holder._buffers[name] = copies[-1][1]

    def start(*_: Any) -> None:
        with torch.no_grad():
            for before, copied in copies:
                copied.copy_(before)

    if copies:
        module.register_forward_pre_hook(start)


def _holder(module: nn.Module, node: fx.Node) -> tuple[nn.Module, str]:
    path, _, name = str(node.target).rpartition(".")
    return (module.get_submodule(path) if node.op == "get_attr" and path else module), name


_NAME = "lrcompile_name"


def name_of(node: fx.Node) -> str:
    """What a node of a flat module is called in the program."""
    return node.meta.get(_NAME, node.name)


def _name(graph: fx.Graph, program: fx.Graph) -> None:
    """torch renames nodes that are called like a builtin of Python; the operations' order stays."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    for node, before in zip(calls, (each for each in program.nodes if each.op == "call_function"), strict=False):
        if node.target == before.target:
            node.meta[_NAME] = before.name


def _with_defaults(graph: fx.Graph, constants: dict[fx.Node, Any]) -> None:
    """Constant inputs get their value; they come last, as Python's signatures want it."""
    nodes = graph.find_nodes(op="placeholder")
    anchor = nodes[-1] if nodes else None
    for node in nodes:
        if node in constants:
            node.args = (constants[node],)
            if anchor is not None and node is not anchor:
                anchor.append(node)
                anchor = node
