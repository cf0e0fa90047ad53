"""Finding the linear sites of a module tree: a site is a stored weight with every module that holds it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lrcompile.errors import InvalidInputError, UnsupportedError
from lrcompile.graphs.structured import Factors, Structured, StructuredConv, StructuredLinear, place
from lrcompile.linop import BlockSparse, Dense, LinearOperator
from lrcompile.sites import LinearSite, Use, Window

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Reader:
    """A module that applies a site's weight."""

    path: str
    module: nn.Module
    kind: str  # Linear, Conv1D or Conv

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(self.module.stride) if self.kind == "Conv" else ()  # type: ignore[arg-type]

    @property
    def window(self) -> Window | None:
        """What a convolution reads for one position."""
        return _window(self.module) if self.kind == "Conv" else None

    @property
    def bias(self) -> nn.Parameter | None:
        return self.module._parameters.get("bias")

    @property
    def weight(self) -> nn.Parameter:
        """The stored weight; only layers that are not parametrised have one."""
        weight = self.module._parameters["weight"]
        assert weight is not None
        return weight

    def structured(self, factors: Factors, bias: Tensor | None) -> Structured:
        """The module that takes this one's place."""
        if self.window is not None:
            return StructuredConv(factors, bias, window=self.window)
        return StructuredLinear(factors, bias, transposed=self.kind == "Conv1D")


@dataclass(frozen=True, eq=False)
class Found:
    """A site and the modules that apply it."""

    site: LinearSite
    readers: tuple[Reader, ...]

    @property
    def alone(self) -> bool:
        """Whether one module applies the weight, at one place, and it may be changed."""
        return len(self.readers) == len(self.site.uses) == 1 and not self.site.frozen


def share(model: nn.Module) -> nn.Module:
    """A copy of the module tree that holds the very same tensors: no weight is stored twice.

    Everything else is copied deeply, references between modules included, so replacing modules in
    the copy leaves the original alone. (What a closure holds cannot be copied: hooks that close over
    a module keep talking to the original one.)

    Raises:
        UnsupportedError: a script module, or an attribute that cannot be copied.
    """
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise UnsupportedError("TorchScript modules cannot be rewritten", hint="give the nn.Module it was made from")
    memo: dict[int, Any] = {id(tensor): tensor for module in model.modules() for tensor in _held_tensors(module)}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever an attribute's own __deepcopy__ raises
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UnsupportedError(
            f"the module tree cannot be copied: {reason}",
            where=type(model).__name__,
            hint="an attribute such as a lock or an open file stands in the way; build the model without it",
        ) from error


def _held_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Every tensor that a module holds, registered or not, with its gradient."""
    pending: list[Any] = list(vars(module).values())
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, list | tuple | set):
            pending.extend(value)


def find(root: nn.Module) -> list[Found]:
    """Every constant linear map below ``root`` (which itself is a holder), in order of registration."""
    paths = dict(root.named_modules())
    groups: dict[object, list[Reader]] = {}
    for path, module in paths.items():
        kind = kind_of(module) if path else ""
        if kind:
            parameter = module._parameters.get("weight")
            groups.setdefault(id(module) if parameter is None else place(parameter), []).append(
                Reader(path, module, kind)
            )
    holders = _holders(paths)
    stray = _held_outside(paths)
    return [_found(readers, holders.get(key, []), stray, paths) for key, readers in groups.items()]


def kind_of(module: nn.Module) -> str:
    """What a module is as a linear map; empty where it is none."""
    weight = getattr(module, "weight", None) if isinstance(module, (nn.Linear, *CONVS)) or _is_conv1d(module) else None
    if not isinstance(weight, Tensor) or is_lazy(weight):
        return ""
    if not weight.is_floating_point():
        return ""
    if isinstance(module, CONVS):
        return "" if getattr(module, "transposed", False) else "Conv"
    if weight.ndim != 2:
        return ""
    return "Conv1D" if _is_conv1d(module) else "Linear"


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is (in, out); known by its name, since transformers is optional."""
    weight = module._parameters.get("weight")
    return (
        type(module).__name__ == "Conv1D"
        and not isinstance(module, CONVS)
        and isinstance(getattr(module, "nf", None), int)
        and weight is not None
        and weight.ndim == 2
        and weight.shape[1] == module.nf
    )


def _window(module: nn.Module) -> Window:
    kernel, strides, padding, dilations = (
        getattr(module, name) for name in ("kernel_size", "stride", "padding", "dilation")
    )
    less = more = (0,) * len(kernel)
    if padding == "same":
        total = [(size - 1) * spread for size, spread in zip(kernel, dilations, strict=True)]
        less, more = tuple(size // 2 for size in total), tuple(size - size // 2 for size in total)
    elif padding != "valid":
        less = more = tuple(padding)
    pads = (*less, *more)
    return Window(tuple(kernel), tuple(strides), pads if any(pads) else (), tuple(dilations))


def _holders(paths: dict[str, nn.Module]) -> dict[object, list[tuple[str, nn.Module]]]:
    """By the place of a parameter: every module that registers it."""
    found: dict[object, list[tuple[str, nn.Module]]] = {}
    for path, module in paths.items():
        for parameter in module._parameters.values():
            if parameter is not None:
                found.setdefault(place(parameter), []).append((path, module))
    return found


def _held_outside(paths: dict[str, nn.Module]) -> dict[int, str]:
    """Modules (by ``id``) that plain attributes, lists or dicts hold as well: a swap would not reach those."""
    found: dict[int, str] = {}
    for path, module in paths.items():
        for name, value in vars(module).items():
            if name in ("_modules", "_parameters", "_buffers"):
                continue
            values: Iterable[Any] = [value]
            if isinstance(value, list | tuple | set):
                values = value
            elif isinstance(value, dict):
                values = value.values()
            for item in values:
                if isinstance(item, nn.Module):
                    found[id(item)] = f"{path}.{name}".lstrip(".")
    return found


def _found(
    readers: list[Reader], holders: list[tuple[str, nn.Module]], stray: dict[int, str], paths: dict[str, nn.Module]
) -> Found:
    first = readers[0]
    uses = [Use(reader.path, reader.path, None if reader.bias is None else reader.bias.detach()) for reader in readers]
    rows = [(path, module) for path, module in holders if isinstance(module, nn.Embedding)]
    uses += [Use(path, path, None, "rows") for path, _ in rows]
    frozen = _frozen(readers, holders, stray, paths)
    site = LinearSite(first.path, _operator(first), tuple(uses), first.window, first.kind, frozen)
    return Found(site, tuple(readers))


def _operator(reader: Reader) -> LinearOperator:
    """The stored matrix; the groups of a convolution stand on its diagonal."""
    weight = reader.module.weight.detach()  # type: ignore[operator, union-attr]
    groups = getattr(reader.module, "groups", 1)
    if reader.kind == "Conv" and groups > 1:
        places = torch.arange(groups)
        return BlockSparse(weight.reshape(groups, len(weight) // groups, -1), places, places, (groups, groups))
    if reader.kind == "Conv1D":
        return Dense(weight.T)
    return Dense(weight.flatten(1) if reader.kind == "Conv" else weight)


def _frozen(
    readers: list[Reader], holders: list[tuple[str, nn.Module]], stray: dict[int, str], paths: dict[str, nn.Module]
) -> str:
    """Why the site must stay; empty where it can be replaced."""
    reading = {id(reader.module) for reader in readers}
    for path, module in holders:
        if isinstance(module, nn.Embedding):
            return f"tied to embedding {path}"
        if id(module) not in reading:
            return f"its weight is shared with {path or 'the model'} ({type(module).__name__})"
    if len({(reader.kind, reader.window) for reader in readers}) > 1:
        return "its weight is shared by layers of different kinds"
    for reader in readers:
        reason = _own_reason(reader, paths) or _outside(reader, stray)
        if reason:
            return reason
    return ""


def _own_reason(reader: Reader, paths: dict[str, nn.Module]) -> str:
    module = reader.module
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is parametrised (computed from other parameters)"
    if type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}"
    parent = paths.get(reader.path.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight without calling it"
    if reader.kind == "Conv" and module.groups != 1:
        return f"a convolution in {module.groups} groups"
    if reader.kind == "Conv" and module.padding_mode != "zeros":
        return f"it pads with other values than zeros ({module.padding_mode})"
    standard = next((base for base in (nn.Linear, *CONVS) if isinstance(module, base)), type(module))
    if type(module).forward is not standard.forward or "forward" in vars(module):
        return f"it has a forward of its own ({type(module).__name__})"
    return ""


def _outside(reader: Reader, stray: dict[int, str]) -> str:
    where = stray.get(id(reader.module))
    return f"the module is also held by the plain attribute {where}" if where else ""


def check_finite(model: nn.Module) -> None:
    """Refuses parameters that no decomposition could take.

    Raises:
        InvalidInputError: NaN or infinity, with the parameter's name.
        UnsupportedError: a parameter without storage (the meta device).
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UnsupportedError("the parameter lies on the meta device", where=name, hint="load the weights first")
        if parameter.is_floating_point() and parameter.dtype.itemsize > 1 and not _finite(parameter):
            raise InvalidInputError("the parameter holds NaN or infinity", where=name)


def _finite(tensor: Tensor) -> bool:
    if is_lazy(tensor):
        return True
    with torch.no_grad():  # one pass without a mask of the tensor's size: NaN and infinity survive both ends
        if not tensor.numel():
            return True
        low, high = torch.aminmax(tensor.detach())
        return bool(torch.isfinite(low) and torch.isfinite(high))
