"""Tracing a module into the plain data of :mod:`lrcompile.program`."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.errors import UnsupportedError
from lrcompile.graphs.module_run import bind, evaluating, forward_parameters
from lrcompile.graphs.structured import place
from lrcompile.program import BUILTINS, Program, lookup

_SKIPPED = ("aten._assert_tensor_metadata.default", "aten._assert_scalar.default", "aten._assert_async.msg")
_NAMES = {target: name for name, target in BUILTINS.items()}
EXTRA = "program.constants."
"""Prefix of tensors that the trace holds and the model does not store."""


def export(model: nn.Module, sample: Any, names: Mapping[Hashable, str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The model's program, and the tensors that only the program needs.

    Sizes that the trace need not fix stay free. The program is run beside the model before it is returned, with
    one sample too.

    Args:
        sample: a batch.
        names: stored tensors by :func:`lrcompile.graphs.structured.place`.

    Raises:
        UnsupportedError: torch cannot export the model, or the program is not plain data.
    """
    inputs = _named(model, sample)
    try:
        with evaluating(model, inference=False):
            form = _form(model(**inputs), [])
            exported, fixed = _export(_Flat(model), inputs)
        writer = _Writer(exported, names)
        spec = {**writer.spec(), "output": form, **({"fixed": fixed} if fixed else {})}
    except UnsupportedError:
        raise
    except Exception as error:  # export raises anything
        raise _refusal(f"torch.export fails: {_first_line(error)}") from error
    _verify(model, spec, writer, inputs)
    return spec, writer.extra


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _refusal(reason: str) -> UnsupportedError:
    hint = "save without sample=, and load with into=<the freshly built dense model>"
    return UnsupportedError(f"no program can be stored: {reason}", hint=hint)


def _named(model: nn.Module, sample: Any) -> dict[str, Any]:
    args, kwargs = bind(model, sample)
    known = [parameter.name for parameter in forward_parameters(model)[0]]
    if len(args) > len(known):
        raise _refusal("forward() does not name its inputs")
    named = {**dict(zip(known, args, strict=False)), **kwargs}
    tensors = [value for value in named.values() if isinstance(value, Tensor)]
    if tensors and all(value.ndim and len(value) == 1 for value in tensors):  # a batch of one would be fixed at one
        named = {name: torch.cat([v, v]) if isinstance(v, Tensor) else v for name, v in named.items()}
    return named


class _Flat(nn.Module):
    """Returns the tensors of a model's result as a list, without the containers around them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Any]) -> list[Tensor]:
        leaves: list[Tensor] = []
        _form(self.model(**inputs), leaves)
        return leaves


def _form(value: Any, leaves: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        leaves.append(value)
        return len(leaves) - 1
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {"dict": {str(name): _form(item, leaves) for name, item in value.items()}}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_form(item, leaves) for item in value]}
    raise _refusal(f"the model returns a {type(value).__name__}")


_ATTEMPTS = (8, 8, 1, 0)
"""Axes of each input that may be free: all, else the samples' number, else none. All are asked for twice: in a process
that compiled other models, torch's first trace has been seen to fix a size that the next one left free."""


def _export(flat: _Flat, inputs: dict[str, Any]) -> tuple[torch.export.ExportedProgram, str]:
    """As many free sizes as torch allows, and why not all, where it says so."""
    last: Exception | None = None
    for attempt, axes in enumerate(_ATTEMPTS):
        try:
            exported = torch.export.export(flat, (inputs,), dynamic_shapes=(_free(inputs, axes),), strict=False)
        except UnsupportedError:
            raise
        except Exception as error:  # the next attempt asks for less
            last = last or error
            continue
        if attempt or not _fixes(exported, inputs):
            return exported, "" if last is None or axes == _ATTEMPTS[0] else _first_line(last)
    raise last or RuntimeError("no attempt was made")


def _free(inputs: dict[str, Any], axes: int) -> dict[str, Any]:
    auto = torch.export.Dim.AUTO
    return {
        name: {axis: auto for axis in range(min(value.ndim, axes))} if isinstance(value, Tensor) else None
        for name, value in inputs.items()
    }


def _fixes(exported: torch.export.ExportedProgram, inputs: dict[str, Any]) -> bool:
    """Whether an axis beside the channels, which networks fix by themselves, has one size."""
    given = [value for value in inputs.values() if isinstance(value, Tensor)]
    traced = [node.meta["val"] for node in exported.graph.nodes if node.name in exported.graph_signature.user_inputs]
    axes = [value.shape[: -1 if like.is_floating_point() else None] for value, like in zip(traced, given, strict=False)]
    return any(isinstance(size, int) for shape in axes for size in shape)


class _Writer:
    """Writes an exported graph as JSON values."""

    def __init__(self, exported: torch.export.ExportedProgram, names: Mapping[Hashable, str]) -> None:
        self.exported, self.names = exported, names
        self.extra: dict[str, Tensor] = {}
        self.index: dict[torch.fx.Node, int] = {}
        self.tensors: list[str] = []
        self.held: dict[str, Tensor] = {}
        self.inputs: list[dict[str, Any]] = []
        self.symbols: dict[str, Any] = {}

    def spec(self) -> dict[str, Any]:
        signature = self.exported.graph_signature
        if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
            raise _refusal("the model writes to its buffers or inputs")
        self._placeholders()
        nodes, results = [], []
        base = len(self.tensors) + len(self.inputs)
        for node in self.exported.graph.nodes:
            if node.op == "output":
                results = [self._number(value) for value in node.args[0]]
            elif node.op == "call_function" and _name(node.target) not in _SKIPPED:
                kwargs = {name: self._value(value) for name, value in node.kwargs.items()}
                nodes.append({"op": _name(node.target), "args": self._value(list(node.args)), "kwargs": kwargs})
                self.index[node] = base + len(nodes) - 1
            elif node.op not in ("placeholder", "call_function"):
                raise _refusal(f"it holds {node.op} {node.target}")
        return {
            "inputs": self.inputs, "tensors": self.tensors, "nodes": nodes, "results": results, "ranges": self._ranges()
        }  # fmt: skip

    def _placeholders(self) -> None:
        """Tensors come first, each once, then the inputs."""
        holders = [node for node in self.exported.graph.nodes if node.op == "placeholder"]
        specs = self.exported.graph_signature.input_specs
        stored = {**self.exported.constants, **self.exported.state_dict}
        user: list[tuple[torch.fx.Node, str]] = []
        tree: Any = self.exported.call_spec.in_spec
        names = iter(tree.child(0).child(0).context)  # the dictionary's keys
        for node, spec in zip(holders, specs, strict=True):
            if spec.kind == torch.export.graph_signature.InputKind.USER_INPUT:
                user.append((node, next(names)))
            elif isinstance(held := stored.get(str(spec.target)), Tensor):
                self.index[node] = self._tensor(held)
            else:
                raise _refusal(f"it holds an object, {spec.target}")
        for node, name in user:
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                self.index[node] = len(self.tensors) + len(self.inputs)
                self.inputs.append({"name": name, "dims": [self._dim(size) for size in value.shape]})

    def _tensor(self, tensor: Tensor) -> int:
        key = place(tensor)
        name = self.names.get(key)
        if name is None:
            name = next((n for n, held in self.extra.items() if place(held) == key), f"{EXTRA}{len(self.extra)}")
            self.extra[name] = tensor
        if name not in self.tensors:
            self.tensors.append(name)
            self.held[name] = tensor
        return self.tensors.index(name)

    def _dim(self, size: int | torch.SymInt) -> int | str:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression.is_number:
            return int(expression)
        text = str(expression)
        if expression.is_Symbol:
            self.symbols[text] = expression
        return text

    def _ranges(self) -> dict[str, list[int | None]]:
        found: dict[str, list[int | None]] = {}
        for text, symbol in self.symbols.items():
            limits = self.exported.range_constraints.get(symbol)
            if limits is not None:
                high = float(limits.upper)
                found[text] = [int(limits.lower), None if high > 2**40 else int(high)]
        return found

    def _number(self, value: Any) -> int:
        if not isinstance(value, torch.fx.Node):
            raise _refusal(f"it returns the constant {value!r}")
        return self.index[value]

    def _value(self, value: Any) -> Any:
        match value:
            case None | bool() | int() | str():
                return value
            case float():
                return value if math.isfinite(value) else {"float": str(value)}
            case torch.fx.Node():
                return {"node": self.index[value]}
            case list():
                return [self._value(item) for item in value]
            case tuple():
                return {"tuple": [self._value(item) for item in value]}
            case slice():
                return {"slice": [self._value(item) for item in (value.start, value.stop, value.step)]}
            case torch.device():
                return {"device": "module"}
            case torch.dtype() | torch.layout() | torch.memory_format():
                return {type(value).__name__: str(value).removeprefix("torch.")}
        raise _refusal(f"it holds a {type(value).__name__}")


def _name(target: Any) -> str:
    name = _NAMES.get(target) or str(target)
    if name not in _SKIPPED:
        try:
            lookup(name)
        except Exception as error:
            raise _refusal(f"it calls {name}") from error
    return name


def _verify(model: nn.Module, spec: dict[str, Any], writer: _Writer, inputs: dict[str, Any]) -> None:
    """The program computes what the model does, for the sample and for its first row alone."""
    fed = {item["name"] for item in spec["inputs"]}
    batches = {name for item in spec["inputs"] for name in item["dims"][:1] if isinstance(name, str)}
    for name in batches:
        spec["ranges"].get(name, [0, None])[0] = 1
    program = Program(spec, writer.held)
    with evaluating(model):
        _compare(model, program, inputs, fed)
        if batches:
            first = {name: value[:1] if isinstance(value, Tensor) else value for name, value in inputs.items()}
            try:
                _compare(model, program, first, fed)
            except (UnsupportedError, RuntimeError):
                for name in batches & spec["ranges"].keys():
                    spec["ranges"][name][0] = 2


def _compare(model: nn.Module, program: Program, inputs: dict[str, Any], fed: set[str]) -> None:
    wanted: list[Tensor] = []
    found: list[Tensor] = []
    _form(model(**inputs), wanted)
    _form(program(**{name: value for name, value in inputs.items() if name in fed}), found)
    for want, have in zip(wanted, found, strict=True):
        scale = float(want.double().norm()) + 1e-30
        if want.shape != have.shape or not float((want.double() - have.double()).norm()) <= 1e-3 * scale:
            raise _refusal("the traced program computes something else than the model")
