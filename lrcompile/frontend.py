"""Whatever a user calls a model, as a graph."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lrcompile.errors import InvalidInputError, UnsupportedError, UsageError
from lrcompile.graphs.base import Graph


def open_graph(model: Any) -> Graph:
    """A graph for a path, an ONNX model, an ``nn.Module``, an exported program, or a graph as it is.

    A path is an ``.onnx`` or ``.pt2`` file, a Hugging Face folder, or a folder that :func:`lrcompile.save` wrote.

    Raises:
        InvalidInputError: unreadable or unsafe.
        UnsupportedError: a kind of model that has no graph.
    """
    if isinstance(model, str | Path):
        return _from_path(Path(model))
    if hasattr(model, "linear_sites") and hasattr(model, "replace"):
        return model
    if _is("onnx_ir", "Model", model):
        from lrcompile.graphs.onnx.graph import OnnxGraph

        return OnnxGraph(model)
    if _is("onnx", "ModelProto", model):
        from lrcompile.graphs.onnx.graph import OnnxGraph

        return OnnxGraph.from_proto(model)
    if _is("torch.export", "ExportedProgram", model):
        from lrcompile.graphs.fx.graph import FxGraph

        return FxGraph(model)
    if _is("torch.nn", "Module", model):
        from lrcompile.graphs.module import ModuleGraph

        return ModuleGraph(model)
    raise UsageError(
        f"a {type(model).__name__} is no model",
        hint="give a path, an nn.Module, an exported program, or an onnx or onnx_ir model",
    )


def _is(module: str, name: str, value: Any) -> bool:
    """Whether the value is of a class of a package that is loaded; it cannot be where it is not."""
    found = getattr(sys.modules.get(module), name, None)
    return found is not None and isinstance(value, found)


def _from_path(path: Path) -> Graph:
    if path.is_dir():
        if (path / "config.json").is_file() or (path / "lrcompile.json").is_file():
            from lrcompile.artifact import open_folder
            from lrcompile.graphs.module import ModuleGraph

            return ModuleGraph(open_folder(path), path)
        for name in ("model.onnx", "model.pt2"):
            if (path / name).is_file():
                return _from_path(path / name)
        raise InvalidInputError(
            "the folder holds neither config.json nor model.onnx nor model.pt2",
            where=str(path),
            hint="give a model file or folder",
        )
    if path.suffix == ".pt2":
        from lrcompile.graphs.fx.archive import load
        from lrcompile.graphs.fx.graph import FxGraph

        return FxGraph(load(path), path)
    if path.suffix in (".pt", ".pth", ".bin", ".pkl"):
        raise UnsupportedError(
            f"{path.suffix} files are not read", where=str(path), hint="export it to ONNX, or use the Python API"
        )
    from lrcompile.graphs.onnx.graph import OnnxGraph

    return OnnxGraph.load(path)
