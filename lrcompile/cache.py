"""Statistics on disk, found again by the content that they were made from.

A key is a hash of the model, the data and the settings, so a hit is right by construction, and
a second budget for the same model starts without running it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from lrcompile.calibrate import Moments

LIMIT = 4 * 2**30
"""Bytes that the cache may hold; what was used least recently goes first."""


def folder() -> Path:
    """``$LRCOMPILE_CACHE``, or ``lrcompile`` in the user's cache folder."""
    chosen = os.environ.get("LRCOMPILE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lrcompile"


def key(*parts: str) -> str:
    """A name for what these parts determine."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def load(name: str, where: Path | None) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Stored tensors and texts; None without a cache, or where nothing (readable) is stored."""
    if where is None:
        return None
    from safetensors import SafetensorError, safe_open

    path = where / f"{name}.safetensors"
    try:
        with safe_open(path, framework="pt") as stored:
            tensors = {item: stored.get_tensor(item) for item in stored.keys()}  # noqa: SIM118 - not a mapping
            texts = dict(stored.metadata() or {})
        os.utime(path)
    except (OSError, SafetensorError):
        return None
    return tensors, texts


def store(name: str, tensors: Mapping[str, Tensor], texts: Mapping[str, str], where: Path | None) -> None:
    """Stores tensors and texts; a cache that cannot be written is no error."""
    if where is None:
        return
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = where / f"{name}.{os.getpid()}.tmp"
    try:
        where.mkdir(parents=True, exist_ok=True)
        save_file({item: tensor.contiguous() for item, tensor in tensors.items()}, temporary, metadata=dict(texts))
        os.replace(temporary, where / f"{name}.safetensors")
        _evict(where)
    except (OSError, SafetensorError):
        pass
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _evict(where: Path) -> None:
    files = sorted(where.glob("*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for path in files:
        total += path.stat().st_size
        if total > LIMIT:
            path.unlink(missing_ok=True)


def pack(moments: Mapping[str, Moments]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Moments as flat tensors; names that share an object share the tensors."""
    tensors: dict[str, Tensor] = {}
    texts: dict[str, str] = {}
    seen: dict[int, str] = {}
    for index, (name, value) in enumerate(moments.items()):
        label = seen.setdefault(id(value), str(index))
        texts[f"name:{name}"] = label
        if label == str(index):
            tensors.update((f"{label}/{part}", tensor) for part, tensor in value.tensors().items())
    return tensors, texts


def unpack(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> dict[str, Moments]:
    """The inverse of :func:`pack`."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        label, _, part = name.partition("/")
        parts.setdefault(label, {})[part] = tensor
    found = {label: Moments.from_tensors(stored) for label, stored in parts.items()}
    return {name.removeprefix("name:"): found[label] for name, label in texts.items() if name.startswith("name:")}
