"""Small real models with their data: ``load("digits_vit")``, ``load("digits_conv")``, ``load("minilm")`` and
``load("smollm2")``; ``load("smollm2_cached")`` is the last with its cache as inputs and outputs,
``load("smollm2_rotated")`` the same function with weights off the grid of four bits.

The registry is lazy: ``names()`` reads nothing, ``load`` imports one model's file, and weights and
data are read when one of the model's functions is called.
"""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lrcompile.zoo.base import Batch, MissingPackageError, Run, ZooModel, module_run, onnx_run

_NAMES = ("digits_conv", "digits_vit", "minilm", "smollm2", "smollm2_cached", "smollm2_rotated")
_MODELS = {name: f"lrcompile.zoo.{name}" for name in _NAMES}
_FACE = ("Batch", "MissingPackageError", "Run", "ZooModel", "module_run", "onnx_run")

__all__ = ["Batch", "MissingPackageError", "Run", "ZooModel", "exported", "load", "module_run", "names", "onnx_run"]


def names() -> tuple[str, ...]:
    """Names of all models, whether or not the packages that carry them are installed."""
    return tuple(_MODELS)


def load(name: str) -> ZooModel:
    """The model of that name.

    Raises:
        UsageError: unknown name.
        MissingPackageError: the package that carries it is absent (raised here, not at first use).
    """
    from lrcompile.errors import UsageError, nearest

    if name not in _MODELS:
        raise UsageError(f"unknown zoo model '{name}'", where="lrcompile.zoo", hint=nearest(name, _MODELS))
    return importlib.import_module(_MODELS[name]).model()


def exported(name: str) -> Path:
    """The model as an ONNX file: shipped, or exported once and kept in the cache folder.

    The cache is ``$LRCOMPILE_CACHE/zoo``, by default ``.cache/zoo`` of the current folder. The file's name
    changes with the versions and the source that made it.
    """
    zoo = load(name)
    shipped = Path(__file__).parent / name / "model.onnx"
    if shipped.is_file():
        return shipped
    from lrcompile.zoo.base import cache_folder

    path = cache_folder() / f"{name}-{_fingerprint(name)}.onnx"
    if not path.is_file():
        zoo.export(path)
    return path


def _fingerprint(name: str) -> str:
    from importlib.metadata import version

    sources = [Path(__file__).with_name(f"{name}.py"), Path(__file__).with_name("export.py")]
    digest = hashlib.sha256("".join(version(p) for p in ("torch", "onnxscript", "transformers")).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


def __getattr__(name: str) -> object:
    if name in _FACE:
        return getattr(importlib.import_module("lrcompile.zoo.base"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
