"""Running a module: inputs from arrays, named outputs, and a trace that tells who reads which weight."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrcompile.errors import InvalidInputError, LrcompileError, UnsupportedError
from lrcompile.graphs.module_sites import Found

CACHES = ("past_key_values", "mems", "cache_params")
"""Outputs that are state for the next call, not results."""


def to_tensor(value: Any, model: nn.Module) -> Any:
    """An array as a tensor on the model's device; floating arrays take the type of the model's weights."""
    if isinstance(value, Tensor):
        return value.to(_anchor(model).device)
    if not isinstance(value, np.ndarray | np.generic | list):
        return value
    array = np.ascontiguousarray(value)
    if array.dtype == ml_dtypes.bfloat16:
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    elif array.dtype.kind in "fiub":
        tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    else:
        raise InvalidInputError(f"arrays of {array.dtype} cannot be fed to a module")
    anchor = _anchor(model)
    return tensor.to(anchor.device, anchor.dtype if tensor.is_floating_point() else None)


def _anchor(model: nn.Module) -> Tensor:
    """The first floating parameter; it tells device and type."""
    floats = (p for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1)
    return next(floats, torch.empty(0))


def bind(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call: mappings by name, tuples and lists by position, anything else alone."""
    if isinstance(inputs, Mapping):
        return (), {str(name): to_tensor(value, model) for name, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(to_tensor(value, model) for value in inputs), {}
    return (to_tensor(inputs, model),), {}


def call(model: nn.Module, inputs: Any) -> Any:
    """The model's own result.

    Raises:
        UnsupportedError: the model fails on these inputs.
    """
    args, kwargs = bind(model, inputs)
    try:
        return model(*args, **kwargs)
    except LrcompileError:
        raise
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # models raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise UnsupportedError(
            f"the model fails on these inputs: {reason}",
            where=type(model).__name__,
            hint="the samples' names must be parameters of forward()",
        ) from error


def named_outputs(result: Any) -> dict[str, Tensor]:
    """Tensors of a result by name: its keys, or ``output``, ``output_1``, …; caches and the rest left out."""
    if dataclasses.is_dataclass(result) and not isinstance(result, Mapping | type):
        result = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    found: dict[str, Tensor] = {}
    if isinstance(result, Mapping):
        for name, value in result.items():
            if name not in CACHES:
                _collect(str(name), value, found)
    elif isinstance(result, tuple | list):
        for index, value in enumerate(result):
            _collect(f"output_{index}" if index else "output", value, found)
    else:
        _collect("output", result, found)
    return found


def _collect(name: str, value: Any, found: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        found[name] = value
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            _collect(f"{name}_{index}", item, found)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _collect(f"{name}_{key}", item, found)


def to_array(tensor: Tensor) -> np.ndarray:
    """A tensor as an array; what numpy has no type for becomes float32."""
    held = tensor.detach().cpu()
    if held.is_floating_point() and held.dtype not in (torch.float16, torch.float32, torch.float64):
        held = held.float()
    return held.resolve_conj().numpy()


@contextmanager
def evaluating(model: nn.Module, *, inference: bool = True) -> Iterator[None]:
    """Without dropout, gradients, torch's fast path for encoder layers (it reads weights raw) or new randomness."""
    training = [module for module in model.modules() if module.training]
    fast = torch.backends.mha.get_fastpath_enabled()
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    try:
        for module in training:
            module.training = False
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.random.fork_rng(sorted(devices)):
            torch.manual_seed(0)
            with torch.inference_mode() if inference else torch.no_grad():
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module in training:
            module.training = True


# -- who reads what ------------------------------------------------------------------------


@dataclass(eq=False)
class Trace:
    """What one run told about the sites.

    Attributes:
        raw: site → who read its weight without calling its module.
        reads: path of a module → keys of the tensors that it read, in order.
    """

    raw: dict[str, str] = field(default_factory=dict)
    reads: dict[str, list[object]] = field(default_factory=dict)

    def reason(self, found: Found) -> str:
        """Why the site must stay; empty where every use went through its modules."""
        name = found.site.name
        if name in self.raw:
            return f"its weight is read outside its forward, by {self.raw[name]}"
        return "" if any(self.reads.get(reader.path) for reader in found.readers) else "its forward is never called"


class _Watch(TorchDispatchMode):
    """Sees every operation, and whether it reads a watched weight outside the weight's modules."""

    def __init__(self, trace: Trace, founds: Sequence[Found], stack: list[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.trace, self.stack = trace, stack
        self.owners: dict[int, list[tuple[int, int, Found]]] = {}
        for found in founds:
            for reader in found.readers[:1]:
                weight = reader.module.weight  # a parametrised weight is computed anew each time and never matches
                if isinstance(weight, Tensor):
                    self.owners.setdefault(weight.untyped_storage()._cdata, []).append((*_span(weight), found))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs or {})):
            if isinstance(value, Tensor) and type(value) in (Tensor, nn.Parameter):
                self._look(value, func)
        return func(*args, **(kwargs or {}))

    def _look(self, tensor: Tensor, func: Any) -> None:
        owners = self.owners.get(tensor.untyped_storage()._cdata)
        if not owners:
            return
        start, end = _span(tensor)
        for low, high, found in owners:
            inside = any(module is reader.module for _, module in self.stack for reader in found.readers)
            if start < high and low < end and not inside and found.site.name not in self.trace.raw:
                where = (self.stack[-1][0] if self.stack else "") or "the model"
                self.trace.raw[found.site.name] = f"{where} ({func})"


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and last element within the storage."""
    start = tensor.storage_offset()
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size)
    return start, start + reach + 1


def trace(model: nn.Module, founds: Sequence[Found], run: Callable[[], Any]) -> Trace:
    """Runs once and records raw reads of weights and which inputs are one and the same tensor.

    Args:
        run: calls the model.
    """
    record, stack, kept = Trace(), [], []
    owner = {id(reader.module): reader.path for found in founds for reader in found.readers}

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        stack.append((names.get(id(module), ""), module))
        if id(module) in owner:
            value = argument(args, kwargs)
            kept.append(value)  # alive until the end, so that no address is used twice
            record.reads.setdefault(owner[id(module)], []).append(_identity(value))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    names = {id(module): path for path, module in model.named_modules()}
    handles = []
    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
        with evaluating(model, inference=False), _Watch(record, founds, stack):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return record


def argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The first argument of a layer's call."""
    return args[0] if args else next(iter(kwargs.values()))


def _identity(value: Tensor) -> object:
    """Equal for one tensor, and for its contiguous views with the same channels, as long as nobody writes to it."""
    shape: tuple[int, ...] = tuple(value.shape)
    if value.is_contiguous() and shape:
        shape = (value.numel() // max(shape[-1], 1), shape[-1])
        return value.untyped_storage()._cdata, value.storage_offset(), shape, value.dtype, value._version
    return value.untyped_storage()._cdata, value.storage_offset(), shape, value.stride(), value.dtype, value._version


def forward_parameters(model: nn.Module) -> tuple[list[inspect.Parameter], bool]:
    """Named parameters of ``forward``, and whether it takes any others by keyword."""
    signature = inspect.signature(model.forward)
    named = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return named, any(p.kind == p.VAR_KEYWORD for p in signature.parameters.values())
