"""What a module tree stores: its tensors by name, each of them once, and a hash over all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.graphs.structured import place


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers under every name that leads to them, as in ``state_dict()``."""
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield prefix + name, parameter
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield prefix + name, buffer


def stored(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each stored tensor under its first name, and the other names: alias → first name."""
    first: dict[Hashable, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in named_tensors(model):
        # an empty tensor has no place; a name of its own keeps its shape
        known = first.setdefault(place(tensor) if tensor.numel() else name, name)
        if known == name:
            tensors[name] = tensor
        elif name not in tensors:
            aliases[name] = known
    return tensors, aliases


def nbytes(model: nn.Module) -> int:
    """Bytes of all stored tensors, each once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in stored(model)[0].values())


def parameters(model: nn.Module) -> int:
    """Number of values in all stored floating-point tensors, each once."""
    return sum(tensor.numel() for tensor in stored(model)[0].values() if tensor.is_floating_point())


def raw(tensor: Tensor) -> Any:
    """The tensor's bytes in row-major order, as a buffer."""
    held: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(held)


def update(digest: Any, name: str, tensor: Tensor) -> None:
    """Hashes a name, type, shape and values."""
    digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
    digest.update(raw(tensor))


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the module tree, its plain attributes and every stored tensor."""
    digest = hashlib.sha256()
    for path, module in model.named_modules(remove_duplicate=False):
        digest.update(repr((path, type(module).__module__, type(module).__qualname__)).encode())
        digest.update(repr(sorted(_plain(module))).encode())
    tensors, aliases = stored(model)
    digest.update(repr(sorted(aliases.items())).encode())
    for name, tensor in tensors.items():
        update(digest, name, tensor)
    return digest.hexdigest()


def _plain(module: nn.Module) -> Iterator[tuple[str, str]]:
    for name, value in vars(module).items():
        if name != "training" and isinstance(value, bool | int | float | str | tuple | type(None)):
            text = repr(value)
            if " at 0x" not in text:  # an address differs from run to run
                yield name, text
