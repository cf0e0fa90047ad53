"""A traced model as plain data: a list of tensor operations that is walked, never generated or evaluated as code.

torch's own archive of an exported program unpickles constants and evaluates symbolic expressions when it
is read, so it must not be read from a stranger. Here an operation is looked up among torch's own ``aten``
operators (those that touch files or raw storage excepted), and arguments are numbers, names and references.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.errors import InvalidInputError, UsageError

BUILTINS: dict[str, Callable[..., Any]] = {
    **{f"operator.{f.__name__}": f for f in (operator.add, operator.sub, operator.mul, operator.floordiv)},
    **{f"operator.{f.__name__}": f for f in (operator.truediv, operator.mod, operator.neg, operator.getitem)},
    **{f"operator.{f.__name__}": f for f in (operator.eq, operator.ne, operator.lt, operator.le, operator.gt)},
    **{f"operator.{f.__name__}": f for f in (operator.ge, operator.and_, operator.or_)},
    **{f"math.{f.__name__}": f for f in (math.ceil, math.floor, math.trunc, math.sqrt)},
    **{f"torch.{f.__name__}": f for f in (torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_float, torch.sym_int)},
}
_REFUSED = re.compile(r"file|storage|unsafe_(?!view)|record_stream|^set_|^resize|data_ptr|^_cuda|^_test")
_STRINGS = {
    "approximate",
    "reduction",
    "padding",
    "padding_mode",
    "rounding_mode",
    "mode",
    "indexing",
    "equation",
    "reduce",
    "side",
}


def lookup(name: str) -> Callable[..., Any]:
    """The operation called ``aten.linear.default``, ``operator.add``, ….

    Raises:
        InvalidInputError: unknown, or one that a model has no business to call.
    """
    if name in BUILTINS:
        return BUILTINS[name]
    match = re.fullmatch(r"aten\.(\w+)\.(\w+)", name)
    packet = getattr(torch.ops.aten, match[1], None) if match and not _REFUSED.search(match[1]) else None
    found = getattr(packet, match[2], None) if packet is not None and match else None
    if not isinstance(found, torch._ops.OpOverload):
        raise InvalidInputError(f"unknown operation {name[:80]!r}", where="program")
    for argument in found._schema.arguments:
        if "str" in str(argument.type) and argument.name not in _STRINGS:
            raise InvalidInputError(f"the operation {name!r} is not allowed", where="program")
    return found


_NAMED: dict[str, type] = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def _check(value: Any, known: int) -> Any:
    """An argument as JSON gave it, verified: scalars, lists, and one-key objects."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return [_check(item, known) for item in value]
    if not isinstance(value, dict) or len(value) != 1:
        raise InvalidInputError("malformed argument", where="program")
    ((kind, content),) = value.items()
    if kind == "node" and type(content) is int and 0 <= content < known:
        return _Reference(content)
    if kind in _NAMED and isinstance(content, str) and isinstance(getattr(torch, content, None), _NAMED[kind]):
        return getattr(torch, content)
    if kind == "device":
        return _Device()
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if kind in ("tuple", "slice") and isinstance(content, list):
        items = [_check(item, known) for item in content]
        return tuple(items) if kind == "tuple" else slice(*items)
    raise InvalidInputError(f"malformed argument {kind!r}", where="program")


class _Reference:
    def __init__(self, index: int) -> None:
        self.index = index


class _Device:
    """Wherever the module's tensors lie now."""


def _references(value: Any) -> list[int]:
    if isinstance(value, _Reference):
        return [value.index]
    if isinstance(value, list | tuple):
        return [index for item in value for index in _references(item)]
    if isinstance(value, dict):
        return [index for item in value.values() for index in _references(item)]
    if isinstance(value, slice):
        return _references((value.start, value.stop, value.step))
    return []


class Program(nn.Module):
    """A traced model: calls with the names and ranks of the inputs it was traced with.

    Args:
        spec: ``inputs``, ``tensors``, ``nodes``, ``output`` and ``ranges``, as JSON holds them.
        tensors: the model's tensors by name; parameters where they are ``nn.Parameter``.

    Raises:
        InvalidInputError: malformed, or an operation that is not allowed.
    """

    def __init__(self, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        try:
            self._read(spec, tensors)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise InvalidInputError(f"malformed program: {type(error).__name__} {error}", where="program") from error

    def _read(self, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.inputs = [(str(item["name"]), list(item["dims"])) for item in spec["inputs"]]
        self.ranges = {str(name): (int(low), high) for name, (low, high) in spec["ranges"].items()}
        self.tensor_names = [str(name) for name in spec["tensors"]]
        for name in self.tensor_names:
            if name not in tensors:
                raise InvalidInputError("the tensor is missing", where=name)
            _register(self, name, tensors[name])
        known = len(self.tensor_names) + len(self.inputs)
        self.nodes: list[tuple[Callable[..., Any], list[Any], dict[str, Any]]] = []
        for node in spec["nodes"]:
            args = _check(node.get("args", []), known)
            kwargs = {str(name): _check(value, known) for name, value in node.get("kwargs", {}).items()}
            self.nodes.append((lookup(node["op"]), args, kwargs))
            known += 1
        self.output = spec["output"]
        self.fixed = str(spec.get("fixed", ""))  # why torch could not keep every size free
        self.results = [item.index for item in _check([{"node": i} for i in spec["results"]], known)]
        self._last_uses()

    def _last_uses(self) -> None:
        """After which node a value is no longer needed."""
        first = len(self.tensor_names) + len(self.inputs)
        last = {
            index: place for place, (_, args, kwargs) in enumerate(self.nodes) for index in _references((args, kwargs))
        }
        self.drops: list[list[int]] = [[] for _ in self.nodes]
        for index, where in last.items():
            if index >= first and index not in self.results:
                self.drops[where].append(index)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs in the form in which the model returned them.

        Raises:
            UsageError: missing or unknown inputs.
            InvalidInputError: a size that the trace does not hold for.
        """
        values: list[Any] = [_find(self, name) for name in self.tensor_names]
        device = next((tensor.device for tensor in values), torch.device("cpu"))
        values += self._bind(args, kwargs)
        for (target, arguments, keywords), drop in zip(self.nodes, self.drops, strict=True):
            filled = [_fill(value, values, device) for value in arguments]
            named = {name: _fill(value, values, device) for name, value in keywords.items()}
            values.append(target(*filled, **named))
            for index in drop:
                values[index] = None
        return _shape([values[index] for index in self.results], self.output)

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        names = [name for name, _ in self.inputs]
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        if len(args) > len(names) or set(given) != set(names):
            raise UsageError(f"takes the inputs {', '.join(names)}, not {', '.join(map(str, given))}")
        sizes: dict[str, int] = {}
        for name, dims in self.inputs:
            tensor = given[name]
            fits = len(dims) == tensor.ndim and all(
                self._fits(want, have, sizes) for want, have in zip(dims, tensor.shape, strict=True)
            )
            if not fits:
                wanted = ", ".join(map(str, dims))
                found = f"shape {tuple(tensor.shape)} does not fit ({wanted}) of the trace"
                hint = f"torch could not keep other sizes free: {self.fixed}" if self.fixed else ""
                raise InvalidInputError(found, where=name, hint=hint)
        return [given[name] for name in names]

    def _fits(self, want: int | str, have: int, sizes: dict[str, int]) -> bool:
        if isinstance(want, int):
            return want == have
        low, high = self.ranges.get(want, (0, None))
        return low <= have and (high is None or have <= high) and sizes.setdefault(want, have) == have


def _fill(value: Any, values: Sequence[Any], device: torch.device) -> Any:
    if isinstance(value, _Reference):
        return values[value.index]
    if isinstance(value, _Device):
        return device
    if isinstance(value, list):
        return [_fill(item, values, device) for item in value]
    if isinstance(value, tuple):
        return tuple([_fill(item, values, device) for item in value])
    if isinstance(value, slice):
        return slice(*(_fill(item, values, device) for item in (value.start, value.stop, value.step)))
    return value


def _shape(values: Sequence[Any], form: Any) -> Any:
    """Values put back into the containers they came in."""
    if isinstance(form, int):
        return values[form]
    if form is None:
        return None
    ((kind, content),) = form.items()
    if kind == "dict":
        return {name: _shape(values, item) for name, item in content.items()}
    items = [_shape(values, item) for item in content]
    return tuple(items) if kind == "tuple" else items


def _register(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Registers ``a.b.weight`` in modules ``a`` and ``b``, so that a state dict has the model's own names."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root._modules[part] = nn.Module()
        child = root._modules[part]
        if child is None or not part or child is root:
            raise InvalidInputError("not a name of a tensor", where=name)
        root = child
    if isinstance(tensor, nn.Parameter):
        root._parameters[last] = tensor
    else:
        root._buffers[last] = tensor


def _find(root: nn.Module, name: str) -> Tensor:
    *path, last = name.split(".")
    for part in path:
        root = root._modules[part]  # type: ignore[assignment]
    found = root._parameters.get(last)
    return root._buffers[last] if found is None else found  # type: ignore[return-value]
