"""A run that tells who reads which weight, and which layers read one and the same tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrcompile.graphs.module_run import argument, evaluating
from lrcompile.graphs.module_sites import Found


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
                    self.owners.setdefault(weight.untyped_storage()._cdata, []).append((*span(weight), found))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs or {})):
            if isinstance(value, Tensor) and type(value) in (Tensor, nn.Parameter):
                self._look(value, func)
        return func(*args, **(kwargs or {}))

    def _look(self, tensor: Tensor, func: Any) -> None:
        owners = self.owners.get(tensor.untyped_storage()._cdata)
        if not owners:
            return
        start, end = span(tensor)
        for low, high, found in owners:
            inside = any(module is reader.module for _, module in self.stack for reader in found.readers)
            if start < high and low < end and not inside and found.site.name not in self.trace.raw:
                where = (self.stack[-1][0] if self.stack else "") or "the model"
                self.trace.raw[found.site.name] = f"{where} ({func})"


def span(tensor: Tensor) -> tuple[int, int]:
    """First and last element within the storage."""
    start = int(tensor.storage_offset())
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size)
    return start, start + int(reach) + 1


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


def _identity(value: Tensor) -> object:
    """Equal for one tensor, and for its contiguous views with the same channels, as long as nobody writes to it."""
    shape: tuple[int, ...] = tuple(value.shape)
    if value.is_contiguous() and shape:
        shape = (value.numel() // max(shape[-1], 1), shape[-1])
        return value.untyped_storage()._cdata, value.storage_offset(), shape, value.dtype, value._version
    return value.untyped_storage()._cdata, value.storage_offset(), shape, value.stride(), value.dtype, value._version
