"""Putting stored layers and tensors into a freshly built module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.errors import InvalidInputError
from lrcompile.graphs.module_sites import Reader, kind_of
from lrcompile.graphs.module_store import named_tensors
from lrcompile.graphs.structured import Change, Pool, install
from lrcompile.linop import BlockSparse, Choose, LinearOperator, Select, SemiSparse, children, rebuild
from lrcompile.windows import unfit

EXTRA = "program."


def materialise(held: dict[str, Tensor], manifest: dict[str, Any]) -> dict[str, Tensor]:
    """Stored tensors as parameters and buffers, aliases included."""
    parameters = set(map(str, manifest["parameters"]))
    return {
        name: nn.Parameter(tensor) if name in parameters and tensor.is_floating_point() else tensor
        for name, tensor in held.items()
    }


def non_persistent(model: nn.Module) -> dict[str, str]:
    """Types of the floating buffers that are not stored: they are rebuilt, perhaps in another type."""
    found = {}
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.is_floating_point():
                found[f"{path}.{name}".lstrip(".")] = str(buffer.dtype).removeprefix("torch.")
    return found


def install_sites(model: nn.Module, manifest: dict[str, Any], held: dict[str, Tensor]) -> nn.Module:
    """Replaces the rewritten layers and gives everything its stored value; all or nothing.

    Raises:
        InvalidInputError: the module is not the one that was saved, or the structure is malformed.
    """
    root = nn.Module()
    root.add_module("model", model)
    changes: list[Change] = []
    pool, memo = Pool(), {}
    try:
        for entry in manifest["sites"]:
            changes += _install(root, entry, held, pool, memo)
        model = root.get_submodule("model")
        plan = list(_assignments(model, manifest["aliases"], held))
        plan += _casts(model, manifest["buffers"])
    except BaseException:
        for change in reversed(changes):
            change.undo()
        raise
    _assign(plan)
    return model


def _install(root: nn.Module, entry: dict[str, Any], held: dict[str, Tensor], pool: Pool, memo: Any) -> list[Change]:
    path = entry["path"]
    try:
        old = root.get_submodule(f"model.{path}" if path else "model")
    except AttributeError as error:
        raise InvalidInputError("the model has no such module", where=path, hint="is it the saved class?") from error
    named = {inner: _tensor(held, name) for inner, name in entry["tensors"].items()}
    operator = rebuild(entry["structure"], named, "", memo)
    check_indices(operator, path)
    if kind_of(old) != entry["kind"] or _shape(old, entry["kind"]) != operator.shape:
        found = f"{type(old).__name__} {_shape(old, kind_of(old))}"
        raise InvalidInputError(f"expected a {entry['kind']} {operator.shape}, found {found}", where=path)
    reader = Reader(path, old, entry["kind"])
    if list(reader.strides) != entry["stride"]:
        raise InvalidInputError(f"stride {entry['stride']}, the model has {list(reader.strides)}", where=path)
    reason = unfit(operator, reader.window)
    if reason:
        raise InvalidInputError(reason, where=path)
    bias = None if entry["bias"] is None else nn.Parameter(_tensor(held, entry["bias"]), entry["trainable"])
    if bias is not None and bias.shape != operator.shape[:1]:
        raise InvalidInputError(f"a bias of shape {tuple(bias.shape)}", where=path)
    factors = pool.factors(operator, device=_device(old), trainable=entry["trainable"])
    return install(root, old, reader.structured(factors, bias))


def _tensor(held: dict[str, Tensor], name: str) -> Tensor:
    if name not in held:
        raise InvalidInputError("the tensor is missing", where=name)
    return held[name]


def _device(module: nn.Module) -> torch.device:
    weight = module._parameters.get("weight")
    return torch.device("cpu") if weight is None or weight.is_meta else weight.device


def _shape(module: nn.Module, kind: str) -> tuple[int, ...]:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return ()
    rows, columns = weight.flatten(1).shape if weight.ndim > 1 else (len(weight), 0)
    return (columns, rows) if kind == "Conv1D" else (rows, columns)


def check_indices(operator: LinearOperator, where: str) -> None:
    """Indices lie in their ranges.

    Raises:
        InvalidInputError: one does not.
    """
    pairs: list[tuple[Tensor, int]] = []
    match operator:
        case Select() | SemiSparse():
            pairs = [(operator.indices, operator.size)]
        case BlockSparse():
            pairs = [(operator.rows, operator.grid[0]), (operator.columns, operator.grid[1])]
        case Choose():
            pairs = [(operator.index, len(operator.operators))]
    for index, size in pairs:
        integral = not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
        if not integral or (index.numel() and not (int(index.min()) >= 0 and int(index.max()) < size)):
            raise InvalidInputError(f"indices of {type(operator).__name__} are not in 0..{size - 1}", where=where)
    for child in children(operator):
        check_indices(child, where)


Assignment = tuple[nn.Module, str, Tensor]


def _assignments(model: nn.Module, aliases: dict[str, str], held: dict[str, Tensor]) -> Iterator[Assignment]:
    """(module, attribute, value) of everything stored; names and shapes must agree both ways."""
    modules = dict(model.named_modules(remove_duplicate=False))
    values: dict[str, Tensor] = {}
    missed = {name for name in held if not name.startswith(EXTRA)}
    for name, old in named_tensors(model):
        source = aliases.get(name, name)
        missed.discard(source)
        stored = _tensor(held, source)
        if stored.shape != old.shape or stored.is_floating_point() != old.is_floating_point():
            have, want = f"{stored.dtype} {tuple(stored.shape)}", f"{old.dtype} {tuple(old.shape)}"
            raise InvalidInputError(f"stored as {have}, the model has {want}", where=name)
        if source not in values:
            moved = stored if old.is_meta else stored.to(old.device)
            values[source] = nn.Parameter(moved, old.requires_grad) if isinstance(old, nn.Parameter) else moved
        path, _, attribute = name.rpartition(".")
        yield modules[path], attribute, values[source]
    if missed:
        raise InvalidInputError("the model has no place for this tensor", where=min(missed))


def _assign(plan: list[Assignment]) -> None:
    for module, attribute, value in plan:
        if attribute in module._parameters:
            module._parameters[attribute] = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
        else:
            module._buffers[attribute] = value


def _casts(model: nn.Module, dtypes: dict[str, str]) -> Iterator[Assignment]:
    """Buffers that are rebuilt, in the type that they had."""
    modules = dict(model.named_modules())
    for name, dtype in dtypes.items():
        path, _, attribute = name.rpartition(".")
        kind = getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype) or not kind.is_floating_point or path not in modules:
            raise InvalidInputError("malformed entry 'buffers'", where=name)
        buffer = modules[path]._buffers.get(attribute)
        if buffer is not None and buffer.is_floating_point():
            yield modules[path], attribute, buffer.to(kind)
